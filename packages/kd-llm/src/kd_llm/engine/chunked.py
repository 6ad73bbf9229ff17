"""A loss on the logits of two language-model heads, block by block, written as an ordinary differentiable function.

For losses that are no divergence of `kdcore.gpu.linear_loss`: the caller gives a function of the logits of a few rows,
and no (tokens x vocabulary) tensor ever exists. Logits of a chunk of rows come from one matrix product a model; the
function is applied, and differentiated by autograd, to small blocks of them; the gradient dZ of a block overwrites its
logits, and dH = dZ W, dW += dZ^T H close the chunk (gradients in the forward pass: Hsu et al. 2024, arXiv 2410.10989).
Logits are accumulated and stored in float32 (float64 stays), whatever the models' type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdcore.errors import InputError
from kdcore.gpu._chunks import MASKED_LOGIT, HeadSpec, accumulation_dtype, add_gradients, logits

CHUNK_BYTES = {"cpu": 2**26}  # of the two (rows, V) buffers; 2**28 elsewhere
BLOCK_BYTES = {"cpu": 2**21}  # of one (rows, V) tensor inside a block; 2**24 elsewhere
PLAIN = HeadSpec()


@dataclass(frozen=True)
class HeadRows:
    """Rows and head of one model: hidden (N, d), weight (V, d), bias (V,), and what the model does to its logits."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    head: HeadSpec = PLAIN


BlockLoss = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""(student logits (C, V), teacher logits (C, V), block number) -> (scalar sum over rows, statistics (K,) to sum)."""


def row_blocks(rows: int, vocabulary: int, device: torch.device, bytes_per_value: int = 4) -> list[Tensor]:
    """arange(rows) cut into blocks small enough that a few (block, V) tensors are cheap."""
    budget = BLOCK_BYTES.get(device.type, 2**24)
    size = max(1, budget // (vocabulary * bytes_per_value))
    return list(torch.arange(rows, device=device).split(size)) if rows else []


def pair_blocks(first: Tensor, second: Tensor, vocabulary: int) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Blocks for a loss on pairs of rows (P,), (P,): the rows that a block needs, and where in it its pairs lie."""
    if not len(first):
        return [], []
    size = max(1, BLOCK_BYTES.get(first.device.type, 2**24) // (8 * vocabulary))
    blocks, places = [], []
    for a, b in zip(first.split(size), second.split(size)):
        some, where = torch.cat([a, b]).unique(return_inverse=True)
        blocks.append(some)
        places.append((where[: len(a)], where[len(a) :]))
    return blocks, places


def chunked_loss(
    student: HeadRows,
    teacher: HeadRows,
    blocks: Sequence[Tensor],
    function: BlockLoss,
    *,
    parameters: Iterable[Tensor] = (),
    statistics: int = 0,
) -> tuple[Tensor, Tensor]:
    """The sum of `function` over blocks of rows, with its gradient, and the sum of its statistics, detached.

    Args:
        student, teacher: equal N and V. The gradient reaches the student's hidden, weight and bias, where they ask for
            one, and never the teacher.
        blocks: row indices (C,) of each block; a row may be in several.
        function: see `BlockLoss`. It is called once a block, with grad mode on and autocast off; the student's logits
            carry the graph. It may use `parameters`.
        parameters: further tensors that `function` depends on and that get a gradient (once; no double backward).
        statistics: their number K.

    Raises InputError on rows or vocabularies that do not fit.
    """
    _check(student, teacher)
    if not blocks:
        zero = student.hidden.sum() * 0
        return zero.to(_dtype(student, teacher)), torch.zeros(statistics, device=student.hidden.device)
    job = _Job(student.head, teacher, tuple(blocks), function, statistics)
    own = (student.hidden, student.weight, student.bias)
    total, sums = _ChunkedLoss.apply(*own, job, torch.is_grad_enabled(), *parameters)
    return total, sums


@torch.no_grad()
def chunked_rows(
    student: HeadRows, teacher: HeadRows, function: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """Values per row, without gradients: `function` maps logits (C, V), (C, V) to tensors (C, ...); they are joined."""
    _check(student, teacher)
    rows, vocabulary = len(student.hidden), len(student.weight)
    found = []
    blocks = row_blocks(rows, vocabulary, student.hidden.device) or [torch.arange(0, device=student.hidden.device)]
    for chunk in _chunks(blocks, vocabulary):
        z, t = _products(student, teacher, chunk)
        for _, part, _ in _parts(chunk):
            found.append(function(_finished(z[part], student), _finished(t[part], teacher)))
    return tuple(torch.cat(values) for values in zip(*found))


# ---------------------------------------------------------------- the pieces


@dataclass(frozen=True)
class _Job:
    head: HeadSpec
    teacher: HeadRows
    blocks: tuple[Tensor, ...]
    function: BlockLoss
    statistics: int


Chunk = list[tuple[int, Tensor]]
"""Numbers and row indices of the blocks whose logits one matrix product makes."""


def _chunks(blocks: Sequence[Tensor], vocabulary: int) -> Iterator[Chunk]:
    chunk: Chunk = []
    limit = max(1, CHUNK_BYTES.get(blocks[0].device.type, 2**28) // (8 * vocabulary))
    for number, block in enumerate(blocks):
        if chunk and sum(len(rows) for _, rows in chunk) + len(block) > limit:
            yield chunk
            chunk = []
        chunk.append((number, block))
    yield chunk


def _parts(chunk: Chunk) -> Iterator[tuple[int, slice, Tensor]]:
    start = 0
    for number, rows in chunk:
        yield number, slice(start, start + len(rows)), rows
        start += len(rows)


def _products(student: HeadRows, teacher: HeadRows, chunk: Chunk) -> tuple[Tensor, Tensor]:
    """Raw products h W^T of both models for the rows of a chunk."""
    rows = torch.cat([rows for _, rows in chunk])
    dtype = _dtype(student, teacher)
    out = []
    for side in (student, teacher):
        product = torch.empty(len(rows), len(side.weight), dtype=dtype, device=side.hidden.device)
        logits(side.hidden.detach()[rows], side.weight.detach(), product)
        out.append(product)
    return out[0], out[1]


def _finished(product: Tensor, side: HeadRows) -> Tensor:
    """Products -> the model's logits, differentiably."""
    if side.bias is not None:
        product = product + side.bias.detach().to(product.dtype).clamp(min=MASKED_LOGIT)
    if side.head.softcap is not None:
        return side.head.softcap * torch.tanh(product * (side.head.scale / side.head.softcap))
    return product * side.head.scale if side.head.scale != 1 else product


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, job: _Job, track: bool, *parameters):
        student = HeadRows(hidden.detach(), weight.detach(), None if bias is None else bias.detach(), job.head)
        wanted = [track and ctx.needs_input_grad[i] for i in (0, 1, 2)]
        trained = [p for p, need in zip(parameters, ctx.needs_input_grad[5:]) if track and need]
        dtype = _dtype(student, job.teacher)
        d_hidden, d_weight, d_bias = (
            torch.zeros_like(x, dtype=dtype) if want else None for x, want in zip((hidden, weight, bias), wanted)
        )
        d_trained = [torch.zeros_like(p) for p in trained]
        total = torch.zeros((), dtype=dtype, device=hidden.device)
        sums = torch.zeros(job.statistics, dtype=dtype, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in _chunks(job.blocks, len(weight)):
                z, t = _products(student, job.teacher, chunk)
                for number, part, _ in _parts(chunk):
                    target = _finished(t[part], job.teacher)
                    with torch.set_grad_enabled(track):
                        leaf = z[part].clone().requires_grad_(track)
                        value, extra = job.function(_finished(leaf, student), target, number)
                    total += value.detach()
                    sums += extra.detach()
                    if not track:
                        continue
                    dz, *rest = torch.autograd.grad(value, [leaf, *trained], allow_unused=True)
                    z[part] = 0 if dz is None else dz
                    for into, gradient in zip(d_trained, rest):
                        if gradient is not None:
                            into += gradient
                if track:
                    rows = torch.cat([rows for _, rows in chunk])
                    _close(z, rows, student, d_hidden, d_weight, d_bias)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        trainable = iter(d_trained)
        per_parameter = [next(trainable) if track and need else None for need in ctx.needs_input_grad[5:]]
        ctx.grads = (d_hidden, d_weight, d_bias, *per_parameter)
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        scaled = [None if g is None else g * upstream.to(g.dtype) for g in ctx.grads]
        own = [None if g is None else g.to(dtype) for g, dtype in zip(scaled[:3], ctx.dtypes)]
        return *own, None, None, *scaled[3:]


def _close(z: Tensor, rows: Tensor, student: HeadRows, d_hidden, d_weight, d_bias) -> None:
    """Adds a chunk's dZ to the gradients of hidden rows, head and bias."""
    own = None if d_hidden is None else torch.zeros(len(rows), d_hidden.shape[1], dtype=z.dtype, device=z.device)
    if own is not None or d_weight is not None:
        add_gradients(z, student.hidden[rows], student.weight, own, d_weight)
    if own is not None:
        d_hidden.index_add_(0, rows, own)
    if d_bias is not None:
        d_bias += z.sum(0)


def _dtype(student: HeadRows, teacher: HeadRows) -> torch.dtype:
    return accumulation_dtype(student.hidden, student.weight, teacher.hidden)


def _check(student: HeadRows, teacher: HeadRows) -> None:
    if len(student.hidden) != len(teacher.hidden):
        raise InputError(f"rows: {len(student.hidden)} of the student and {len(teacher.hidden)} of the teacher")
    if len(student.weight) != len(teacher.weight):
        raise InputError(
            f"vocabulary: {len(student.weight)} entries in the student's head and {len(teacher.weight)} in the "
            "teacher's; allowed: equal ones, cut both to their common first entries"
        )

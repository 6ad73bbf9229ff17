"""The chunk loop of losses on a large output head: one student matrix product per chunk serves every term.

For C rows at a time: raw products z = H W^T into a buffer (C, V) in the accumulation type, then row block by row block
(small enough for the processor's cache) logits y = head(z + b), every term's rows and sum_k w_k dD_k/dy, which is
taken through the head and written over z; then dH = G W and dW += G^T H. Terms that need a matrix of their own, such
as a teacher's logits, have one buffer each, reused by all chunks.

Source: gradients in the forward pass of a chunked head, Hsu et al. 2024 (arXiv 2410.10989).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdcore.errors import InputError

MASKED_LOGIT = -1e30  # stands for a bias of -inf: its probability is 0 and 0 * MASKED_LOGIT is 0, not NaN
CAST_BYTES = 2**25  # a head in another type is cast in vocabulary blocks of this size
DEFAULT_CHUNK_BYTES = {"cpu": 2**27}  # measured: larger chunks are no faster there
BLOCK_BYTES = {"cpu": 2**21}  # row block of the element-wise work: a core's cache on CPU, launch overhead elsewhere


@dataclass(frozen=True)
class HeadSpec:
    """What a model does to its logits: y = scale (h W^T + b), then softcap tanh(y / softcap) where softcap is set."""

    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale != 0):
            raise InputError(f"HeadSpec.scale: given {self.scale}, allowed: a finite number other than 0")
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0):
            raise InputError(f"HeadSpec.softcap: given {self.softcap}, allowed: None or a number > 0")


class Student(NamedTuple):
    hidden: Tensor  # (n, d)
    weight: Tensor  # (V, d)
    bias: Tensor | None  # (V,)


class Plan(NamedTuple):
    head: HeadSpec  # the student's
    dtype: torch.dtype  # of accumulation
    chunk: int  # rows per matrix product
    block: int  # rows per element-wise step


class Block:
    """A few rows on their way through the terms: logits y (rows, V) and the weighted gradient gathered so far.

    The last term may work in y itself; the terms before it work on copies, or on the shared softmax.
    """

    def __init__(self, y: Tensor, terms: int):
        self.y, self.left = y, terms
        self.gradient: Tensor | None = None
        self._softmax: Tensor | None = None

    def take_logits(self) -> Tensor:
        """The logits, to be overwritten."""
        return self.y if self.left == 1 else self.y.clone()

    def softmax(self) -> Tensor:
        """softmax(y), not to be changed."""
        if self._softmax is None:
            self._softmax = self.y.softmax(1)
        return self._softmax

    def take_softmax(self) -> Tensor:
        """softmax(y), to be overwritten."""
        q, self._softmax = self.softmax(), None
        return q

    def add(self, gradient: Tensor, weight: Tensor) -> Tensor:
        """Adds weight_i gradient_i (rows, V); `gradient` may be y itself in the last term. Returns the sum so far."""
        weight = weight.unsqueeze(1)
        out = self.y if self.left == 1 else self.gradient
        if self.gradient is None:
            self.gradient = torch.mul(gradient, weight, out=out)
        else:
            self.gradient = torch.addcmul(self.gradient, gradient, weight, out=out)
        return self.gradient


class Term:
    """What the chunk loop needs of a loss term. Its rows are the loop's rows, or those named by `index`."""

    buffers = 0  # (C, V) buffers of its own
    index: Tensor | None = None  # (m,) ascending positions among the loop's rows; None: all of them
    count: int = 0  # m, or the number of the loop's rows

    def load(self, rows: slice, buffer: Tensor) -> None:
        """Fills the buffer (rows, V) for rows of the term's own count."""

    def block(self, block: Block, rows: slice, buffer: Tensor | None, weight: Tensor | None) -> Tensor:
        """D (rows,) of the term's own rows; adds weight_i dD_i/dy_i to the block where `weight` is given."""
        raise NotImplementedError

    def edges(self, starts: Tensor) -> list[int]:
        """Where each of the loop's positions `starts` (ascending) lies among the term's own rows."""
        if self.index is None:
            return starts.tolist()
        return torch.searchsorted(self.index, starts.to(self.index.device)).tolist()


class _Wanted(NamedTuple):
    hidden: bool
    weight: bool
    bias: bool


def weighted_sum(student: Student, terms: Sequence[Term], weights: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """sum_ki weights_ki D_ki with gradients computed in forward, and the rows D (K, n) without one."""
    return _WeightedSum.apply(*student, terms, weights, plan, torch.is_grad_enabled())


def per_row(student: Student, terms: Sequence[Term], plan: Plan) -> Tensor:
    """D (K, n); backward takes any upstream gradient and runs the chunks again."""
    return _PerRow.apply(*student, terms, plan)


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, terms, weights, plan, track):
        wanted = _Wanted(*(track and need for need in ctx.needs_input_grad[:3]))
        student = Student(hidden, weight, bias)
        rows, ctx.grads = _run(student, terms, weights, plan, wanted)
        ctx.dtypes = _dtypes(student)
        ctx.mark_non_differentiable(rows)
        return (rows * weights).sum(), rows

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.grads is None:
            raise RuntimeError("loss on a head in chunks: backward a second time; the first needs retain_graph=True")
        # In place saves a second (V, d) tensor, but a kept graph may ask for the same gradients again.
        keep = _graph_is_kept()
        scaled = [None if g is None else (g * upstream[0] if keep else g.mul_(upstream[0])) for g in ctx.grads]
        if not keep:
            ctx.grads = None
        return *(None if g is None else g.to(dtype) for g, dtype in zip(scaled, ctx.dtypes)), *([None] * 4)


class _PerRow(torch.autograd.Function):
    """Only the inputs are kept; backward runs the chunks again with the upstream gradient as row weights."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, terms, plan):
        ctx.save_for_backward(hidden, weight, bias)
        ctx.terms, ctx.plan = terms, plan
        return _run(Student(hidden, weight, bias), terms, None, plan, _Wanted(False, False, False))[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):  # pyright: ignore[reportIncompatibleMethodOverride]
        student = Student(*ctx.saved_tensors)
        _, grads = _run(student, ctx.terms, upstream[0], ctx.plan, _Wanted(*ctx.needs_input_grad[:3]))
        if not _graph_is_kept():
            ctx.terms = None  # the teacher's rows, freed like the saved tensors
        return *(None if g is None else g.to(d) for g, d in zip(grads, _dtypes(student))), None, None


def _run(student: Student, terms: Sequence[Term], weights: Tensor | None, plan: Plan, wanted: _Wanted):
    """Rows D (K, n), 0 where a term has no row, and gradients (dH, dW, db) of sum_ki weights_ki D_ki."""
    hidden, weight, bias = student
    n, (vocab, d) = len(hidden), weight.shape
    rows = torch.zeros(len(terms), n, dtype=plan.dtype, device=hidden.device)
    buffers = [rows.new_empty(min(plan.chunk, n), vocab) for _ in range(1 + sum(term.buffers for term in terms))]
    d_hidden = rows.new_zeros(n, d) if wanted.hidden else None
    d_weight = rows.new_zeros(vocab, d) if wanted.weight else None
    d_bias = rows.new_zeros(vocab) if wanted.bias else None
    if bias is not None:
        bias = bias.to(plan.dtype).clamp(min=MASKED_LOGIT)
    # d/dy to d/d(raw product): the head's scale here, the softcap's slope block by block.
    weights = weights * plan.head.scale if weights is not None and any(wanted) else None
    layout = _Layout(terms, buffers, n, plan)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, n, plan.chunk):
            chunk = slice(start, min(start + plan.chunk, n))
            z = buffers[0][: chunk.stop - start]
            logits(hidden[chunk], weight, z)
            layout.load(chunk)
            for lo in range(start, chunk.stop, plan.block):
                whole = slice(lo, min(lo + plan.block, chunk.stop))
                y = z[lo - start : whole.stop - start]
                slope = finish(y, bias, plan.head, 1.0, weights is not None)
                layout.block(y, chunk, whole, rows, weights)
                if slope is not None:
                    y.mul_(slope)
            if d_hidden is not None or d_weight is not None:
                into = None if d_hidden is None else d_hidden[chunk]
                add_gradients(z, hidden[chunk], weight, into, d_weight)
            if d_bias is not None:
                d_bias += z.sum(0)
    return rows, (d_hidden, d_weight, d_bias)


class _Layout:
    """Which rows of which term, and of its buffer, belong to a chunk and to a block of it."""

    def __init__(self, terms: Sequence[Term], buffers: list[Tensor], n: int, plan: Plan):
        self.terms = terms
        spare = iter(buffers[1:])
        self.buffers = [next(spare) if term.buffers else None for term in terms]
        starts = {min(lo, n) for c in range(0, n, plan.chunk) for lo in range(c, c + plan.chunk, plan.block)}
        points = sorted(starts | {n})
        # One transfer for all blocks of a term: slices of a device tensor need numbers on the host.
        self.own = [dict(zip(points, term.edges(torch.tensor(points)))) for term in terms]

    def load(self, chunk: slice) -> None:
        for term, buffer, own in zip(self.terms, self.buffers, self.own):
            mine = slice(own[chunk.start], own[chunk.stop])
            if buffer is not None and mine.stop > mine.start:
                term.load(mine, buffer[: mine.stop - mine.start])

    def block(self, y: Tensor, chunk: slice, whole: slice, rows: Tensor, weights: Tensor | None) -> None:
        """All terms on the rows `whole`: fills rows[:, whole] and overwrites the logits y by the gradient."""
        block = Block(y, len(self.terms))
        for k, (term, buffer, own) in enumerate(zip(self.terms, self.buffers, self.own)):
            mine = slice(own[whole.start], own[whole.stop])
            if buffer is not None:
                buffer = buffer[mine.start - own[chunk.start] : mine.stop - own[chunk.start]]
            weight = None if weights is None else weights[k, whole]
            if term.index is None:
                rows[k, whole] = term.block(block, mine, buffer, weight)
            elif mine.stop > mine.start:
                some = term.index[mine] - whole.start
                part = Block(y.index_select(0, some), 1)
                rows[k].index_copy_(
                    0, some + whole.start, term.block(part, mine, buffer, None if weight is None else weight[some])
                )
                if part.gradient is not None:
                    block.gradient = torch.zeros_like(y) if block.gradient is None else block.gradient
                    block.gradient.index_add_(0, some, part.gradient)
            block.left -= 1
        if weights is not None and block.gradient is not y:
            y.copy_(block.gradient) if block.gradient is not None else y.zero_()


def finish(x: Tensor, bias: Tensor | None, head: HeadSpec, temperature: float, want_slope: bool) -> Tensor | None:
    """Raw products to logits / temperature, in place; the softcap's slope 1 - tanh^2 if wanted."""
    slope = None
    if bias is not None:
        x.add_(bias)
    if head.softcap is None:
        if head.scale != temperature:
            x.mul_(head.scale / temperature)
        return None
    x.mul_(head.scale / head.softcap).tanh_()
    if want_slope:
        slope = (x * x).neg_().add_(1.0)
    x.mul_(head.softcap / temperature)
    return slope


def logits(h: Tensor, w: Tensor, out: Tensor) -> None:
    """out (C, V) = h (C, d) @ w (V, d)^T, accumulated and stored in out's type."""
    if _mixed_matmul(h, w, out):
        torch.mm(h, w.t(), out_dtype=out.dtype, out=out)
        return
    h = h.to(out.dtype)
    for part, block in _vocabulary_blocks(w, out.dtype):
        torch.mm(h, block.t(), out=out[:, part])


def add_gradients(g: Tensor, h: Tensor, w: Tensor, d_hidden: Tensor | None, d_weight: Tensor | None) -> None:
    """d_hidden (C, d) += g (C, V) @ w and d_weight (V, d) += g^T @ h, where wanted."""
    if _mixed_matmul(h, w, g):
        g16 = g.to(w.dtype)  # what autograd's own bf16 gradient is, but accumulated over the chunks in float32
        for total, a, b in ((d_hidden, g16, w), (d_weight, g16.t(), h)):
            if total is not None:
                torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
        return
    if d_hidden is not None:
        for part, block in _vocabulary_blocks(w, g.dtype):
            d_hidden.addmm_(g[:, part], block)
    if d_weight is not None:
        d_weight.addmm_(g.t(), h.to(g.dtype))


def _vocabulary_blocks(w: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The head in `dtype`: itself where it has that type, else cast block by block, never as a whole."""
    step = len(w) if w.dtype == dtype else max(1, CAST_BYTES // (w.shape[1] * dtype.itemsize))
    for lo in range(0, len(w), step):
        yield slice(lo, min(lo + step, len(w))), w[lo : lo + step].to(dtype)


def _mixed_matmul(h: Tensor, w: Tensor, accumulator: Tensor) -> bool:
    """Whether bf16 operands can go to the device's matrix product with a float32 result."""
    wanted = h.dtype == w.dtype == torch.bfloat16 and accumulator.dtype == torch.float32
    return wanted and h.device.type != "cpu" and _mixed_matmul_works(h.device)


@cache
def _mixed_matmul_works(device: torch.device) -> bool:
    """Tries `out_dtype` (torch >= 2.8, CUDA) on a small product; anything but the right answer means "cast instead"."""
    a = torch.linspace(-1, 1, 256, device=device).view(16, 16)
    a16 = a.bfloat16()
    exact = a16.float() @ a16.float().t()
    try:
        product = torch.mm(a16, a16.t(), out_dtype=torch.float32, out=torch.empty_like(exact))
        torch.addmm(product, a16, a16.t(), out_dtype=torch.float32, out=product)
    except (TypeError, NotImplementedError, RuntimeError):
        return False
    return torch.allclose(product, 2 * exact, rtol=1e-2, atol=1e-2)


def _graph_is_kept() -> bool:
    """Whether the running backward pass has retain_graph=True; True where torch cannot tell."""
    autograd = getattr(torch._C, "_autograd", None)
    return getattr(autograd, "_get_current_graph_task_keep_graph", lambda: True)()


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _dtypes(student: Student) -> list[torch.dtype | None]:
    return [None if x is None else x.dtype for x in student]


def make_plan(
    student: Student,
    terms: Sequence[Term],
    head: HeadSpec,
    dtype: torch.dtype,
    chunk_bytes: int | None,
    chunk_tokens: int | None,
) -> Plan:
    """Rows per chunk and block: the (C, V) buffers and the working blocks stay within `chunk_bytes`."""
    device, count, vocab = student.hidden.device.type, len(student.hidden), len(student.weight)
    buffers, blocks = 1 + sum(term.buffers for term in terms), 3 + 2 * len(terms)
    budget = chunk_bytes or DEFAULT_CHUNK_BYTES.get(device, 2**28)
    row_bytes = max(1, vocab * dtype.itemsize)
    block = max(1, min(BLOCK_BYTES.get(device, 2**24), budget // 16) // row_bytes)
    chunk = chunk_tokens or max(1, (budget - blocks * block * row_bytes) // (buffers * row_bytes))
    chunks = max(1, -(-count // chunk))  # chunks of equal size, rather than a small last one
    chunk = chunk_tokens or max(1, -(-count // chunks))
    return Plan(head, dtype, chunk, min(block, chunk))


def check_chunks(chunk_bytes: int | None, chunk_tokens: int | None) -> None:
    for name, given in (("chunk_bytes", chunk_bytes), ("chunk_tokens", chunk_tokens)):
        if given is not None and given < 1:
            raise InputError(f"{name}: given {given}, allowed: None or an integer >= 1")


def check_head(where: str, where_bias: str, h: Tensor, w: Tensor, bias: Tensor | None) -> None:
    if w.ndim != 2 or h.ndim < 1 or h.shape[-1] != w.shape[1]:
        raise InputError(f"{where}: given {tuple(h.shape)} and {tuple(w.shape)}, allowed: (..., d) and (V, d)")
    if bias is not None and bias.shape != w.shape[:1]:
        raise InputError(f"{where_bias}: given shape {tuple(bias.shape)}, allowed: ({len(w)},)")


def check_device(*tensors: Tensor | None) -> None:
    devices = {str(x.device) for x in tensors if x is not None}
    if len(devices) > 1:
        raise InputError(f"devices: given {', '.join(sorted(devices))}, allowed: one device for all tensors")

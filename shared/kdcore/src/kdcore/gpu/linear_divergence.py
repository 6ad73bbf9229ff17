r"""Divergence between two language-model heads that never holds a (tokens x vocabulary) tensor.

Student hidden rows H_S (N, d_S) and head W_S (V, d_S) give logits z, teacher H_T (N, d_T) and W_T (V, d_T) give t.
With q = softmax(z / tau), p = softmax(t / tau) and r = dD/dq, every divergence here has the row gradient

    dD/dz = q (r - sum_v q_v r_v) / tau                                     (softmax Jacobian applied to r)

    kind             D                                                      r, up to a constant
    forward          KL(p, q) = sum p ln(p/q)                               -p/q      (so dD/dz = (q - p)/tau)
    reverse          KL(q, p)                                               ln(q/p)
    js               beta KL(p, m) + (1-beta) KL(q, m), m = beta p + (1-beta) q      (1-beta) ln(q/m)
    skew             KL(p, m), m = alpha p + (1-alpha) q                    -(1-alpha) p/m
    skew_reverse     KL(q, m), m = alpha q + (1-alpha) p                    ln(q/m) - alpha q/m
    total_variation  sum |p - q| / 2                                        sign(q - p)/2

For C rows at a time: z and t by two matrix products, D and G = w dD/dz row block by row block (small enough for the
processor's cache), G written over z, then dH = G W_S and dW += G^T H. Two buffers (C, V) in the accumulation type
serve all chunks. The gradients are ready when the forward pass ends; backward multiplies them by the upstream scalar.

Sources: softmax Jacobian as above; js: Agarwal et al. 2024 (arXiv 2306.13649, eq. 1); skew: Ko et al. 2024
(arXiv 2402.03898, eq. 4); gradients in the forward pass of a chunked head: Hsu et al. 2024 (arXiv 2410.10989).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdcore.errors import InputError, did_you_mean

KINDS = ("forward", "reverse", "js", "skew", "skew_reverse", "total_variation")
REDUCTIONS = ("mean", "sum", "none")
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


class _Job(NamedTuple):
    kind: str
    temperature: float
    mixing: float  # beta of js, alpha of skew and skew_reverse
    head_s: HeadSpec
    head_t: HeadSpec
    chunk: int  # rows per matrix product
    block: int  # rows per element-wise step


class _Wanted(NamedTuple):
    hidden: bool
    weight: bool
    bias: bool


def linear_divergence(
    hidden_s: Tensor,
    weight_s: Tensor,
    hidden_t: Tensor,
    weight_t: Tensor,
    *,
    kind: str = "forward",
    temperature: float = 1.0,
    beta: float = 0.5,
    alpha: float = 0.1,
    bias_s: Tensor | None = None,
    bias_t: Tensor | None = None,
    head_s: HeadSpec = HeadSpec(),
    head_t: HeadSpec = HeadSpec(),
    labels: Tensor | None = None,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    reduction: str = "mean",
    scale_by_tau2: bool = True,
    recompute: bool = False,
    chunk_bytes: int | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """D(teacher, student) over a large vocabulary from hidden states and heads; the module docstring has the kinds.

    Args:
        hidden_s, hidden_t: (..., d_S) and (..., d_T), equal leading shapes: states after the final norm.
        weight_s, weight_t: (V, d_S) and (V, d_T). A frozen `weight_s` costs no (V, d_S) accumulator.
        kind: one of `KINDS`. `beta` in (0, 1) mixes js, `alpha` in [0, 1) the skew kinds.
        bias_s, bias_t: (V,); an entry of -inf masks an output.
        head_s, head_t: logit scale and softcap of each model.
        labels: (...,) integers, aligned with the rows: those equal to `ignore_index` are dropped.
        weights: (...,) non-negative constants; rows of weight 0 are dropped before the first matrix product.
        reduction: "mean" is sum(w D) / sum(w) over the kept rows (0 when none is kept), "sum" is sum(w D), "none" is
            w D in the leading shape, 0 at dropped rows.
        scale_by_tau2: multiply by temperature^2, so that gradients keep their size as the temperature grows.
        recompute: keep the inputs and compute the gradients in backward instead of in forward (always so for "none").
        chunk_bytes: limit for the two (C, V) buffers and the working blocks: 2**27 on CPU, 2**28 elsewhere by default.
        chunk_tokens: C itself.

    Returns: a scalar, or the leading shape for "none"; float32, or float64 when an input is float64. bf16 and fp16
    inputs are accumulated in float32, inside `torch.autocast` too (operands are never rounded down to its type).
    The gradients reach `hidden_s`, `weight_s` and `bias_s` alone, once (no double backward).
    Raises: InputError on shapes, vocabularies or values that do not fit.

    >>> h, w = torch.tensor([[1.0, 0.0]]), torch.eye(2)
    >>> round(linear_divergence(h, w, 2 * h, w).item(), 6)
    0.067131
    """
    _check_options(kind, temperature, beta, alpha, reduction, chunk_bytes, chunk_tokens)
    _check_shapes(hidden_s, weight_s, bias_s, hidden_t, weight_t, bias_t)
    lead = hidden_s.shape[:-1]
    rows_s, rows_t = hidden_s.reshape(-1, hidden_s.shape[-1]), hidden_t.detach().reshape(-1, hidden_t.shape[-1])
    dtype = _accumulation_dtype(hidden_s, weight_s, hidden_t)
    w, kept = _row_weights(lead, labels, ignore_index, weights, dtype, hidden_s.device)
    if kept is not None:
        rows_s, rows_t, w = rows_s.index_select(0, kept), rows_t.index_select(0, kept), w[kept]
    factor = temperature**2 if scale_by_tau2 else 1.0
    if reduction == "mean" and len(w):
        factor = factor / w.sum()
    mixing = beta if kind == "js" else alpha
    chunk, block = _chunk_rows(len(w), weight_s.shape[0], dtype, hidden_s.device.type, chunk_bytes, chunk_tokens)
    job = _Job(kind, float(temperature), mixing, head_s, head_t, chunk, block)
    teacher = (rows_t, weight_t.detach(), None if bias_t is None else bias_t.detach())
    if recompute or reduction == "none":
        per_row = _PerRow.apply(rows_s, weight_s, bias_s, *teacher, job) * (w * factor)
        if reduction != "none":
            return per_row.sum()
        return (per_row if kept is None else per_row.new_zeros(lead.numel()).index_copy(0, kept, per_row)).view(lead)
    return _WeightedSum.apply(rows_s, weight_s, bias_s, *teacher, w * factor, job, torch.is_grad_enabled())


class _WeightedSum(torch.autograd.Function):
    """sum_i w_i D_i; the gradients are computed in forward and scaled in backward."""

    @staticmethod
    def forward(ctx, h_s, w_s, b_s, h_t, w_t, b_t, row_weight, job, track):
        wanted = _Wanted(*(track and need for need in ctx.needs_input_grad[:3]))
        rows, grads = _run(h_s, w_s, b_s, h_t, w_t, b_t, row_weight, job, wanted)
        ctx.grads, ctx.dtypes = grads, _dtypes(h_s, w_s, b_s)
        return (rows * row_weight).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.grads is None:
            raise RuntimeError("linear_divergence: backward a second time; the first needs retain_graph=True")
        # In place saves a second (V, d) tensor, but a kept graph may ask for the same gradients again.
        keep = _graph_is_kept()
        scaled = [None if g is None else (g * upstream[0] if keep else g.mul_(upstream[0])) for g in ctx.grads]
        if not keep:
            ctx.grads = None
        return *(None if g is None else g.to(dtype) for g, dtype in zip(scaled, ctx.dtypes)), *([None] * 6)


class _PerRow(torch.autograd.Function):
    """(D_i)_i; only the inputs are kept, backward runs the chunks again with the upstream gradient as row weights."""

    @staticmethod
    def forward(ctx, h_s, w_s, b_s, h_t, w_t, b_t, job):
        ctx.save_for_backward(h_s, w_s, b_s, h_t, w_t, b_t)
        ctx.job = job
        return _run(h_s, w_s, b_s, h_t, w_t, b_t, None, job, _Wanted(False, False, False))[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):  # pyright: ignore[reportIncompatibleMethodOverride]
        h_s, w_s, b_s, h_t, w_t, b_t = ctx.saved_tensors
        wanted = _Wanted(*ctx.needs_input_grad[:3])
        _, grads = _run(h_s, w_s, b_s, h_t, w_t, b_t, upstream[0], ctx.job, wanted)
        return *(None if g is None else g.to(d) for g, d in zip(grads, _dtypes(h_s, w_s, b_s))), *([None] * 4)


def _run(h_s, w_s, b_s, h_t, w_t, b_t, row_weight, job: _Job, wanted: _Wanted):
    """Row divergences (n,) and gradients (dH (n, d), dW (V, d), db (V,)) of sum_i row_weight_i D_i."""
    n, (vocab, d) = len(h_s), w_s.shape
    rows = torch.empty(n, dtype=_accumulation_dtype(h_s, w_s, h_t), device=h_s.device)
    dtype = rows.dtype
    z, t = (rows.new_empty(min(job.chunk, n), vocab) for _ in range(2))
    d_hidden = rows.new_zeros(n, d) if wanted.hidden else None
    d_weight = rows.new_zeros(vocab, d) if wanted.weight else None
    d_bias = rows.new_zeros(vocab) if wanted.bias else None
    b_s, b_t = (None if b is None else b.to(dtype).clamp(min=MASKED_LOGIT) for b in (b_s, b_t))
    with torch.no_grad(), torch.autocast(h_s.device.type, enabled=False):
        for start in range(0, n, job.chunk):
            chunk = slice(start, min(start + job.chunk, n))
            size = chunk.stop - start
            _logits(h_s[chunk], w_s, z[:size])
            _logits(h_t[chunk], w_t, t[:size])
            for lo in range(0, size, job.block):
                part = slice(lo, min(lo + job.block, size))
                whole = slice(start + part.start, start + part.stop)
                weight = row_weight[whole] if any(wanted) else None
                rows[whole] = _block(z[part], t[part], b_s, b_t, weight, job)
            if d_hidden is not None or d_weight is not None:
                into = None if d_hidden is None else d_hidden[chunk]
                _add_gradients(z[:size], h_s[chunk], w_s, into, d_weight)
            if d_bias is not None:
                d_bias += z[:size].sum(0)
    return rows, (d_hidden, d_weight, d_bias)


def _block(z: Tensor, t: Tensor, b_s, b_t, weight: Tensor | None, job: _Job) -> Tensor:
    """D of a few rows; z and t are raw logits and are overwritten, z by the gradient if `weight` (rows,) is given."""
    slope = _finish(z, b_s, job.head_s, job.temperature, weight is not None)
    _finish(t, b_t, job.head_t, job.temperature, False)
    p, q = t.softmax(1), z.softmax(1)
    divergence, r = _divergence(z, t, p, q, job.kind, job.mixing, weight is not None)
    if weight is None:
        return divergence
    if r is None:
        gradient = q.sub_(p)
    else:
        mean = torch.mul(q, r, out=p).sum(1, keepdim=True)
        gradient = q.mul_(r.sub_(mean))
    if slope is not None:
        gradient.mul_(slope)
    torch.mul(gradient, (weight * (job.head_s.scale / job.temperature)).unsqueeze(1), out=z)
    return divergence


def _finish(x: Tensor, bias: Tensor | None, head: HeadSpec, temperature: float, want_slope: bool) -> Tensor | None:
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


def _divergence(z, t, p, q, kind: str, mixing: float, want_r: bool) -> tuple[Tensor, Tensor | None]:
    """D (rows,) and r = dD/dq (rows, V), None for forward KL (its gradient is q - p). Overwrites z and t."""
    if kind == "total_variation":
        r = torch.sub(q, p, out=z)
        return r.abs().sum(1) / 2, r.sign_().div_(2)
    lp, lq = _to_log_probabilities(t, p), _to_log_probabilities(z, q)
    if kind == "forward":
        return lp.sub_(lq).mul_(p).sum(1), None
    if kind == "reverse":
        r = lq.sub_(lp)
        return (q * r).sum(1), r
    p_share = 1 - mixing if kind == "skew_reverse" else mixing
    m = torch.lerp(q, p, p_share).clamp_(min=torch.finfo(q.dtype).tiny)
    if kind == "js":
        lm = m.log_()
        r = lq.sub_(lm)
        divergence = mixing * lp.sub_(lm).mul_(p).sum(1) + (1 - mixing) * (q * r).sum(1)
        return divergence, r.mul_(1 - mixing)
    if kind == "skew":
        ratio = torch.div(p, m, out=z)  # ln q is not needed
        return lp.sub_(m.log_()).mul_(p).sum(1), ratio.mul_(mixing - 1)
    ratio = torch.div(q, m, out=t)
    r = lq.sub_(m.log_())
    return (q * r).sum(1), r.sub_(ratio, alpha=mixing) if want_r else None


def _to_log_probabilities(x: Tensor, probability: Tensor) -> Tensor:
    """ln softmax(x) in place, given softmax(x): max x - ln(max softmax) is the log-normaliser without another exp."""
    return x.sub_(x.amax(1, keepdim=True) - probability.amax(1, keepdim=True).log_())


def _logits(h: Tensor, w: Tensor, out: Tensor) -> None:
    """out (C, V) = h (C, d) @ w (V, d)^T, accumulated and stored in out's type."""
    if _mixed_matmul(h, w, out):
        torch.mm(h, w.t(), out_dtype=out.dtype, out=out)
        return
    h = h.to(out.dtype)
    for part, block in _vocabulary_blocks(w, out.dtype):
        torch.mm(h, block.t(), out=out[:, part])


def _add_gradients(g: Tensor, h: Tensor, w: Tensor, d_hidden: Tensor | None, d_weight: Tensor | None) -> None:
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


def _accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _dtypes(*tensors: Tensor | None) -> list[torch.dtype | None]:
    return [None if x is None else x.dtype for x in tensors]


def _row_weights(lead, labels, ignore_index, weights, dtype, device) -> tuple[Tensor, Tensor | None]:
    """Weights (rows,) and the indices of the rows to keep, None for all of them."""
    for name, given in (("labels", labels), ("weights", weights)):
        if given is not None and given.shape != lead:
            raise InputError(f"{name}: given shape {tuple(given.shape)}, allowed: the rows' shape {tuple(lead)}")
    w = torch.ones(lead.numel(), dtype=dtype, device=device)
    keep = torch.ones_like(w, dtype=torch.bool)
    if weights is not None:
        if weights.requires_grad:
            raise InputError('weights: given with requires_grad, allowed: constants; multiply reduction="none" by them')
        w = weights.reshape(-1).to(w)
        if not bool((w.isfinite() & (w >= 0)).all()):
            raise InputError("weights: given a negative or non-finite value, allowed: finite numbers >= 0")
        keep &= w != 0
    if labels is not None:
        keep &= labels.reshape(-1).to(device) != ignore_index
    if (weights is None and labels is None) or bool(keep.all()):
        return w, None
    return w, keep.nonzero().squeeze(1)


def _chunk_rows(rows, vocab, dtype, device: str, chunk_bytes, chunk_tokens) -> tuple[int, int]:
    """(C, rows per element-wise block): two (C, V) buffers and about five blocks stay within `chunk_bytes`."""
    budget = chunk_bytes or DEFAULT_CHUNK_BYTES.get(device, 2**28)
    row_bytes = max(1, vocab * dtype.itemsize)
    block = max(1, min(BLOCK_BYTES.get(device, 2**24), budget // 16) // row_bytes)
    chunk = chunk_tokens or max(1, (budget - 5 * block * row_bytes) // (2 * row_bytes))
    count = max(1, -(-rows // chunk))  # chunks of equal size, rather than a small last one
    chunk = chunk_tokens or max(1, -(-rows // count))
    return chunk, min(block, chunk)


def _check_options(kind, temperature, beta, alpha, reduction, chunk_bytes, chunk_tokens) -> None:
    if kind not in KINDS:
        raise InputError(f"kind: given {kind!r}{did_you_mean(str(kind), KINDS)}")
    if reduction not in REDUCTIONS:
        raise InputError(f"reduction: given {reduction!r}{did_you_mean(str(reduction), REDUCTIONS)}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise InputError(f"temperature: given {temperature}, allowed: a number > 0")
    if kind == "js" and not 0 < beta < 1:
        ends = "JS vanishes at both ends; kind='forward' and 'reverse' are what some libraries call 0 and 1"
        raise InputError(f"beta: given {beta}, allowed: 0 < beta < 1 ({ends})")
    if kind.startswith("skew") and not 0 <= alpha < 1:
        raise InputError(f"alpha: given {alpha}, allowed: 0 <= alpha < 1")
    for name, given in (("chunk_bytes", chunk_bytes), ("chunk_tokens", chunk_tokens)):
        if given is not None and given < 1:
            raise InputError(f"{name}: given {given}, allowed: None or an integer >= 1")


def _check_shapes(h_s, w_s, b_s, h_t, w_t, b_t) -> None:
    if h_s.shape[:-1] != h_t.shape[:-1]:
        given = f"{tuple(h_s.shape)} and {tuple(h_t.shape)}"
        raise InputError(f"hidden_s, hidden_t: given {given}, allowed: equal shapes but for the last dimension")
    for side, h, w in (("s", h_s, w_s), ("t", h_t, w_t)):
        if w.ndim != 2 or h.ndim < 1 or h.shape[-1] != w.shape[1]:
            given = f"{tuple(h.shape)} and {tuple(w.shape)}"
            raise InputError(f"hidden_{side}, weight_{side}: given {given}, allowed: (..., d) and (V, d)")
    if len(w_s) != len(w_t):
        raise InputError(
            f"weight_s, weight_t: given vocabularies of {len(w_s)} (student) and {len(w_t)} (teacher) entries, "
            "allowed: equal ones; where ids 0..n-1 are the same tokens in both, pass weight[:n] of each"
        )
    for side, b, w in (("s", b_s, w_s), ("t", b_t, w_t)):
        if b is not None and b.shape != w.shape[:1]:
            raise InputError(f"bias_{side}: given shape {tuple(b.shape)}, allowed: ({len(w)},)")
    devices = {str(x.device) for x in (h_s, w_s, b_s, h_t, w_t, b_t) if x is not None}
    if len(devices) > 1:
        raise InputError(f"devices: given {', '.join(sorted(devices))}, allowed: one device for all tensors")

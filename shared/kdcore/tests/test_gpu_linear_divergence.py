"""linear_divergence against autograd on full logits: values, gradients, memory, and what is refused."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdcore.errors import InputError
from kdcore.gpu.linear_divergence import KINDS, HeadSpec, linear_divergence


def naive_rows(z, t, kind, tau=1.0, beta=0.5, alpha=0.1):
    """D per row from full logits, written from the definitions alone."""
    lq, lp = (z / tau).log_softmax(-1), (t / tau).log_softmax(-1)
    q, p = lq.exp(), lp.exp()

    def kl(la, lb):
        return (la.exp() * (la - lb)).sum(-1)

    if kind == "forward":
        return kl(lp, lq)
    if kind == "reverse":
        return kl(lq, lp)
    if kind == "js":
        lm = (beta * p + (1 - beta) * q).log()
        return beta * kl(lp, lm) + (1 - beta) * kl(lq, lm)
    if kind == "skew":
        return kl(lp, (alpha * p + (1 - alpha) * q).log())
    if kind == "skew_reverse":
        return kl(lq, (alpha * q + (1 - alpha) * p).log())
    return (p - q).abs().sum(-1) / 2


def problem(n=7, vocab=13, d_s=4, d_t=6, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(n, d_s), (vocab, d_s), (n, d_t), (vocab, d_t), (vocab,), (vocab,)]
    h_s, w_s, h_t, w_t, b_s, b_t = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes)
    return [x.requires_grad_() for x in (h_s, w_s, b_s)], [h_t, w_t, b_t]


def gradients(loss, inputs, upstream=None):
    return torch.autograd.grad(loss, inputs, upstream)


def assert_all_close(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk", [1, 7, 5])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_equal_naive(kind, recompute, chunk):
    (h_s, w_s, b_s), (h_t, w_t, b_t) = problem()
    weights = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0, 0.25, 0.0], dtype=torch.float64)
    labels = torch.tensor([3, 1, -100, 0, 2, 2, 2])
    kept = weights * (labels != -100)
    options = {"beta": 0.3, "alpha": 0.2}
    z, t = h_s @ w_s.t() + b_s, h_t @ w_t.t() + b_t
    expected = 2.5**2 * (naive_rows(z, t, kind, 2.5, **options) * kept).sum() / kept.sum()
    loss = linear_divergence(
        h_s, w_s, h_t, w_t, kind=kind, temperature=2.5, bias_s=b_s, bias_t=b_t, labels=labels, weights=weights,
        recompute=recompute, chunk_tokens=chunk, **options,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    student = [h_s, w_s, b_s]
    assert_all_close(gradients(3 * loss, student), gradients(3 * expected, student), 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_reduction_none_takes_an_upstream_gradient_per_row(kind):
    (h_s, w_s, b_s), (h_t, w_t, b_t) = problem(n=6)
    weights = torch.tensor([[1.0, 2.0, 0.0], [0.5, 1.0, 3.0]], dtype=torch.float64)
    upstream = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    h3, t3 = h_s.view(2, 3, -1), h_t.view(2, 3, -1)
    loss = linear_divergence(
        h3, w_s, t3, w_t, kind=kind, bias_s=b_s, bias_t=b_t, weights=weights, reduction="none", chunk_tokens=4
    )
    expected = naive_rows(h3 @ w_s.t() + b_s, t3 @ w_t.t() + b_t, kind) * weights
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    assert loss[0, 2] == 0
    student = [h_s, w_s, b_s]
    assert_all_close(gradients(loss, student, upstream), gradients(expected, student, upstream), 1e-10)
    total = linear_divergence(h3, w_s, t3, w_t, kind=kind, bias_s=b_s, bias_t=b_t, weights=weights, reduction="sum")
    torch.testing.assert_close(total, expected.sum(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_head_scale_and_softcap(kind):
    (h_s, w_s, b_s), (h_t, w_t, b_t) = problem()
    head_s, head_t = HeadSpec(scale=0.5, softcap=3.0), HeadSpec(scale=-1.5)
    z = 3.0 * torch.tanh(0.5 * (h_s @ w_s.t() + b_s) / 3.0)
    expected = 4.0 * naive_rows(z, -1.5 * (h_t @ w_t.t() + b_t), kind, 2.0).mean()
    loss = linear_divergence(
        h_s, w_s, h_t, w_t, kind=kind, temperature=2.0, bias_s=b_s, bias_t=b_t, head_s=head_s, head_t=head_t
    )
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    assert_all_close(gradients(loss, [h_s, w_s, b_s]), gradients(expected, [h_s, w_s, b_s]), 1e-10)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "total_variation"])  # its kink at p = q breaks differences
def test_gradcheck(kind, reduction):
    (h_s, w_s, b_s), (h_t, w_t, b_t) = problem(n=3, vocab=5, d_s=2, d_t=3)

    def f(h, w, b):
        loss = linear_divergence(h, w, h_t, w_t, kind=kind, bias_s=b, bias_t=b_t, reduction=reduction, chunk_tokens=2)
        return loss * torch.arange(1, 4, dtype=torch.float64)

    assert torch.autograd.gradcheck(f, (h_s, w_s, b_s))


def test_tied_weight_accumulates_from_embedding_and_head():
    g = torch.Generator().manual_seed(0)
    e = torch.nn.Parameter(torch.randn(11, 4, generator=g, dtype=torch.float64))
    ids = torch.tensor([1, 2, 2, 9])
    h_t, w_t = torch.randn(4, 3, generator=g, dtype=torch.float64), torch.randn(11, 3, generator=g, dtype=torch.float64)
    naive_rows((torch.tanh(e[ids])) @ e.t(), h_t @ w_t.t(), "reverse").mean().backward()
    expected, e.grad = e.grad, None
    for _ in range(2):  # also accumulates over two backward passes, the gradient accumulation of a training loop
        linear_divergence(torch.tanh(e[ids]), e, h_t, w_t, kind="reverse", chunk_tokens=3).backward()
    torch.testing.assert_close(e.grad, 2 * expected, rtol=1e-10, atol=1e-10)


def test_kept_graph_gives_the_same_gradient_twice_and_a_freed_one_says_so():
    (h_s, w_s, _), (h_t, w_t, _) = problem()
    loss = linear_divergence(h_s, w_s, h_t, w_t)
    first = torch.autograd.grad(5 * loss, w_s, retain_graph=True)[0]
    second = torch.autograd.grad(loss, w_s)[0]
    torch.testing.assert_close(first, 5 * second)
    with pytest.raises(RuntimeError, match="retain_graph"):
        torch.autograd.grad(loss, w_s)


def test_frozen_weight_and_teacher_get_no_gradient():
    (h_s, w_s, _), (h_t, w_t, _) = problem()
    w_s.requires_grad_(False)
    h_t.requires_grad_()
    w_t.requires_grad_()
    linear_divergence(h_s, w_s, h_t, w_t).backward()
    assert w_s.grad is None
    assert h_t.grad is None
    assert w_t.grad is None
    assert h_s.grad.abs().sum() > 0


def test_nothing_kept_gives_zero_with_zero_gradients():
    for reduction in ("mean", "sum", "none"):
        (h_s, w_s, b_s), (h_t, w_t, _) = problem(n=3)
        labels = torch.full((3,), -100)
        h_t = torch.full_like(h_t, float("nan"))  # dropped rows are never touched
        loss = linear_divergence(h_s, w_s, h_t, w_t, bias_s=b_s, labels=labels, reduction=reduction)
        assert torch.equal(loss, torch.zeros((3,) if reduction == "none" else (), dtype=torch.float64))
        for gradient in gradients(loss.sum(), [h_s, w_s, b_s]):
            assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("kind", KINDS)
def test_bias_of_minus_infinity_masks_an_output(kind):
    (h_s, w_s, _), (h_t, w_t, _) = problem()
    mask = torch.zeros(13, dtype=torch.float64)
    mask[10:] = -torch.inf
    student = [h_s, w_s]
    loss = linear_divergence(h_s, w_s, h_t, w_t, kind=kind, bias_s=mask, bias_t=mask)
    expected = naive_rows(h_s @ w_s[:10].t(), h_t @ w_t[:10].t(), kind).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    assert_all_close(gradients(loss, student), gradients(expected, student), 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_stay_finite_in_float32(kind):
    (h_s, w_s, _), (h_t, w_t, _) = problem(dtype=torch.float32)
    loss = linear_divergence(200 * h_s, w_s, 200 * h_t, w_t, kind=kind)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in gradients(loss, [h_s, w_s]))
    same = linear_divergence(h_s, w_s, h_s, w_s, kind=kind)
    torch.testing.assert_close(same, torch.zeros(()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_inputs_accumulate_in_float32(kind, dtype):
    low, low_t = problem(n=32, vocab=501, d_s=24, d_t=40, dtype=dtype)
    high = [x.detach().float().requires_grad_() for x in low]
    high_t = [x.float() for x in low_t]
    results = []
    for (h, w, b), (h_t, w_t, b_t) in ((low, low_t), (high, high_t)):
        loss = linear_divergence(h * 1, w, h_t, w_t, kind=kind, bias_s=b, bias_t=b_t, chunk_tokens=5)
        assert loss.dtype == torch.float32
        results.append((loss, gradients(loss, [h, w, b])))
    (loss_low, grads_low), (loss_high, grads_high) = results
    torch.testing.assert_close(loss_low, loss_high, rtol=1e-5, atol=1e-6)
    for a, b in zip(grads_low, grads_high, strict=True):
        assert a.dtype == dtype
        assert (a.float() - b).norm() < 1e-2 * b.norm()


def test_head_in_half_precision_is_cast_in_vocabulary_blocks(monkeypatch):
    # By sys.modules: the package exports the function under the module's own name.
    module = sys.modules["kdcore.gpu._chunks"]
    monkeypatch.setattr(module, "CAST_BYTES", 24 * 4 * 7)  # 7 of 501 rows at a time
    low, (h_t, w_t, _) = problem(n=9, vocab=501, d_s=24, d_t=40, dtype=torch.bfloat16)
    high = [x.detach().float().requires_grad_() for x in low]
    found = gradients(linear_divergence(low[0], low[1], h_t, w_t), low[:2])
    expected = gradients(linear_divergence(high[0], high[1], h_t.float(), w_t.float()), high[:2])
    for a, b in zip(found, expected, strict=True):
        assert (a.float() - b).norm() < 1e-2 * b.norm()


def test_no_grad_autocast_and_detached_student():
    (h_s, w_s, _), (h_t, w_t, _) = problem(dtype=torch.float32)
    expected = linear_divergence(h_s, w_s, h_t, w_t)
    with torch.no_grad():
        plain = linear_divergence(h_s, w_s, h_t, w_t)
    assert not plain.requires_grad
    torch.testing.assert_close(plain, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = linear_divergence(h_s, w_s, h_t, w_t)
        grad_inside = gradients(cast, [h_s, w_s])
    torch.testing.assert_close(cast, expected, rtol=0, atol=0)  # operands are not rounded down
    assert_all_close(grad_inside, gradients(expected, [h_s, w_s]), 0)


class LargestTensor(TorchDispatchMode):
    """The largest number of elements of any tensor an operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_of_tokens_by_vocabulary(kind, reduction):
    n, vocab, chunk = 64, 300, 8
    (h_s, w_s, b_s), (h_t, w_t, b_t) = problem(n=n, vocab=vocab, d_s=5, d_t=6, dtype=torch.float32)
    with LargestTensor() as largest:
        loss = linear_divergence(
            h_s, w_s, h_t, w_t, kind=kind, bias_s=b_s, bias_t=b_t, reduction=reduction, chunk_tokens=chunk
        )
        loss.sum().backward()
    assert largest.numel == chunk * vocab
    with LargestTensor() as largest:
        naive_rows(h_s @ w_s.t(), h_t @ w_t.t(), kind).sum().backward()
    assert largest.numel == n * vocab  # the counter sees what it must see


def test_chunk_bytes_bounds_the_buffers():
    n, vocab, budget = 64, 1000, 100_000
    (h_s, w_s, _), (h_t, w_t, _) = problem(n=n, vocab=vocab, d_s=4, d_t=4, dtype=torch.float32)
    with LargestTensor() as largest:
        linear_divergence(h_s, w_s, h_t, w_t, chunk_bytes=budget).backward()
    assert 2 * largest.numel * 4 <= budget


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 9), vocab=st.integers(1, 12), d_s=st.integers(1, 5), d_t=st.integers(1, 5),
    chunk=st.integers(1, 10), kind=st.sampled_from(KINDS), tau=st.floats(0.3, 5.0), mixing=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**20),
)  # fmt: skip
def test_any_shape(n, vocab, d_s, d_t, chunk, kind, tau, mixing, seed):
    (h_s, w_s, _), (h_t, w_t, _) = problem(n, vocab, d_s, d_t, seed=seed)
    options = {"temperature": tau, "beta": mixing, "alpha": mixing, "scale_by_tau2": False, "chunk_tokens": chunk}
    loss = linear_divergence(h_s, w_s, h_t, w_t, kind=kind, **options)
    expected = naive_rows(h_s @ w_s.t(), h_t @ w_t.t(), kind, tau, mixing, mixing).mean()
    assert loss >= -1e-12
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-10)
    assert_all_close(gradients(loss, [h_s, w_s]), gradients(expected, [h_s, w_s]), 1e-9)


def test_refusals_name_the_argument():
    (h_s, w_s, b_s), (h_t, w_t, _) = problem()
    with pytest.raises(InputError, match=r"13 \(student\) and 12 \(teacher\)"):
        linear_divergence(h_s, w_s, h_t, w_t[:12])
    bad = {
        "kind": {"kind": "forwards"}, "reduction": {"reduction": "avg"}, "temperature": {"temperature": 0.0},
        "beta": {"kind": "js", "beta": 1.0}, "alpha": {"kind": "skew", "alpha": 1.0}, "bias_s": {"bias_s": b_s[:3]},
        "labels": {"labels": torch.zeros(3)}, "weights": {"weights": -torch.ones(7)},
        "chunk_tokens": {"chunk_tokens": 0},
    }  # fmt: skip
    for name, options in bad.items():
        with pytest.raises(InputError, match=f"^{name}: given"):
            linear_divergence(h_s, w_s, h_t, w_t, **options)
    with pytest.raises(InputError, match=r"^weights: given with requires_grad"):
        linear_divergence(h_s, w_s, h_t, w_t, weights=torch.ones(7, requires_grad=True))
    with pytest.raises(InputError, match=r"^hidden_s, weight_s"):
        linear_divergence(h_s[:, :2], w_s, h_t, w_t)
    with pytest.raises(InputError, match=r"^hidden_s, hidden_t"):
        linear_divergence(h_s[:3], w_s, h_t, w_t)
    with pytest.raises(InputError, match=r"^HeadSpec\.softcap"):
        HeadSpec(softcap=0.0)

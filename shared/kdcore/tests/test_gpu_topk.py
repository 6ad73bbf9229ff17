"""topk_kl: the numbers worked out by hand, its bounds, its gradient, its limit at k = V."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcore.errors import InputError
from kdcore.gpu.topk import TopK, topk_kl

P = torch.tensor([[0.5, 0.3, 0.1, 0.1]], dtype=torch.float64)
Q = torch.tensor([[0.6, 0.35, 0.03, 0.02]], dtype=torch.float64)


def full_kl(z, t, tau=1.0):
    lq, lp = (z / tau).log_softmax(-1), (t / tau).log_softmax(-1)
    return (lp.exp() * (lp - lq)).sum(-1)


def logits(n=6, vocab=20, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    z, t = (3 * torch.randn(2, n, vocab, generator=g, dtype=torch.float64)).to(dtype)
    return z.requires_grad_(), t


def test_worked_numbers():
    assert full_kl(Q.log(), P.log()).item() == pytest.approx(0.143935, abs=5e-7)
    assert topk_kl(Q.log(), TopK.from_logits(P.log(), 2)).item() == pytest.approx(0.139853, abs=5e-7)


@pytest.mark.parametrize("tau", [1.0, 0.5, 4.0, 20.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_equals_the_full_divergence_at_k_equal_v(tau, dtype, tolerance):
    z, t = logits(dtype=dtype)
    found = topk_kl(z, TopK.from_logits(t, 20), tau, reduction="none", scale_by_tau2=False)
    expected = full_kl(z, t, tau)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    (a,), (b,) = torch.autograd.grad(found.sum(), z), torch.autograd.grad(expected.sum(), z)
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_gradient_off_and_on_the_support():
    z, t = logits()
    k = 5
    top = TopK.from_logits(t, k)
    (found,) = torch.autograd.grad(topk_kl(z, top, reduction="sum"), z)
    q, p = z.detach().softmax(-1), t.softmax(-1)
    on = torch.zeros_like(q, dtype=torch.bool).scatter(-1, top.ids, True)
    p_on, q_on = ((x * on).sum(-1, keepdim=True) for x in (p, q))
    expected = torch.where(on, q - p, q * (1 - (1 - p_on) / (1 - q_on)))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: topk_kl(x, top, 2.0, reduction="none"), (z,))


def test_rows_are_weighted_and_reduced():
    z, t = logits()
    top = TopK.from_logits(t, 4)
    rows = topk_kl(z, top, 3.0, reduction="none", scale_by_tau2=False)
    w = torch.tensor([1.0, 0.0, 2.0, 0.5, 0.0, 1.0], dtype=torch.float64)
    assert torch.allclose(topk_kl(z, top, 3.0), 9 * rows.mean())
    assert torch.allclose(topk_kl(z, top, 3.0, weights=w), 9 * (w * rows).sum() / w.sum())
    assert torch.allclose(topk_kl(z, top, 3.0, weights=w, reduction="sum"), 9 * (w * rows).sum())
    assert topk_kl(z, top, weights=0 * w).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_cache_and_logits(dtype):
    z, t = logits(dtype=torch.float32)
    exact = topk_kl(z, TopK.from_logits(t, 5))
    top = TopK.from_logits(t, 5).to(dtype)
    assert top.ids.dtype == torch.int64
    rounded = topk_kl(z, top)
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=2e-2)
    same = topk_kl(t, top, reduction="none")
    assert (same > -1e-6).all()  # normalised again after rounding of the cache, so never truly negative
    assert same.max() < 1e-3


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_masked_outputs_and_sharp_rows_stay_finite(tau):
    z = torch.tensor([[200.0, 0.0, -200.0, -torch.inf], [0.0, 1.0, 2.0, -torch.inf]], requires_grad=True)
    t = torch.tensor([[0.0, 300.0, 1.0, -torch.inf], [0.0, 1.0, 2.0, -torch.inf]])
    for k in (1, 2, 3, 4):
        loss = topk_kl(z, TopK.from_logits(t, k), tau, reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), z)
        assert torch.isfinite(loss).all()
        assert torch.isfinite(gradient).all()
        assert loss[0] > 10
        assert loss[1].item() == pytest.approx(0, abs=1e-5)


def test_log_missing_has_no_cancellation():
    t = torch.zeros(1, 11)
    t[0, 0] = 30.0
    missing = TopK.from_logits(t, 1).log_missing.item()
    assert missing == pytest.approx(math.log(10) - 30, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(vocab=st.integers(1, 12), data=st.data(), tau=st.floats(0.5, 4.0), seed=st.integers(0, 2**20))
def test_between_zero_and_the_full_divergence(vocab, data, tau, seed):
    k = data.draw(st.integers(1, vocab))
    z, t = logits(n=3, vocab=vocab, seed=seed)
    top = TopK.from_logits(t, k)
    loss = topk_kl(z, top, reduction="none")
    assert (loss >= -1e-12).all()
    assert (loss <= full_kl(z, t) + 1e-12).all()
    assert (topk_kl(z, top, tau, reduction="none") >= -1e-12).all()
    torch.testing.assert_close(topk_kl(t, top, tau), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-12)


def test_refusals_name_the_argument():
    z, t = logits()
    top = TopK.from_logits(t, 3)
    with pytest.raises(InputError, match=r"^k: given 21"):
        TopK.from_logits(t, 21)
    with pytest.raises(InputError, match=r"^topk: given"):
        topk_kl(z[:2], top)
    with pytest.raises(InputError, match=r"^temperature: given 0"):
        topk_kl(z, top, 0.0)
    with pytest.raises(InputError, match=r"^reduction: given 'avg'"):
        topk_kl(z, top, reduction="avg")


@given(st.integers(0, 10_000), st.sampled_from([1, 8, 32]), st.floats(0.2, 4.0))
def test_what_the_tail_loses_is_the_divergence_inside_it(seed, k, sharpness):
    generator = torch.Generator().manual_seed(seed)
    z, t = (sharpness * torch.randn(3, 200, dtype=torch.float64, generator=generator) for _ in range(2))
    z.requires_grad_()
    topk = TopK.from_logits(t, k)
    coarse = topk_kl(z, topk, reduction="none")
    p, q = t.softmax(-1), z.softmax(-1)
    full = (p * (p / q).log()).sum(-1)
    off = torch.ones_like(p).scatter(-1, topk.ids, 0.0)
    mass, reached = (p * off).sum(-1), (q * off).sum(-1)
    inside = (off * p / mass[:, None] * (p / mass[:, None] / (q / reached[:, None])).log()).sum(-1)
    torch.testing.assert_close(full - coarse, mass * inside)
    ours, exact = (torch.autograd.grad(x.sum(), z, retain_graph=True)[0] for x in (coarse, full))
    torch.testing.assert_close((ours - exact) * (1 - off), torch.zeros_like(p))
    assert ((ours - exact).abs().sum(-1) <= 2 * mass + 1e-12).all()

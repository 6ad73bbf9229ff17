"""Logit losses: numbers of the method specs, formulas by hand, identities, gradients, extremes, messages."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kdcore import losses


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def softmax(z):
    e = np.exp(np.asarray(z, dtype=np.float64))
    return e / e.sum(axis=-1, keepdims=True)


logits = hnp.arrays(np.float64, (4, 5), elements=st.floats(-8, 8))
labels = hnp.arrays(np.int64, (4,), elements=st.integers(0, 4))


def test_soft_target_kl_of_the_kd_oct_spec():
    z, t = tensor([[1, 0, -1], [0.5, 0.5, 0]]), tensor([[2, 0, -2], [0, 1, 1]])
    assert losses.soft_target_kl(z, t, 4.0).item() == pytest.approx(0.2452974781, abs=1e-10)
    unscaled = losses.soft_target_kl(z, t, 4.0, scale_by_tau2=False)
    assert unscaled.item() == pytest.approx(0.2452974781 / 16, abs=1e-11)


def test_standardise_logits_uses_the_sample_standard_deviation():
    z = np.array([[1.0, 4.0, -2.0, 0.5], [3.0, 3.0, 3.0, 7.0]])
    expected = (z - z.mean(1, keepdims=True)) / (z.std(1, ddof=1, keepdims=True) + 1e-7)
    torch.testing.assert_close(losses.standardise_logits(tensor(z)), tensor(expected), atol=1e-13, rtol=0)


@given(z=logits, scale=st.floats(0.1, 10), shift=st.floats(-5, 5))
@settings(max_examples=40, deadline=None)
def test_standardised_logits_forget_scale_and_shift(z, scale, shift):
    z = torch.from_numpy(z)
    z = z + torch.arange(5)  # no row is constant, so eps stays negligible
    if (z.std(dim=1) < 1e-2).any():
        z = z * 0 + torch.arange(5.0)
    torch.testing.assert_close(
        losses.standardise_logits(scale * z + shift), losses.standardise_logits(z), atol=1e-3, rtol=1e-3
    )


def test_standardise_equal_logits_is_zero_with_finite_gradient():
    z = torch.full((2, 3), 1.5, dtype=torch.float64, requires_grad=True)
    out = losses.standardise_logits(z)
    out.square().sum().backward()
    assert (out == 0).all()
    assert (z.grad == 0).all()


def dkd_by_hand(z, t, y, alpha, beta, tau):
    """Paper's definition on one sample: binary probabilities, then the softmax of the other classes."""
    q, p = softmax(np.array(z) / tau), softmax(np.array(t) / tau)
    binary = p[y] * math.log(p[y] / q[y]) + (1 - p[y]) * math.log((1 - p[y]) / (1 - q[y]))
    p_hat, q_hat = np.delete(p, y) / (1 - p[y]), np.delete(q, y) / (1 - q[y])
    return tau**2 * (alpha * binary + beta * float(np.sum(p_hat * np.log(p_hat / q_hat))))


def test_dkd_by_hand_and_defaults():
    z, t, y = [[2.0, 0.5, -1.0, 0.0], [0.0, 1.0, 0.3, -2.0]], [[1.0, 1.5, 0.0, -1.0], [2.0, 0.0, 1.0, 0.5]], [1, 0]
    expected = [dkd_by_hand(z[i], t[i], y[i], 1.0, 8.0, 4.0) for i in range(2)]
    args = tensor(z), tensor(t), torch.tensor(y)
    torch.testing.assert_close(losses.dkd(*args, reduction="none"), tensor(expected), atol=1e-12, rtol=0)
    assert losses.dkd(*args).item() == pytest.approx(np.mean(expected), abs=1e-12)
    other = [dkd_by_hand(z[i], t[i], y[i], 0.5, 2.0, 1.5) for i in range(2)]
    value = losses.dkd(*args, alpha=0.5, beta=2.0, temperature=1.5)
    assert value.item() == pytest.approx(np.mean(other), abs=1e-12)


@given(z=logits, t=logits, y=labels, tau=st.floats(0.5, 6))
@settings(max_examples=60, deadline=None)
def test_dkd_with_beta_one_minus_p_is_the_kl(z, t, y, tau):
    z, t, y = map(torch.from_numpy, (z, t, y))
    target = losses.dkd(z, t, y, alpha=1.0, beta=0.0, temperature=tau, reduction="none")
    other = losses.dkd(z, t, y, alpha=0.0, beta=1.0, temperature=tau, reduction="none")
    p_y = torch.softmax(t / tau, dim=-1)[torch.arange(4), y]
    kl = losses.soft_target_kl(z, t, tau, reduction="none")
    torch.testing.assert_close(target + (1 - p_y) * other, kl, atol=1e-10, rtol=1e-9)
    assert (target >= -1e-12).all()
    assert (other >= -1e-12).all()


def test_dkd_takes_leading_dimensions():
    generator = torch.Generator().manual_seed(0)
    z, t = torch.randn(2, 2, 3, 5, dtype=torch.float64, generator=generator)
    y = torch.randint(5, (2, 3), generator=generator)
    flat = losses.dkd(z.flatten(0, 1), t.flatten(0, 1), y.flatten(), reduction="none")
    torch.testing.assert_close(losses.dkd(z, t, y, reduction="none").flatten(), flat, atol=0, rtol=0)


def test_dist_by_numpy_correlation():
    generator = np.random.default_rng(5)
    z, t = generator.normal(size=(2, 6, 4))
    for tau, beta, gamma in ((1.0, 1.0, 1.0), (2.0, 0.5, 3.0)):
        q, p = softmax(z / tau), softmax(t / tau)
        inter = np.mean([1 - np.corrcoef(q[i], p[i])[0, 1] for i in range(6)])
        intra = np.mean([1 - np.corrcoef(q[:, j], p[:, j])[0, 1] for j in range(4)])
        value = losses.dist(tensor(z), tensor(t), beta=beta, gamma=gamma, temperature=tau)
        assert value.item() == pytest.approx(tau**2 * (beta * inter + gamma * intra), abs=1e-12)


@given(a=hnp.arrays(np.float64, (4,), elements=st.floats(0.2, 0.99)), seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_dist_inter_class_ignores_row_affine_maps_of_the_probabilities(a, seed):
    """a p + (1 - a)/C, another a for every row, is a distribution again and keeps each row's correlation."""
    generator = torch.Generator().manual_seed(seed)
    z, t = torch.randn(2, 4, 5, dtype=torch.float64, generator=generator)
    a = torch.from_numpy(a)[:, None]
    mapped = (a * torch.softmax(t, -1) + (1 - a) / 5).log()
    torch.testing.assert_close(losses.dist(z, mapped, gamma=0.0), losses.dist(z, t, gamma=0.0), atol=1e-10, rtol=1e-9)
    one_map = (a[0] * torch.softmax(t, -1) + (1 - a[0]) / 5).log()  # one map for all rows keeps the columns' too
    torch.testing.assert_close(losses.dist(z, one_map), losses.dist(z, t), atol=1e-10, rtol=1e-9)
    assert losses.dist(t, mapped, gamma=0.0).abs() < 1e-12
    assert 0 <= losses.dist(z, t) <= 4


def test_dist_batch_of_one_has_a_constant_intra_term():
    z = tensor([[1.0, 2.0, 0.0]]).requires_grad_()
    value = losses.dist(z, tensor([[0.0, 1.0, 3.0]]), beta=0.0, gamma=2.0)
    value.backward()
    assert value.item() == 2.0
    assert (z.grad == 0).all()


# the data of the margin-preserving spec: 2 old classes of 3
MPT_Z, MPT_Y = tensor([[2, 0, 1], [0.5, 1.5, -1]]), torch.tensor([0, 2])
MPT_OLD, MPT_NEW = tensor([[1, -1], [0, 2]]), tensor([[3, 0, 1], [0, 1, 2]])


def test_focal_distillation_of_the_margin_preserving_spec():
    fd = losses.focal_distillation
    assert fd(MPT_Z[:, :2], MPT_OLD, MPT_Y).item() == pytest.approx(0.0024305745, abs=1e-10)
    assert fd(MPT_Z, MPT_NEW, MPT_Y).item() == pytest.approx(0.1805411359, abs=1e-10)
    assert 0.4 * fd(MPT_Z[:, :2], MPT_OLD, MPT_Y, form="logits").item() == pytest.approx(0.625, abs=1e-12)
    assert 0.4 * fd(MPT_Z, MPT_NEW, MPT_Y, form="logits").item() == pytest.approx(2.1, abs=1e-12)


def test_focal_weights():
    assert losses.focal_weights(MPT_NEW, MPT_Y).tolist() == [6.0, 6.0]
    assert losses.focal_weights(MPT_OLD, MPT_Y).tolist() == [6.0, 1.0]  # label 2 is unknown to the old model
    assert losses.focal_weights(MPT_NEW, torch.tensor([1, 2]), alpha=0.0, beta=1.0).tolist() == [0.0, 1.0]
    assert losses.focal_weights(MPT_NEW, MPT_Y, alpha=3.0, beta=0.0).tolist() == [3.0, 3.0]
    assert not losses.focal_weights(MPT_NEW.clone().requires_grad_(), MPT_Y).requires_grad


def test_focal_distillation_shift_and_temperature():
    shifted = MPT_NEW + tensor([[3.0], [-1.0]])
    fd = losses.focal_distillation
    torch.testing.assert_close(fd(MPT_Z, shifted, MPT_Y), fd(MPT_Z, MPT_NEW, MPT_Y), atol=1e-13, rtol=0)
    assert abs(fd(MPT_Z, shifted, MPT_Y, form="logits") - fd(MPT_Z, MPT_NEW, MPT_Y, form="logits")) > 1
    ratio = fd(MPT_Z, MPT_NEW, MPT_Y, temperature=500.0) / fd(MPT_Z, MPT_NEW, MPT_Y, temperature=50.0)
    assert ratio.item() == pytest.approx(0.01, rel=0.02)  # no tau^2


@pytest.mark.parametrize("form", ["kl", "logits"])
def test_focal_distillation_is_flat_at_the_reference(form):
    z = MPT_NEW.clone().requires_grad_()
    value = losses.focal_distillation(z, MPT_NEW, MPT_Y, form=form)
    value.backward()
    assert value.abs() < 1e-15
    assert z.grad.abs().max() < 1e-15


GRADIENTS = {
    "standardise": lambda z, t: losses.standardise_logits(z),
    "dkd": lambda z, t: losses.dkd(z, t, torch.tensor([0, 3, 2]), beta=2.0, reduction="none"),
    "dist": lambda z, t: losses.dist(z, t, temperature=1.3),
    "focal_kl": lambda z, t: losses.focal_distillation(z, t, torch.tensor([0, 3, 2]), temperature=2.0),
    "focal_logits": lambda z, t: losses.focal_distillation(z, t, torch.tensor([0, 3, 2]), form="logits"),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradcheck(name):
    z, t = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).unbind()
    assert torch.autograd.gradcheck(GRADIENTS[name], (z.clone().requires_grad_(), t.clone().requires_grad_()))


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [60.0, 1e4])
def test_extreme_logits_stay_finite(name, dtype, size):
    z = torch.tensor([[size, -size, 0, 0], [0, size, -size, size], [size] * 4], dtype=dtype).requires_grad_()
    t = torch.tensor([[-size, size, 0, 0], [size, -size, 0, 0], [0, 0, 0, size]], dtype=dtype)
    value = GRADIENTS[name](z, t).sum()
    value.backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    assert torch.isfinite(z.grad).all()


def test_half_precision_equals_float32_of_the_same_numbers():
    z, t = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(7)).bfloat16()
    for function in GRADIENTS.values():
        torch.testing.assert_close(function(z, t), function(z.float(), t.float()), atol=0, rtol=0)


def test_messages():
    z = torch.zeros(2, 3)
    y = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"teacher_logits has 4 classes"):
        losses.dkd(z, torch.zeros(2, 4), y)
    with pytest.raises(ValueError, match=r"labels has shape \(3,\) but student_logits has \(2, 3\); it must be \(2,\)"):
        losses.dkd(z, z, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"labels holds ids 0..3; allowed: 0..2"):
        losses.dkd(z, z, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"labels holds ids -100..0"):
        losses.dkd(z, z, torch.tensor([0, -100]))
    with pytest.raises(ValueError, match=r"labels has dtype torch.float32"):
        losses.dkd(z, z, torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"has 1 class; dkd needs at least 2"):
        losses.dkd(z[:, :1], z[:, :1], torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=r"dist needs \(B, C\)"):
        losses.dist(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"reference_logits has 2 classes .* student_logits has 3"):
        losses.focal_distillation(z, z[:, :2], y)
    with pytest.raises(ValueError, match=r"form is 'mse'; allowed: 'kl', 'logits'"):
        losses.focal_distillation(z, z, y, form="mse")
    with pytest.raises(ValueError, match=r"labels has shape \(1,\) but reference_logits"):
        losses.focal_weights(z, y[:1])
    with pytest.raises(ValueError, match=r"at least 2 classes"):
        losses.standardise_logits(z[:, :1])

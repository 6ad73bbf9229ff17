"""Adversarial losses: numbers by hand, equivalence with binary cross-entropy, penalties with known gradients."""

import math

import pytest
import torch

from kdcore import losses

REAL = torch.tensor([0.5, 2.0, -1.0, 0.2], dtype=torch.float64)
FAKE = torch.tensor([-0.5, -2.0, 1.5, 0.0], dtype=torch.float64)


def test_hinge_of_the_tad_sr_spec():
    assert losses.hinge_discriminator(REAL, FAKE).item() == pytest.approx(1.825, abs=1e-14)
    assert losses.hinge_generator(FAKE).item() == pytest.approx(0.25, abs=1e-14)


def test_hinge_is_flat_beyond_the_margin():
    real, fake = REAL.clone().requires_grad_(), FAKE.clone().requires_grad_()
    losses.hinge_discriminator(real, fake).backward()
    assert real.grad.tolist() == [-0.25, 0.0, -0.25, -0.25]
    assert fake.grad.tolist() == [0.25, 0.0, 0.25, 0.25]


def test_non_saturating_is_the_log_of_sigmoids():
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    real = [-math.log(sigmoid(x)) for x in REAL.tolist()]
    fake = [-math.log(1 - sigmoid(x)) for x in FAKE.tolist()]
    expected = sum(real) / 4 + sum(fake) / 4
    assert losses.non_saturating_discriminator(REAL, FAKE).item() == pytest.approx(expected, abs=1e-14)
    expected = [-math.log(sigmoid(x)) for x in FAKE.tolist()]
    torch.testing.assert_close(
        losses.non_saturating_generator(FAKE, reduction="none"), torch.tensor(expected, dtype=torch.float64)
    )


def test_generators_average_positions_then_examples():
    fake = torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for function in (losses.hinge_generator, losses.non_saturating_generator):
        rows = function(fake, reduction="none")
        assert rows.shape == (3,)
        for i in range(3):
            torch.testing.assert_close(rows[i], function(fake[i : i + 1]), atol=1e-14, rtol=0)
        torch.testing.assert_close(function(fake), rows.mean(), atol=1e-14, rtol=0)


def test_discriminators_take_batches_of_different_sizes():
    assert losses.hinge_discriminator(REAL[:1], FAKE).item() == pytest.approx(0.5 + 1.0)
    doubled = losses.non_saturating_discriminator(REAL, torch.cat((FAKE, FAKE)))
    torch.testing.assert_close(doubled, losses.non_saturating_discriminator(REAL, FAKE))


def test_r1_of_a_quadratic_critic():
    """D(x) = x^T A x / 2 has gradient A x for symmetric A, so R1 is gamma/2 mean ||A x||^2; d/dA exists."""
    a = torch.tensor([[2.0, 1.0], [1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64, requires_grad=True)
    penalty = losses.r1_penalty(0.5 * ((x @ a) * x).sum(dim=1), x, gamma=3.0)
    assert penalty.item() == pytest.approx(1.5 * ((4**2 + 1**2) + (5**2 + 3**2)) / 2, abs=1e-12)
    (gradient,) = torch.autograd.grad(penalty, a)
    assert gradient.abs().sum() > 0


def test_r1_sums_the_patches_of_an_example():
    w = torch.tensor([[3.0], [4.0]], dtype=torch.float64)
    x = torch.randn(2, 5, 2, dtype=torch.float64, requires_grad=True)
    assert losses.r1_penalty(x @ w, x, gamma=2.0).item() == pytest.approx(5 * 25.0)


GRADIENTS = {
    "hinge_discriminator": losses.hinge_discriminator,
    "hinge_generator": lambda r, f: losses.hinge_generator(f),
    "non_saturating_discriminator": losses.non_saturating_discriminator,
    "non_saturating_generator": lambda r, f: losses.non_saturating_generator(f),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradcheck(name):
    r, f = REAL.clone().requires_grad_(), FAKE.clone().requires_grad_()
    inputs = (r, f) if name.endswith("discriminator") else (REAL, f)
    assert torch.autograd.gradcheck(GRADIENTS[name], inputs)


def test_r1_gradcheck_through_the_critic():
    x = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    w = torch.randn(2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: losses.r1_penalty(torch.tanh(x @ w).sum(dim=1), x, gamma=1.0), (w,))


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite(name, dtype):
    r = torch.tensor([1e4, -1e4, 0.0], dtype=dtype, requires_grad=True)
    f = torch.tensor([-1e4, 1e4, 0.0], dtype=dtype, requires_grad=True)
    value = GRADIENTS[name](r, f)
    value.backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    assert torch.isfinite(f.grad).all()


def test_messages():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"real_inputs takes no gradient"):
        losses.r1_penalty(x.sum(dim=1), x, gamma=1.0)
    x.requires_grad_()
    for unrelated in (torch.zeros(2), torch.zeros(2, requires_grad=True) * 2):
        with pytest.raises(ValueError, match=r"real_logits does not depend on real_inputs"):
            losses.r1_penalty(unrelated, x, gamma=1.0)
    with pytest.raises(ValueError, match=r"real_logits has shape \(3,\) but real_inputs has \(2, 3\)"):
        losses.r1_penalty(x.sum(dim=0), x, gamma=1.0)
    with pytest.raises(ValueError, match=r"fake_logits has shape \(0,\)"):
        losses.hinge_discriminator(REAL, torch.zeros(0))
    with pytest.raises(ValueError, match=r"real_logits has dtype torch.int64"):
        losses.non_saturating_discriminator(torch.zeros(2).long(), FAKE)
    with pytest.raises(ValueError, match=r"reduction is 'sum'"):
        losses.hinge_generator(FAKE, reduction="sum")

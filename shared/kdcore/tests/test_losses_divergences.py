"""Divergences: numbers of the papers' specs, numpy and scipy formulas, properties, gradients, extremes, messages."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kdcore import losses

Z = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
T = torch.tensor([[0.0, math.log(2.0), 0.0]], dtype=torch.float64)  # p = (1/4, 1/2, 1/4)
ALL = {
    "forward_kl": losses.forward_kl,
    "reverse_kl": losses.reverse_kl,
    "jensen_shannon": losses.jensen_shannon,
    "skewed_forward": lambda *a, **k: losses.skewed_kl(*a, alpha=0.2, **k),
    "skewed_reverse": lambda *a, **k: losses.skewed_kl(*a, alpha=0.2, direction="reverse", **k),
    "symmetric_kl": losses.symmetric_kl,
    "total_variation": losses.total_variation,
    "soft_target_kl": losses.soft_target_kl,
}
each = pytest.mark.parametrize("name", ALL)
rows = hnp.arrays(np.float64, (3, 4), elements=st.floats(-30, 30))


def probabilities(logits, tau=1.0):
    e = np.exp(np.asarray(logits) / tau)  # small logits only: no shift needed
    return e / e.sum(axis=-1, keepdims=True)


def by_hand(name, p, q):
    """The definition on one pair of probability vectors, with plain logs of ratios."""
    kl = lambda a, b: sum(x * math.log(x / y) for x, y in zip(a, b))  # noqa: E731
    mix = lambda w, a, b: [w * x + (1 - w) * y for x, y in zip(a, b)]  # noqa: E731
    return {
        "forward_kl": lambda: kl(p, q),
        "soft_target_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jensen_shannon": lambda: (kl(p, mix(0.5, p, q)) + kl(q, mix(0.5, p, q))) / 2,
        "skewed_forward": lambda: kl(p, mix(0.2, p, q)),
        "skewed_reverse": lambda: kl(q, mix(0.2, q, p)),
        "symmetric_kl": lambda: (kl(p, q) + kl(q, p)) / 2,
        "total_variation": lambda: max(0.0, sum(x - y for x, y in zip(p, q) if x > y)),
    }[name]()


def test_numbers_of_the_ssld_spec():
    assert losses.forward_kl(Z, T).item() == pytest.approx(0.2617239431, abs=1e-10)
    assert losses.reverse_kl(Z, T).item() == pytest.approx(0.2640598388, abs=1e-10)
    assert losses.symmetric_kl(Z, T).item() == pytest.approx(0.2628918910, abs=1e-10)
    assert losses.jensen_shannon(Z, T).item() == pytest.approx(0.0638519664, abs=1e-10)


def test_symmetric_kl_gradient():
    """E2 of the SSLD spec, (p - q + p (ln p/q - KL(p, q))) / 2 with p the student, in 40-digit decimal arithmetic."""
    z = Z.clone().requires_grad_()
    losses.symmetric_kl(z, T).backward()
    expected = torch.tensor([[0.32747926550135910, -0.26296630602712104, -0.06451295947423806]], dtype=torch.float64)
    torch.testing.assert_close(z.grad, expected, atol=1e-15, rtol=0)
    assert z.grad.sum().abs() < 1e-16


def test_forward_kl_of_the_llm_spec():
    p, q = [0.5, 0.3, 0.1, 0.1], [0.6, 0.35, 0.03, 0.02]
    value = losses.forward_kl(torch.tensor([q]).double().log(), torch.tensor([p]).double().log())
    assert value.item() == pytest.approx(0.143935, abs=5e-7)


@each
@pytest.mark.parametrize("tau", [1.0, 2.5])
def test_definition_on_every_row(name, tau):
    generator = np.random.default_rng(3)
    z, t = generator.normal(size=(2, 5, 4))
    p, q = probabilities(t, tau), probabilities(z, tau)
    expected = [by_hand(name, p[i], q[i]) for i in range(5)]
    z, t = torch.from_numpy(z), torch.from_numpy(t)
    unscaled = ALL[name](z, t, tau, scale_by_tau2=False, reduction="none")
    torch.testing.assert_close(unscaled, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=1e-12)
    assert ALL[name](z, t, tau, scale_by_tau2=False).item() == pytest.approx(np.mean(expected), abs=1e-12)
    assert ALL[name](z, t, tau).item() == pytest.approx(tau**2 * np.mean(expected), abs=1e-12)


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_generalised_jsd_weights(beta):
    p, q = probabilities(T[0].numpy()), probabilities(Z[0].numpy())
    m = beta * p + (1 - beta) * q
    expected = beta * np.sum(p * np.log(p / m)) + (1 - beta) * np.sum(q * np.log(q / m))
    assert losses.jensen_shannon(Z, T, beta=beta).item() == pytest.approx(expected, abs=1e-13)


def test_gradients_of_the_llm_spec():
    """dD/dz = (u - q sum u) / tau with the table's u, on a temperature of 2."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, 6, dtype=torch.float64, generator=generator).requires_grad_()
    t = torch.randn(1, 6, dtype=torch.float64, generator=generator)
    tau, b = 2.0, 0.3
    p, q = torch.softmax(t / tau, -1), torch.softmax(z.detach() / tau, -1)
    m, a = b * p + (1 - b) * q, 0.2
    m_forward, m_reverse = a * p + (1 - a) * q, a * q + (1 - a) * p
    table = {
        losses.forward_kl: ({}, -p),
        losses.reverse_kl: ({}, q * ((q / p).log() + 1)),
        losses.jensen_shannon: ({"beta": b}, (1 - b) * q * (q / m).log()),
        losses.total_variation: ({}, 0.5 * q * (q - p).sign()),
    }
    cases = [(f, options, u) for f, (options, u) in table.items()]
    cases.append((losses.skewed_kl, {"alpha": a}, -(1 - a) * p * q / m_forward))
    cases.append(
        (losses.skewed_kl, {"alpha": a, "direction": "reverse"}, q * ((q / m_reverse).log() + 1 - a * q / m_reverse))
    )
    for function, options, u in cases:
        (gradient,) = torch.autograd.grad(function(z, t, tau, scale_by_tau2=False, **options), z)
        torch.testing.assert_close(gradient, (u - q * u.sum()) / tau, atol=1e-12, rtol=1e-10)


@each
@given(z=rows, t=rows)
@settings(max_examples=40, deadline=None)
def test_never_negative_and_zero_at_equality(name, z, t):
    z, t = torch.from_numpy(z), torch.from_numpy(t)
    assert (ALL[name](z, t, reduction="none") >= -1e-14).all()
    assert (ALL[name](t, t, reduction="none").abs() <= 1e-14).all()


@each
@given(z=rows, t=rows, shift=hnp.arrays(np.float64, (3, 1), elements=st.floats(-20, 20)))
@settings(max_examples=40, deadline=None)
def test_shift_invariant(name, z, t, shift):
    z, t, shift = map(torch.from_numpy, (z, t, shift))
    torch.testing.assert_close(ALL[name](z + shift, t - shift), ALL[name](z, t), atol=1e-11, rtol=1e-9)


@given(z=rows, t=rows, beta=st.floats(0.01, 0.99))
@settings(max_examples=60, deadline=None)
def test_bounds_and_symmetries(z, t, beta):
    z, t = torch.from_numpy(z), torch.from_numpy(t)
    entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert (losses.jensen_shannon(z, t, beta=beta, reduction="none") <= entropy + 1e-12).all()
    assert losses.jensen_shannon(z, t) <= math.log(2) + 1e-12
    tv = losses.total_variation(z, t, reduction="none")
    assert ((tv >= 0) & (tv <= 1 + 1e-12)).all()
    forward = losses.forward_kl(z, t, reduction="none")
    assert (tv.square() <= forward / 2 + 1e-10).all()  # Pinsker
    assert (losses.skewed_kl(z, t, alpha=beta, reduction="none") <= -math.log(beta) + 1e-12).all()
    for symmetric in (losses.symmetric_kl, losses.total_variation, losses.jensen_shannon):
        torch.testing.assert_close(symmetric(z, t), symmetric(t, z), atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(
        losses.jensen_shannon(z, t, beta=beta), losses.jensen_shannon(t, z, beta=1 - beta), atol=1e-12, rtol=1e-9
    )
    torch.testing.assert_close(losses.forward_kl(z, t), losses.reverse_kl(t, z), atol=0, rtol=0)


def test_skew_zero_is_the_plain_kl_with_its_gradient():
    z = Z.clone().requires_grad_()
    for direction, plain in (("forward", losses.forward_kl), ("reverse", losses.reverse_kl)):
        skewed = losses.skewed_kl(z, T, alpha=0.0, direction=direction)
        torch.testing.assert_close(skewed, plain(z, T), atol=0, rtol=0)
        torch.testing.assert_close(*(torch.autograd.grad(x, z)[0] for x in (skewed, plain(z, T))), atol=0, rtol=0)


def test_symmetric_kl_is_four_jensen_shannons_near_equality():
    perturbed = T + torch.tensor([[1e-3, 0.0, -1e-3]], dtype=torch.float64)
    ratio = losses.symmetric_kl(perturbed, T) / losses.jensen_shannon(perturbed, T)
    assert ratio.item() == pytest.approx(4.0, rel=1e-5)
    assert losses.symmetric_kl(Z, T) > losses.jensen_shannon(Z, T)


def test_soft_target_kl_is_forward_kl():
    z, t = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))
    for options in ({}, {"scale_by_tau2": False}, {"reduction": "none"}):
        torch.testing.assert_close(
            losses.soft_target_kl(z, t, 3.0, **options), losses.forward_kl(z, t, 3.0, **options), atol=0, rtol=0
        )


def test_batchmean_averages_all_leading_dimensions():
    z, t = torch.randn(2, 3, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    per_row = losses.forward_kl(z, t, reduction="none")
    assert per_row.shape == (3, 7)
    torch.testing.assert_close(losses.forward_kl(z, t), per_row.mean(), atol=1e-14, rtol=0)
    torch.testing.assert_close(losses.forward_kl(z.flatten(0, 1), t.flatten(0, 1)), per_row.mean(), atol=1e-14, rtol=0)


@each
def test_gradcheck_both_arguments(name):
    z, t = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).unbind()
    function = ALL[name]
    assert torch.autograd.gradcheck(
        lambda a, b: function(a, b, 1.7, reduction="none"), (z.clone().requires_grad_(), t.clone().requires_grad_())
    )


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [60.0, 3e4])
def test_extreme_logits_stay_finite(name, dtype, size):
    z = torch.tensor([[size, -size, 0.0], [-size, size, size]], dtype=dtype).requires_grad_()
    t = torch.tensor([[-size, size, 0.0], [size, -size, -size]], dtype=dtype)
    value = ALL[name](z, t)
    value.backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    assert torch.isfinite(z.grad).all()


@each
def test_half_precision_is_computed_in_float32(name):
    z, t = torch.randn(2, 8, 50, generator=torch.Generator().manual_seed(4)).bfloat16()
    torch.testing.assert_close(ALL[name](z, t, 4.0), ALL[name](z.float(), t.float(), 4.0), atol=0, rtol=0)


@each
@pytest.mark.parametrize(
    ("z", "t", "options", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 5), {}, r"teacher_logits has 5 classes .* student_logits has 3"),
        (
            torch.zeros(2, 3),
            torch.zeros(4, 3),
            {},
            r"teacher_logits has shape \(4, 3\) but student_logits",
        ),
        (torch.zeros(3), torch.zeros(3), {}, r"student_logits has shape \(3,\)"),
        (torch.zeros(0, 3), torch.zeros(0, 3), {}, r"student_logits has shape \(0, 3\); it must be a non-empty"),
        (torch.zeros(2, 3), torch.zeros(2, 3).long(), {}, r"teacher_logits has dtype torch.int64"),
        (torch.zeros(2, 3), torch.zeros(2, 3), {"temperature": 0.0}, r"temperature is 0.0; .* above 0"),
        (torch.zeros(2, 3), torch.zeros(2, 3), {"temperature": float("nan")}, r"temperature is nan"),
        (
            torch.zeros(2, 3),
            torch.zeros(2, 3),
            {"reduction": "sum"},
            r"reduction is 'sum'; allowed: 'batchmean'",
        ),
    ],
)
def test_messages(name, z, t, options, message):
    with pytest.raises(ValueError, match=message):
        ALL[name](z, t, **options)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, float("nan")])
def test_jensen_shannon_refuses_the_ends(beta):
    with pytest.raises(ValueError, match=r"beta is .* use forward_kl or reverse_kl"):
        losses.jensen_shannon(Z, T, beta=beta)


def test_skewed_kl_refuses_bad_choices():
    with pytest.raises(ValueError, match=r"alpha is 1.0"):
        losses.skewed_kl(Z, T, alpha=1.0)
    with pytest.raises(ValueError, match=r"direction is 'back'; allowed: 'forward', 'reverse'"):
        losses.skewed_kl(Z, T, direction="back")

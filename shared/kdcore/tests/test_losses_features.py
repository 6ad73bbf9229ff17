"""Feature and attention losses: numpy formulas, invariances, dead features, gradients, extremes, messages."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcore import losses


def pair(*shape, seed=0, dtype=torch.float64):
    return torch.randn(2, *shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).unbind()


def test_hint_mse():
    s, t = torch.tensor([[1.0, 2.0], [0.0, 4.0]]).double(), torch.tensor([[0.0, 0.0], [0.0, 1.0]]).double()
    assert losses.hint_mse(s, t).item() == 14 / 4
    assert losses.hint_mse(s, t, reduction="none").tolist() == [2.5, 4.5]
    s, t = pair(2, 3, 4, 4)
    assert losses.hint_mse(s, t).item() == pytest.approx(np.mean((s.numpy() - t.numpy()) ** 2), abs=1e-14)


def test_cosine_and_normalised_mse_by_numpy():
    s, t = pair(3, 5, 2, 2)
    a, b = s.numpy(), t.numpy()
    cos = np.einsum("bchw,bchw->bhw", a, b) / np.sqrt(np.einsum("bchw->bhw", a**2) * np.einsum("bchw->bhw", b**2))
    per_example = (1 - cos).mean(axis=(1, 2))
    rows = losses.cosine_distance(s, t, dim=1, reduction="none")
    np.testing.assert_allclose(rows.numpy(), per_example, atol=1e-14)
    assert losses.cosine_distance(s, t, dim=1).item() == pytest.approx(per_example.mean(), abs=1e-14)
    assert losses.normalised_mse(s, t, dim=1).item() == pytest.approx(2 * per_example.mean(), abs=1e-13)


@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3))
@settings(max_examples=40, deadline=None)
def test_directions_ignore_scale(seed, scale):
    s, t = pair(3, 6, seed=seed)
    for function, top in ((losses.cosine_distance, 2), (losses.normalised_mse, 4)):
        value = function(s, t)
        torch.testing.assert_close(function(scale * s, t / scale), value, atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(function(t, s), value, atol=1e-14, rtol=0)
        assert 0 <= value <= top
        assert function(s, s * scale).abs() < 1e-14
        assert function(s, -s).item() == pytest.approx(top, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dead_feature_has_distance_one_and_no_gradient(dtype):
    s = torch.zeros(2, 4, dtype=dtype, requires_grad=True)
    t = torch.ones(2, 4, dtype=dtype)
    for function in (losses.cosine_distance, losses.normalised_mse):
        value = function(s, t)
        (gradient,) = torch.autograd.grad(value, s)
        assert value.item() == pytest.approx(1.0)
        assert (gradient == 0).all()


def test_feature_norm():
    s, _ = pair(3, 2, 4)
    expected = np.linalg.norm(s.numpy().reshape(3, -1), axis=1)
    np.testing.assert_allclose(losses.feature_norm(s).numpy(), expected, rtol=1e-14)
    expected = np.abs(s.numpy().reshape(3, -1)).sum(axis=1)
    np.testing.assert_allclose(losses.feature_norm(s, p=1.0).numpy(), expected, rtol=1e-14)
    assert losses.feature_norm(torch.full((1, 70_000), 10.0).half()).item() == pytest.approx(10 * 70_000**0.5, rel=1e-5)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_attention_map_by_numpy(p):
    s, t = pair(2, 3, 4, 5)
    maps = []
    for x in (s.numpy(), t.numpy()):
        q = np.sum(np.abs(x) ** p, axis=1).reshape(2, 20)  # the paper's sum: the mean differs by a constant only
        maps.append(q / np.linalg.norm(q, axis=1, keepdims=True))
    np.testing.assert_allclose(losses.attention_map(s, p=p).numpy(), maps[0], atol=1e-14)
    rows = ((maps[0] - maps[1]) ** 2).mean(axis=1)
    np.testing.assert_allclose(losses.attention_transfer(s, t, p=p, reduction="none").numpy(), rows, atol=1e-15)
    assert losses.attention_transfer(s, t, p=p).item() == pytest.approx(rows.mean(), abs=1e-15)


@given(seed=st.integers(0, 10**6), scale=st.floats(1e-4, 1e4))
@settings(max_examples=30, deadline=None)
def test_attention_ignores_scale_sign_channel_order_and_count(seed, scale):
    s, t = pair(2, 3, 4, 4, seed=seed)
    value = losses.attention_transfer(s, t)
    changed = -scale * s.flip(1).repeat(1, 2, 1, 1)
    torch.testing.assert_close(losses.attention_transfer(changed, t), value, atol=1e-13, rtol=1e-10)
    assert losses.attention_transfer(s, changed).abs() < 1e-14
    norms = losses.attention_map(s).square().sum(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-12, rtol=0)


GRADIENTS = {
    "hint_mse": losses.hint_mse,
    "cosine_distance": lambda s, t: losses.cosine_distance(s, t, dim=1, reduction="none"),
    "normalised_mse": lambda s, t: losses.normalised_mse(s, t, dim=1),
    "feature_norm": lambda s, t: losses.feature_norm(s) - losses.feature_norm(t),
    "attention_transfer": losses.attention_transfer,
    "attention_transfer_p1": lambda s, t: losses.attention_transfer(s, t, p=1.0),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradcheck(name):
    s, t = pair(2, 3, 2, 2, seed=3)
    assert torch.autograd.gradcheck(GRADIENTS[name], (s.clone().requires_grad_(), t.clone().requires_grad_()))


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_features_stay_finite(name, dtype):
    s, t = (1e4 * x for x in pair(2, 3, 2, 2, seed=3, dtype=torch.float32))
    s, t = s.to(dtype), t.to(dtype)
    s[0] = 0
    s.requires_grad_()
    value = GRADIENTS[name](s, t).sum()
    value.backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    assert torch.isfinite(s.grad).all()


def test_attention_of_huge_activations_does_not_overflow():
    s = 1e25 * torch.rand(1, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(losses.attention_map(s), losses.attention_map(s / 1e25))


def test_messages():
    s = torch.zeros(2, 3)
    for function in (losses.hint_mse, losses.cosine_distance, losses.normalised_mse):
        with pytest.raises(ValueError, match=r"teacher has shape \(2, 4\) but student has \(2, 3\)"):
            function(s, torch.zeros(2, 4))
        with pytest.raises(ValueError, match=r"reduction is 'mean'"):
            function(s, s, reduction="mean")
        with pytest.raises(ValueError, match=r"student has dtype torch.int64"):
            function(s.long(), s)
    for dim in (0, 2, -2):
        with pytest.raises(ValueError, match=rf"dim is {dim}"):
            losses.cosine_distance(s, s, dim=dim)
    with pytest.raises(ValueError, match=r"p is 0"):
        losses.feature_norm(s, p=0)
    with pytest.raises(ValueError, match=r"features has shape \(2, 3\); it must be a non-empty \(B, C, H, W\)"):
        losses.attention_map(s)
    with pytest.raises(ValueError, match=r"teacher has shape .* interpolate"):
        losses.attention_transfer(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"p is 0.5"):
        losses.attention_map(torch.zeros(1, 1, 2, 2), p=0.5)

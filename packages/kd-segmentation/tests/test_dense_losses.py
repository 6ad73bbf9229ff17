"""Dense losses against their definitions, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kd_segmentation.engine.losses import (
    AttentionTransfer,
    ChannelKL,
    FeatureMSE,
    PixelKL,
    channel_kl,
    cross_entropy,
    feature_mse,
    ohem_cross_entropy,
    pixel_kl,
)


def maps(seed: int = 0, shape=(2, 3, 4, 5)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]


def test_pixel_kl_is_the_mean_over_pixels():
    student, teacher = maps()
    expected = 0.0
    for b in range(2):
        for i in range(4):
            for j in range(5):
                p, q = (torch.softmax(z[b, :, i, j] / 2.0, 0) for z in (teacher, student))
                expected += float((p * (p / q).log()).sum())
    assert pixel_kl(student, teacher, 2.0).item() == pytest.approx(4 * expected / 40, rel=1e-12)


def test_pixel_kl_counts_only_the_mask():
    student, teacher = maps()
    mask = torch.zeros(2, 4, 5, dtype=torch.bool)
    mask[1, 2, 3] = True
    p, q = (torch.softmax(z[1, :, 2, 3], 0) for z in (teacher, student))
    assert pixel_kl(student, teacher, mask=mask).item() == pytest.approx(float((p * (p / q).log()).sum()))
    assert pixel_kl(student, teacher, mask=torch.zeros_like(mask)).item() == 0


def test_channel_kl_compares_where_a_channel_is_active():
    student, teacher = maps()
    expected = 0.0
    for b in range(2):
        for c in range(3):
            p, q = (torch.softmax(z[b, c].flatten() / 4.0, 0) for z in (teacher, student))
            expected += float((p * (p / q).log()).sum())
    assert channel_kl(student, teacher).item() == pytest.approx(16 * expected / 6, rel=1e-12)
    shift = torch.randn(2, 3, 1, 1, dtype=torch.float64)
    assert channel_kl(student + shift, teacher).item() == pytest.approx(channel_kl(student, teacher).item())


def test_feature_mse():
    student, teacher = maps()
    assert feature_mse(student, teacher).item() == pytest.approx(((student - teacher) ** 2).mean().item())
    units = [z / z.norm(dim=1, keepdim=True) for z in (student, teacher)]
    expected = ((units[0] - units[1]) ** 2).sum(1).mean().item()
    assert feature_mse(3 * student, teacher, normalise=True).item() == pytest.approx(expected)


@pytest.mark.parametrize("loss", [PixelKL(2.0), ChannelKL(3.0), FeatureMSE(), FeatureMSE(normalise=True)])
def test_gradients_and_zero_at_equality(loss):
    student, teacher = maps(shape=(1, 2, 2, 3))
    assert torch.autograd.gradcheck(lambda z: loss(z, teacher), student.requires_grad_())
    assert loss(teacher, teacher).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("function", [pixel_kl, channel_kl, feature_mse])
def test_maps_of_another_shape_are_refused(function):
    student, _ = maps()
    with pytest.raises(ValueError, match="give a connector where the channels differ"):
        function(student, student[:, :2])


def test_cross_entropy_leaves_ignored_pixels_out():
    logits, _ = maps()
    labels = torch.full((2, 4, 5), 255)
    assert cross_entropy(logits, labels).item() == 0
    labels[0, 1, 2] = 1
    expected = -torch.log_softmax(logits[0, :, 1, 2], 0)[1]
    assert cross_entropy(logits, labels).item() == pytest.approx(expected.item())


def logits_with(probabilities: list[float]):
    """Two-class logits (1, 2, 1, N) whose true class, 0, has these probabilities."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    return torch.stack([p.log(), (1 - p).log()])[None, :, None, :], torch.zeros(1, 1, len(p), dtype=torch.long)


def test_ohem_keeps_the_hard_pixels():
    logits, labels = logits_with([0.9, 0.8, 0.75, 0.3])
    loss = ohem_cross_entropy(logits, labels, threshold=0.7, min_kept=2)
    assert loss.item() == pytest.approx((-math.log(0.75) - math.log(0.3)) / 2, abs=1e-12)
    assert loss.item() == pytest.approx(0.7458274384, abs=1e-9)
    assert ohem_cross_entropy(logits, labels, threshold=0.7).item() == pytest.approx(-math.log(0.3))
    everything = ohem_cross_entropy(logits, labels, min_kept=9).item()
    assert everything == pytest.approx(cross_entropy(logits, labels).item())
    ignored = ohem_cross_entropy(logits.requires_grad_(), torch.full_like(labels, 255), min_kept=2)
    ignored.backward()
    assert ignored.item() == 0
    assert logits.grad.abs().sum() == 0


@given(st.integers(1, 12), st.integers(0, 14), st.floats(0.1, 0.95), st.integers(0, 1000))
def test_ohem_is_at_least_the_plain_mean_and_keeps_enough(pixels, kept, threshold, seed):
    generator = torch.Generator().manual_seed(seed)
    logits, labels = logits_with((0.02 + 0.96 * torch.rand(pixels, generator=generator)).tolist())
    plain = cross_entropy(logits, labels).item()
    loss = ohem_cross_entropy(logits, labels, threshold=threshold, min_kept=kept).item()
    if kept > 0 or loss > 0:
        assert loss >= plain - 1e-9  # dropping easy pixels raises the mean


def test_attention_transfer_takes_any_number_of_channels():
    student, _ = maps()
    loss = AttentionTransfer()
    assert loss(student, torch.cat([student, student], 1)).item() == pytest.approx(0, abs=1e-12)
    assert loss(student, student.flip(-1)).item() > 0

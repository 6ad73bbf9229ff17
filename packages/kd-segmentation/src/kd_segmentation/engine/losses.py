"""Dense distillation losses as pure functions, and the modules under which configs name them.

    PixelKL(temperature=1)      KL(softmax(z_t / T) || softmax(z_s / T)) at every pixel, times T^2
                                (pixel-wise distillation, arXiv 1903.04197)
    ChannelKL(temperature=4)    every channel as a distribution over the pixels (arXiv 2011.13256)
    FeatureMSE(normalise=True)  squared error of feature maps
    AttentionTransfer()         energy of each pixel over the channels; channels may differ (arXiv 1612.03928)

Student and teacher maps are (B, C, h, w) of one shape; the teacher's is computed under no_grad.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from kd_segmentation.engine.batch import IGNORE
from kdcore.losses import attention_transfer, hint_mse, normalised_mse, soft_target_kl


def pixel_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0, *, mask: Tensor | None = None) -> Tensor:
    """T^2 KL(softmax(z_t / T) || softmax(z_s / T)) over channels, averaged over pixels (arXiv 1903.04197, eq. 3).

    student, teacher (B, C, h, w) logits; mask (B, h, w), True where a pixel counts -> scalar. No pixel counts: 0.
    Raises ValueError where the shapes differ.
    """
    _same_maps(student, teacher)
    rows = (z.movedim(1, -1).flatten(0, 2) for z in (student, teacher))
    if mask is None:
        return soft_target_kl(*rows, temperature=temperature)
    kept = mask.flatten()
    values = soft_target_kl(*rows, temperature=temperature, reduction="none")
    return (values * kept).sum() / kept.sum().clamp_min(1)


def channel_kl(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Channel-wise distillation (arXiv 2011.13256, eq. 4), averaged over batch and channels.

        phi(y_c) = softmax over pixels of y_c / T,   L = T^2 / (B C) sum_c KL(phi(t_c) || phi(s_c))

    (B, C, h, w) both -> scalar. Raises ValueError where the shapes differ.
    """
    _same_maps(student, teacher)
    return soft_target_kl(student.flatten(0, 1).flatten(1), teacher.flatten(0, 1).flatten(1), temperature=temperature)


def feature_mse(student: Tensor, teacher: Tensor, *, normalise: bool = False) -> Tensor:
    """Mean squared error of feature maps (B, C, h, w); `normalise` compares the unit vectors of each pixel.

    -> scalar: the mean over all entries, or with `normalise` the mean over pixels of ||s/|s| - t/|t|||^2.
    Raises ValueError where the shapes differ.
    """
    _same_maps(student, teacher)
    return normalised_mse(student, teacher, dim=1) if normalise else hint_mse(student, teacher)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the pixels that are not ignored; 0 where there is none. (B, C, H, W), (B, H, W) -> scalar."""
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp_min(1)


def ohem_cross_entropy(logits: Tensor, labels: Tensor, *, threshold: float = 0.7, min_kept: int = 0) -> Tensor:
    """Cross entropy of the hard pixels: those whose true class has a probability of at most max(threshold, p_k).

    p_k is the `min_kept`-th smallest probability of a true class among the pixels that are not ignored, so at least
    `min_kept` pixels are kept (all, where there are fewer). (B, C, H, W), (B, H, W) -> scalar, the mean over the kept.
    """
    values = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")[labels != IGNORE]
    if values.numel() == 0:
        return logits.sum() * 0
    if min_kept < values.numel():
        probability = (-values.detach()).exp()
        limit = probability.new_tensor(threshold)
        if min_kept > 0:
            limit = limit.maximum(probability.kthvalue(min_kept).values)
        values = values[probability <= limit]
    return values.sum() / max(1, values.numel())


def _same_maps(student: Tensor, teacher: Tensor) -> None:
    if student.ndim != 4 or student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher maps are {tuple(student.shape)} and {tuple(teacher.shape)}; "
            "they must be (B, C, h, w) of one shape: give a connector where the channels differ"
        )


def self_similarity(features: Tensor, regions: int = 7) -> Tensor:
    """Cosines between the regions of a map pooled to `regions` x `regions`: (B, C, h, w) -> (B, R, R), R = regions^2.

    A region whose features are all zero has cosine 0 to every region.
    """
    pooled = F.adaptive_avg_pool2d(features, regions).flatten(2)
    unit = pooled / (pooled.square().sum(dim=1, keepdim=True) + 1e-12).sqrt()
    return unit.transpose(1, 2) @ unit


# ---------------------------------------------------------------- under names


class PixelKL(nn.Module):
    """`pixel_kl` with a fixed temperature."""

    def __init__(self, temperature: float = 1.0):
        super().__init__()
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return pixel_kl(student, teacher, self.temperature)


class ChannelKL(nn.Module):
    """`channel_kl` with a fixed temperature."""

    def __init__(self, temperature: float = 4.0):
        super().__init__()
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return channel_kl(student, teacher, self.temperature)


class FeatureMSE(nn.Module):
    """`feature_mse`."""

    def __init__(self, normalise: bool = False):
        super().__init__()
        self.normalise = normalise

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return feature_mse(student, teacher, normalise=self.normalise)


class AttentionTransfer(nn.Module):
    """Where a map is active, whatever its channels (arXiv 1612.03928), of `kdcore.losses`."""

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return attention_transfer(student, teacher)


LOSSES = {
    "PixelKL": PixelKL,
    "ChannelKL": ChannelKL,
    "FeatureMSE": FeatureMSE,
    "AttentionTransfer": AttentionTransfer,
}

"""Where the discriminator of a distilled generator reads its features: four hosts.

    fake_trunk        mid-block of the fake score and a convolutional head; its loss trains the trunk too
                      (arXiv 2405.14867)
    teacher_features  mid-block of the frozen teacher, only the head learns (NVlabs/FastGen)
    channel_mean      mid-block of the fake score averaged over channels, a logit per location, no new parameter
                      (arXiv 2410.14919, 2505.12674)
    own_trunk         a trunk of its own, a copy of the teacher, and the head (arXiv 2502.02088 uses a larger model)

All read samples noised to a time t: D(x_t, t, c) -> logits (B, H). The losses are kdcore's.
"""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from kd_diffusion.engine.conditions import Condition
from kd_diffusion.engine.denoiser import Denoiser
from kdcore.config import Config, OptimizerConfig

Host = Literal["fake_trunk", "teacher_features", "channel_mean", "own_trunk"]


class GANConfig(Config):
    host: Host = Field("fake_trunk", description="whose features the discriminator reads")
    weight_generator: float = Field(5e-3, ge=0, description="lambda_G, on the generator's adversarial term")
    weight_discriminator: float = Field(1e-2, ge=0, description="lambda_D, on the discriminator's loss")
    optimizer: OptimizerConfig | None = Field(
        None, description="of the discriminator as a player of its own, with weight 1; None: it trains with the fake"
    )
    same_noise: bool = Field(False, description="real and fake samples are noised with one t and one e")

    @model_validator(mode="after")
    def _has_something_to_train(self) -> GANConfig:
        if self.host == "channel_mean" and self.optimizer is not None:
            raise ValueError("host channel_mean has no parameters of its own; optimizer must be null")
        return self


class ConvHead(nn.Module):
    """Logits (B, H) from a feature map (B, C, h, w): strided convolutions down to 4x4 or less, then one layer.

    The layout of DMD2's classification branch (4x4 stride 2, GroupNorm of 32, SiLU), without the strides that a map
    of 4x4 and less has no room for.
    """

    def __init__(self, channels: int, size: int):
        super().__init__()
        layers: list[nn.Module] = []
        while size > 4:
            layers += [nn.Conv2d(channels, channels, 4, 2, 1), _norm(channels), nn.SiLU()]
            size //= 2
        layers += [nn.Conv2d(channels, channels, size), _norm(channels), nn.SiLU(), nn.Conv2d(channels, 1, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features).flatten(1)


def _norm(channels: int) -> nn.Module:
    """32 groups as the authors have, fewer where a group would hold under 8 channels: the last map has one pixel, and a
    group of one value is always normalised to zero."""
    groups = next(n for n in range(min(32, max(1, channels // 8)), 0, -1) if channels % n == 0)
    return nn.GroupNorm(groups, channels)


class Discriminator(nn.Module):
    """D(x_t, t, c) on one of the hosts. Trainable is what `parameters()` holds; fake and teacher are not in it."""

    def __init__(
        self, host: Host, fake: Denoiser, teacher: Denoiser, *, shape: tuple[int, int, int], condition: Condition
    ):
        """`shape` (C, H, W) of a sample and `condition` of one sample tell how large the feature map is."""
        super().__init__()
        self.host = host
        self.trunk = copy.deepcopy(teacher).train().requires_grad_(True) if host == "own_trunk" else None
        # A tuple hides the shared networks from this module's parameters.
        self._shared = (teacher if host == "teacher_features" else fake,)
        self.head = None
        if host != "channel_mean":
            channels, size = _feature_shape(self.network, shape, condition)
            self.head = ConvHead(channels, size)

    @property
    def network(self) -> Denoiser:
        return self.trunk if self.trunk is not None else self._shared[0]

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        features = middle_features(self.network, x_t, t, condition)
        return self.logits(features)

    def logits(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, H), float32."""
        if self.head is None:
            return features.float().mean(1).flatten(1)
        return self.head(features.to(next(self.head.parameters()).dtype)).float()


class _Reached(Exception):
    """The middle of the network has its output; the rest of the forward pass is not needed."""


def middle_features(denoiser: Denoiser, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """The output of the network's middle module as a map (B, C, h, w); the network runs no further than that."""
    kept: list[Tensor] = []

    def stop(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        kept.append(_tensor(output))
        raise _Reached

    handle = denoiser.middle.register_forward_hook(stop)
    try:
        denoiser.output(x_t, t, condition)
    except _Reached:
        pass
    finally:
        handle.remove()
    return _as_map(kept[-1], x_t)


def with_middle(denoiser: Denoiser, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
    """(mu, middle features) from one forward pass."""
    kept: list[Tensor] = []
    handle = denoiser.middle.register_forward_hook(lambda module, args, output: kept.append(_tensor(output)))
    try:
        mu = denoiser(x_t, t, condition)
    finally:
        handle.remove()
    return mu, _as_map(kept[-1], x_t)


def _as_map(features: Tensor, x_t: Tensor) -> Tensor:
    """Tokens of a transformer (B, L, C), row by row, as (B, C, h, w); maps as they are."""
    if features.ndim != 3:
        return features
    ratio = x_t.shape[-2] / x_t.shape[-1]
    height = round(math.sqrt(features.shape[1] * ratio))
    return features.transpose(1, 2).reshape(len(features), -1, height, features.shape[1] // height)


def _tensor(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Blocks of joint attention give (text, image)."""
    return output if isinstance(output, Tensor) else output[-1]


def _feature_shape(denoiser: Denoiser, shape: tuple[int, int, int], condition: Condition) -> tuple[int, int]:
    """(channels, height) of the middle features, by one forward on zeros."""
    training = denoiser.training
    t = denoiser.process.at(torch.zeros(1, dtype=torch.int64))
    with torch.no_grad():
        features = middle_features(denoiser.eval(), torch.zeros(1, *shape), t, condition)
    denoiser.train(training)
    return features.shape[1], min(features.shape[2:])

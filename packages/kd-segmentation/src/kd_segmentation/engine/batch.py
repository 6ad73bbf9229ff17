"""What a segmentation distiller gets in a step, and what it asks of a network.

A network is any module with `network(images) -> logits`, (B, 3, H, W) -> (B, C, h, w); h and w may be smaller than the
image. Networks of mmseg are of this kind.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor

IGNORE = 255
"""The label of pixels that no loss and no metric counts."""


@dataclass
class SegBatch:
    """images (B, 3, H, W) as the student takes them; labels (B, H, W) int64, 255 is ignored.

    unlabelled: further streams of images, (U, 3, H, W) each. samples: the images' data samples where mmseg's own
    losses read more than the labels.
    """

    images: Tensor
    labels: Tensor | None = None
    unlabelled: tuple[Tensor, ...] = ()
    samples: list[Any] = field(default_factory=list)


def upsampled(logits: Tensor, size: tuple[int, int] | Tensor, *, align_corners: bool = False) -> Tensor:
    """Logits (B, C, h, w) resized bilinearly to `size`, or to the height and width of a tensor."""
    target = tuple(size.shape[-2:]) if isinstance(size, Tensor) else tuple(size)
    if tuple(logits.shape[-2:]) == target:
        return logits
    return F.interpolate(logits, size=target, mode="bilinear", align_corners=align_corners)

"""Differentiable augmentation of image batches (Zhao and Bilen, arXiv 2102.08259), and cutmix for plain training.

Every operation is differentiable in the image, so that gradients reach learned pixels through it. `siamese` draws one
set of parameters for the whole batch: real and synthetic images in one batch then undergo the same transformation.
Images are those the network sees (normalised); what an operation moves in from outside is 0. Random numbers come from
torch's global generators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdcore.config import Config

Operation = Literal["flip", "color", "crop", "cutout", "scale", "rotate", "translate"]
Draw = Literal["one", "layered"]

BRIGHTNESS, SATURATION, CONTRAST = 1.0, 2.0, 0.5
SHIFT, HOLE, SCALE, ANGLE = 0.125, 0.5, 1.2, 15.0  # shares of the side, factor, degrees


class DSAConfig(Config):
    """Differentiable augmentation. Digits lose their meaning when they are flipped; photographs do not."""

    operations: list[Operation] = Field(default_factory=list, description="operations to draw from; empty: none")
    draw: Draw = Field(
        "one",
        description="one: a single operation of the list for a batch; layered: flip, color and cutout wherever named, "
        "and a single one of the others",
    )


def flip(images: Tensor, u: Tensor) -> Tensor:
    """Horizontal flip with probability 1/2. u (1, n) in [0, 1), n = B or 1 for the whole batch."""
    return torch.where(_column(u[0]) < 0.5, images.flip(3), images)


def color(images: Tensor, u: Tensor) -> Tensor:
    """Brightness x + b, b in +-1/2; saturation times [0, 2); contrast times [1/2, 3/2). u (3, n)."""
    images = images + (_column(u[0]) - 0.5) * BRIGHTNESS
    grey = images.mean(1, keepdim=True)
    images = (images - grey) * (_column(u[1]) * SATURATION) + grey
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * (_column(u[2]) + CONTRAST) + mean


def crop(images: Tensor, u: Tensor) -> Tensor:
    """Shift by up to 1/8 of the side, rows and columns, zeros moving in. u (2, n)."""
    return _shift(_shift(images, u[0], 2), u[1], 3)


def translate(images: Tensor, u: Tensor) -> Tensor:
    """Shift of the columns alone. u (1, n)."""
    return _shift(images, u[0], 3)


def cutout(images: Tensor, u: Tensor) -> Tensor:
    """A hole of half the side, its centre anywhere. u (2, n)."""
    rows, columns = (_hole(u[axis], images.shape[2 + axis]) for axis in (0, 1))
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


def scale(images: Tensor, u: Tensor) -> Tensor:
    """Zoom of each axis by its own factor in (1/1.2, 1.2). u (2, n)."""
    factors = u * (SCALE - 1 / SCALE) + 1 / SCALE
    zero = torch.zeros_like(u[0])
    return _affine(images, [[factors[0], zero, zero], [zero, factors[1], zero]])


def rotate(images: Tensor, u: Tensor) -> Tensor:
    """Rotation by up to 15 degrees. u (1, n)."""
    angle = (u[0] - 0.5) * (2 * ANGLE / 180 * math.pi)
    zero = torch.zeros_like(angle)
    return _affine(images, [[angle.cos(), -angle.sin(), zero], [angle.sin(), angle.cos(), zero]])


OPERATIONS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    "flip": (flip, 1),
    "color": (color, 3),
    "crop": (crop, 2),
    "cutout": (cutout, 2),
    "scale": (scale, 2),
    "rotate": (rotate, 1),
    "translate": (translate, 1),
}
"""Name -> (operation, how many uniform numbers it takes for an image)."""


class DiffAugment:
    """Draws and applies. Called with images (B, C, H, W), gives images of that shape."""

    def __init__(self, operations: Sequence[str], draw: Draw = "one", *, siamese: bool = False):
        self.siamese = siamese
        self.first: list[str] = []
        self.pool, self.last = list(operations), []
        if draw == "layered":
            self.first = [name for name in ("flip", "color") if name in operations]
            self.last = [name for name in ("cutout",) if name in operations]
            self.pool = [name for name in operations if name not in ("flip", "color", "cutout")]

    @classmethod
    def of(cls, config: DSAConfig, *, siamese: bool = False) -> DiffAugment:
        return cls(config.operations, config.draw, siamese=siamese)

    def drawn(self) -> list[str]:
        """The names of the operations of one call, in order."""
        one = [self.pool[int(torch.randint(len(self.pool), ()))]] if self.pool else []
        return [*self.first, *one, *self.last]

    def __call__(self, images: Tensor) -> Tensor:
        return self.alike(images)[0]

    def alike(self, *batches: Tensor) -> list[Tensor]:
        """Several batches under the same draws, for which they need equal lengths or `siamese`."""
        images = list(batches)
        like, count = images[0], 1 if self.siamese else len(images[0])
        for name in self.drawn():
            operation, numbers = OPERATIONS[name]
            u = torch.rand(numbers, count, device=like.device, dtype=like.dtype)
            images = [operation(batch, u) for batch in images]
        return images


def cutmix(images: Tensor, labels: Tensor, num_classes: int, probability: float) -> tuple[Tensor, Tensor]:
    """With `probability`, pastes one random box of partner images into all images (arXiv 1905.04899, alpha = 1).

    images (B, C, H, W), labels (B,) int64 -> images, labels (B,), or (B, num_classes) shares of the area.
    """
    if probability == 0 or float(torch.rand(())) >= probability:
        return images, labels
    height, width = images.shape[2:]
    side = math.sqrt(float(torch.rand(())))  # 1 - lambda is uniform, and is the box's share of the area
    top, bottom = _box(height, side)
    left, right = _box(width, side)
    partner = torch.randperm(len(images), device=images.device)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
    share = (bottom - top) * (right - left) / (height * width)
    hard = F.one_hot(labels, num_classes).to(images.dtype)
    return mixed, (1 - share) * hard + share * hard[partner]


def _box(size: int, share: float) -> tuple[int, int]:
    centre, half = int(torch.randint(size, ())), int(size * share) // 2
    return max(0, centre - half), min(size, centre + half)


def _column(u: Tensor) -> Tensor:
    return u.view(-1, 1, 1, 1)


def _shift(images: Tensor, u: Tensor, axis: int) -> Tensor:
    size = images.shape[axis]
    most = int(size * SHIFT + 0.5)
    offsets = (u * (2 * most + 1)).long() - most
    source = torch.arange(size, device=images.device) + offsets[:, None]  # (n, size)
    inside = (source >= 0) & (source < size)
    source = source.clamp(0, size - 1)
    view = [-1, 1, 1, 1]
    view[axis] = size
    if len(source) == 1:
        moved = images.index_select(axis, source[0])
    else:
        moved = images.gather(axis, source.view(view).expand_as(images))
    return moved.masked_fill(~inside.view(view), 0.0)


def _hole(u: Tensor, size: int) -> Tensor:
    """(n, size) bool, True inside the hole along one axis."""
    hole = int(size * HOLE + 0.5)
    start = (u * (size + 1 - hole % 2)).long() - hole // 2
    position = torch.arange(size, device=u.device)
    return (position >= start[:, None]) & (position < start[:, None] + hole)


def _affine(images: Tensor, rows: list[list[Tensor]]) -> Tensor:
    theta = torch.stack([torch.stack(row, 1) for row in rows], 1).expand(len(images), 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=True)
    return F.grid_sample(images, grid, align_corners=True)

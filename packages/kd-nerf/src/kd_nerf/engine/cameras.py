"""Pinhole cameras, the random ones that a field is distilled from, and the rays of pixels.

Poses are camera-to-world matrices (3, 4) in the convention of Blender and nerfstudio: the camera looks along its -z,
y points up, x to the right. The world's z points up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kdcore.errors import InputError

Poses = Literal["synthetic", "tanks", "llff", "train"]


class Intrinsics(NamedTuple):
    """Of one pinhole camera, in pixels."""

    fx: float
    fy: float
    cx: float
    cy: float
    width: int
    height: int


def look_at(centres: Tensor, target: Tensor) -> Tensor:
    """Poses (N, 3, 4) of cameras at `centres` (N, 3) that look at `target` (3,), upright."""
    back = torch.nn.functional.normalize(centres - target, dim=-1)
    up = torch.tensor([0.0, 0.0, 1.0], dtype=back.dtype, device=back.device).expand_as(back)
    steep = (back * up).sum(-1, keepdim=True).abs() > 1 - 1e-6
    up = torch.where(steep, torch.tensor([0.0, 1.0, 0.0], dtype=back.dtype, device=back.device), up)
    right = torch.nn.functional.normalize(torch.linalg.cross(up, back), dim=-1)
    return torch.stack([right, torch.linalg.cross(back, right), back, centres], dim=-1)


def orbit(azimuth: Tensor, elevation: Tensor, radius: Tensor | float) -> Tensor:
    """Poses on a sphere around the origin, angles in degrees above the horizon, (N,) each."""
    a, e = azimuth.deg2rad(), elevation.deg2rad()
    direction = torch.stack([a.cos() * e.cos(), a.sin() * e.cos(), e.sin()], dim=-1)
    return look_at(direction * torch.as_tensor(radius, dtype=direction.dtype).reshape(-1, 1), direction.new_zeros(3))


def random_poses(kind: Poses, train: Tensor, generator: torch.Generator, *, radius: float = 4.0) -> Tensor:
    """A fresh set of cameras, as the release draws one for every pass over its loader.

    synthetic: for a = 0..79 floor((90 - a) / 15) + 1 cameras between a - 5 and a degrees above the horizon, all around,
    at `radius`. tanks: a = 5..19, one such set, at 0.75 to 1 of `radius`. llff: 30 centres uniform in the box of the
    training cameras' centres, looking at the origin. train: the training cameras themselves, without photographs.

    Args:
        train: poses (N, 3, 4) of the training cameras.

    Raises:
        InputError: an unknown kind, or a radius that is not positive.
    """
    if not radius > 0:
        raise InputError(f"radius = {radius}: must be above 0")
    if kind == "train":
        return train[torch.randperm(len(train), generator=generator)]
    if kind == "llff":
        centres = train[:, :, 3]
        low, high = centres.amin(0), centres.amax(0)
        drawn = low + (high - low) * torch.rand((30, 3), generator=generator).to(low)
        return look_at(drawn, low.new_zeros(3))
    if kind not in ("synthetic", "tanks"):
        raise InputError(f"poses = '{kind}': allowed: 'synthetic', 'tanks', 'llff', 'train'")
    rings = range(80) if kind == "synthetic" else range(5, 20)
    top = torch.tensor([float(a) for a in rings for _ in range((90 - a) // 15 + 1)])
    first = torch.rand(len(top), generator=generator) * 360 - 180
    elevation = top - torch.minimum(top, torch.full_like(top, 5.0)) * torch.rand(len(top), generator=generator)
    near = 1.0 if kind == "synthetic" else 0.75
    distance = radius * (near + (1 - near) * torch.rand(len(top), generator=generator))
    poses = orbit(first, elevation, distance)
    return poses[torch.randperm(len(poses), generator=generator)]


def pixel_rays(pose: Tensor, intrinsics: Intrinsics, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Origins and unit directions (R, 3) of the centres of pixels (R, 2), given as (row, column), of one camera."""
    x = (pixels[:, 1] + 0.5 - intrinsics.cx) / intrinsics.fx
    y = (pixels[:, 0] + 0.5 - intrinsics.cy) / intrinsics.fy
    local = torch.stack([x, -y, -torch.ones_like(x)], dim=-1).to(pose)
    directions = torch.nn.functional.normalize(local @ pose[:, :3].T, dim=-1)
    return pose[:, 3].expand_as(directions), directions


def random_pixels(intrinsics: Intrinsics, count: int, generator: torch.Generator) -> Tensor:
    """`count` pixels (row, column) of an image, drawn with replacement."""
    rows = torch.randint(intrinsics.height, (count,), generator=generator)
    return torch.stack([rows, torch.randint(intrinsics.width, (count,), generator=generator)], dim=1)


def all_pixels(intrinsics: Intrinsics) -> Tensor:
    """Every pixel (H * W, 2), row by row."""
    return torch.cartesian_prod(torch.arange(intrinsics.height), torch.arange(intrinsics.width))


def focal_length(width: int, angle: float) -> float:
    """Pixels, of a horizontal field of view in radians."""
    return 0.5 * width / math.tan(0.5 * angle)


class RandomViews:
    """An endless stream of rays: the cameras of one random set after another, `count` random pixels of each."""

    def __init__(self, kind: Poses, train: Tensor, intrinsics: Intrinsics, *, radius: float = 4.0, seed: int = 0):
        self.kind, self.train, self.intrinsics, self.radius = kind, train, intrinsics, radius
        self.generator = torch.Generator().manual_seed(seed)
        self.pending: list[Tensor] = []
        random_poses(kind, train, torch.Generator().manual_seed(0), radius=radius)  # says now what is wrong

    def rays(self, count: int) -> tuple[Tensor, Tensor]:
        """Origins and directions (count, 3) of one camera."""
        if not self.pending:
            self.pending = list(random_poses(self.kind, self.train, self.generator, radius=self.radius))
        return pixel_rays(
            self.pending.pop().float(), self.intrinsics, random_pixels(self.intrinsics, count, self.generator)
        )

    def state(self) -> dict[str, Tensor]:
        """The generator's state and the poses (N, 3, 4) of the current set that are still to come."""
        pending = torch.stack(self.pending) if self.pending else self.train.new_zeros(0, 3, 4)
        return {"generator": self.generator.get_state(), "pending": pending}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The counterpart of `state`."""
        self.generator.set_state(state["generator"])
        self.pending = list(state["pending"])

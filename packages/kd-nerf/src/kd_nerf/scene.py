"""A scene rendered by its formulas and written to disk in Blender's (NeRF synthetic) format.

Three spheres and a striped box on the origin, inside [-1, 1]^3: rays are intersected exactly, surfaces are Lambertian
with a small highlight that moves with the view, the rest is transparent. Every pixel averages a grid of rays.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from kd_nerf.engine.cameras import Intrinsics, all_pixels, focal_length, orbit, pixel_rays
from kdcore.config import Config
from kdcore.stages import digest, replace_folder

VERSION = 1  # of the formulas below
ANGLE = 0.6911112070083618  # horizontal field of view of the NeRF synthetic scenes, radians
RADIUS = 4.0
SPHERES = (
    # centre, radius, colour
    ((-0.45, -0.35, -0.15), 0.42, (0.85, 0.20, 0.15)),
    ((0.50, -0.20, 0.05), 0.34, (0.15, 0.45, 0.85)),
    ((0.05, 0.50, 0.25), 0.38, (0.95, 0.75, 0.15)),
)
BOX = ((-0.75, -0.75, -0.80), (0.75, 0.75, -0.55))
STRIPES = ((0.20, 0.55, 0.30), (0.90, 0.90, 0.80))
LIGHT = (0.4, -0.5, 0.77)


class SceneConfig(Config):
    """How many views of which size; the scene itself does not change."""

    size: int = Field(48, ge=4, le=1024, description="width and height of the images in pixels")
    train_views: int = Field(40, ge=1, description="training cameras, spread over the upper half sphere")
    test_views: int = Field(6, ge=1, description="test cameras, on a ring")
    supersample: int = Field(3, ge=1, le=8, description="rays per pixel and axis")


def shade(origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """What rays see: colour (R, 3) in [0, 1], zero where they hit nothing, and whether they hit (R,)."""
    best = torch.full_like(origins[:, 0], math.inf)
    normal, albedo = torch.zeros_like(origins), torch.zeros_like(origins)
    for centre, radius, colour in SPHERES:
        to = origins - origins.new_tensor(centre)
        b, c = (to * directions).sum(-1), (to * to).sum(-1) - radius**2
        t = -b - (b * b - c).clamp_min(0).sqrt()
        hit = (b * b > c) & (t > 0) & (t < best)
        best = torch.where(hit, t, best)
        normal = torch.where(hit[:, None], (to + t[:, None] * directions) / radius, normal)
        albedo = torch.where(hit[:, None], origins.new_tensor(colour), albedo)
    low, high = origins.new_tensor(BOX)
    safe = torch.where(directions.abs() < 1e-12, 1e-12, directions)
    first, second = (low - origins) / safe, (high - origins) / safe
    enter, axis = torch.minimum(first, second).max(-1)
    hit = (enter > 0) & (enter < torch.maximum(first, second).amin(-1)) & (enter < best)
    best = torch.where(hit, enter, best)
    face = torch.nn.functional.one_hot(axis, 3) * -directions.sign()
    normal = torch.where(hit[:, None], face.to(normal), normal)
    at = origins + torch.where(best.isfinite(), best, 0.0)[:, None] * directions
    striped = origins.new_tensor(STRIPES)[((at[:, 0] + at[:, 1]) * 3).floor().long() % 2]
    albedo = torch.where(hit[:, None], striped, albedo)
    light = torch.nn.functional.normalize(origins.new_tensor(LIGHT), dim=0)
    lambert = (normal @ light).clamp_min(0)[:, None]
    halfway = torch.nn.functional.normalize(light - directions, dim=-1)
    highlight = 0.25 * (normal * halfway).sum(-1).clamp_min(0)[:, None] ** 20
    seen = best.isfinite()
    return ((albedo * (0.35 + 0.65 * lambert) + highlight).clamp(0, 1)) * seen[:, None], seen


def render(pose: Tensor, config: SceneConfig) -> Tensor:
    """RGBA (size, size, 4) in [0, 1], the colour not multiplied by alpha, of a camera (3, 4)."""
    n, side = config.supersample, config.size * config.supersample
    focal = focal_length(side, ANGLE)
    camera = Intrinsics(focal, focal, side / 2, side / 2, side, side)
    colour, seen = shade(*pixel_rays(pose.double(), camera, all_pixels(camera)))
    blocks = torch.cat([colour, seen[:, None]], dim=1).view(config.size, n, config.size, n, 4)
    mean = blocks.mean((1, 3))
    return torch.cat([mean[..., :3] / mean[..., 3:].clamp_min(1e-9), mean[..., 3:]], dim=-1)


def cameras(config: SceneConfig) -> dict[str, Tensor]:
    """Poses (N, 3, 4) of each split: training views by the golden angle, test views between them on a ring."""
    index = torch.arange(config.train_views, dtype=torch.float64)
    height = 0.05 + 0.9 * (index + 0.5) / config.train_views
    train = orbit(index * 137.50776405, height.asin().rad2deg(), RADIUS)
    turn = (torch.arange(config.test_views, dtype=torch.float64) + 0.37) * 360 / config.test_views
    test = orbit(turn, torch.full_like(turn, 30.0), RADIUS)
    return {"train": train, "val": test, "test": test}


def write_scene(folder: Path, config: SceneConfig) -> None:
    """Renders every view into `folder`: transforms_{train,val,test}.json and RGBA pictures."""
    from kdcore.report.images import png

    poses = cameras(config)
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for index, pose in enumerate(poses[split]):
            pixels = (render(pose, config) * 255).round().byte().numpy()
            (folder / split / f"r_{index}.png").write_bytes(png(np.ascontiguousarray(pixels)))
    for split, views in poses.items():
        stored = "test" if split == "val" else split
        frames = [
            {"file_path": f"./{stored}/r_{index}", "transform_matrix": [*pose.tolist(), [0.0, 0.0, 0.0, 1.0]]}
            for index, pose in enumerate(views)
        ]
        content = {"camera_angle_x": ANGLE, "frames": frames}
        (folder / f"transforms_{split}.json").write_text(json.dumps(content, indent=1))


def provide_scene(folder: Path, config: SceneConfig) -> Path:
    """`folder` with the scene in it, rendered where it is not there yet."""
    mark = digest({"version": VERSION, **config.model_dump(mode="json")})

    def write(target: Path) -> None:
        write_scene(target, config)
        (target / "scene.txt").write_text(mark)

    if not (folder / "scene.txt").is_file() or (folder / "scene.txt").read_text() != mark:
        folder.parent.mkdir(parents=True, exist_ok=True)
        replace_folder(folder, write)
    return folder

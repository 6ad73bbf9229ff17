"""Texture mosaics with exact masks, and shifts of their domain: embedded data for segmentation, from scikit-image.

A class is a texture of one of scikit-image's photographs. A mosaic is a Voronoi tessellation; each cell is a random
crop of a texture with a random scale, quarter turn, gain and tint, and its mask is exact. The shifted domains keep
masks and scenes and change how they are pictured: illumination (a gradient and gamma), blur, noise, colour (a cast and
less contrast), scale (the textures at a size that training does not show).

A broad split stands for what a foundation model was trained on: other photographs among the textures (their pixels are
ignored, 255), all sizes, and most images under one or two of the shifts.

On disk the layout is mmseg's: img_dir/<split>/<name>.png, ann_dir/<split>/<name>.png with class ids.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from kd_segmentation.shifts import corrupt

TEXTURES = ("brick", "grass", "gravel", "coins", "page", "immunohistochemistry")
CLASSES = ("brick", "grass", "gravel", "coins", "page", "tissue")
PALETTE = ((178, 84, 60), (72, 160, 72), (140, 140, 150), (210, 180, 60), (60, 110, 200), (190, 90, 190))
BROAD = ("illumination", "blur", "noise", "colour")  # what images of the broad split are under
SHIFTS = (*BROAD, "scale")
SIZES = {"train": 160, "val": 40, "broad": 800}
DISTRACTORS = (
    *("astronaut", "camera", "cat", "clock", "coffee", "hubble_deep_field", "moon", "retina", "rocket", "text"),
)
VERSION = 3  # of what is drawn; a change draws the pictures again


def splits() -> tuple[str, ...]:
    """train, val, broad, and val under each shift."""
    return (*SIZES, *(f"val_{shift}" for shift in SHIFTS))


def write(root: Path, *, seed: int = 0, size: int = 64, broad: int | None = None) -> Path:
    """Draws all splits into `root` unless it holds them already, atomically; returns `root`.

    broad: how many images the broad split has; None: as SIZES says. The first ones are the same for every number.
    """
    if root.is_dir():
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=root.parent, prefix=".tmp-"))
    try:
        _draw_all(temporary, seed, size, broad)
        os.rename(temporary, root)
    except OSError:
        if not root.is_dir():  # another process was faster: its pictures are the same
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return root


def default_root(seed: int = 0, size: int = 64, broad: int | None = None) -> Path:
    """The folder in kd's cache for these pictures."""
    from kdcore.stages import cache_folder

    return cache_folder() / "texture-mosaics" / f"v{VERSION}-seed{seed}-{size}px-broad{broad or SIZES['broad']}"


def _draw_all(root: Path, seed: int, size: int, broad: int | None) -> None:
    textures = _photographs(*TEXTURES)
    more = [*textures, *_photographs(*DISTRACTORS)]
    sizes = SIZES if broad is None else {**SIZES, "broad": broad}
    for number, (split, count) in enumerate(sizes.items()):
        for index in range(count):
            key = (seed, number, index)
            if split == "broad":
                image, mask = broad_mosaic(np.random.default_rng(key), more, size)
            else:
                image, mask = mosaic(np.random.default_rng(key), textures, size)
            _save(root, split, index, image, mask)
            if split == "val":
                for which, shift in enumerate(SHIFTS):
                    rng = np.random.default_rng((*key, which))
                    if shift == "scale":  # the same scene, drawn with other textures' sizes
                        shifted, _ = mosaic(np.random.default_rng(key), textures, size, scales=(0.45, 0.6))
                    else:
                        shifted = corrupt(image, shift, rng)
                    _save(root, f"val_{shift}", index, shifted, mask)


def _save(root: Path, split: str, index: int, image: np.ndarray, mask: np.ndarray) -> None:
    from PIL import Image

    for folder, pixels in (("img_dir", image), ("ann_dir", mask)):
        target = root / folder / split
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(target / f"{index:04d}.png")


def _photographs(*names: str) -> list[np.ndarray]:
    """RGB float arrays in [0, 1] of scikit-image's photographs."""
    from skimage import data as photographs

    found = []
    for name in names:
        pixels = getattr(photographs, name)().astype(np.float32) / 255
        found.append(np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels)
    return found


def mosaic(
    rng: np.random.Generator, textures: list[np.ndarray], size: int, *, scales: tuple[float, float] = (0.8, 1.2)
) -> tuple[np.ndarray, np.ndarray]:
    """An image (size, size, 3) and its mask (size, size), both uint8.

    Layout and classes depend on the generator alone, not on `scales`.
    """
    cells = int(rng.integers(3, 7))
    centres = rng.uniform(0, size, (cells, 2))
    classes = rng.permutation(np.arange(cells) % len(textures))
    if cells < len(textures):
        classes = rng.choice(len(textures), cells, replace=False)
    grid = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"), -1)
    nearest = ((grid[:, :, None] - centres) ** 2).sum(-1).argmin(-1)
    image = np.zeros((size, size, 3), np.float32)
    for cell, kind in enumerate(classes):
        patch = _patch(rng, textures[kind], size, scales)
        image[nearest == cell] = patch[nearest == cell]
    return np.rint(255 * image.clip(0, 1)).astype(np.uint8), classes[nearest].astype(np.uint8)


def broad_mosaic(rng: np.random.Generator, textures: list[np.ndarray], size: int) -> tuple[np.ndarray, np.ndarray]:
    """`mosaic` of more textures than classes, at all sizes and often under shifts; what is no class is 255.

    A class is drawn as often as two of the others.
    """
    count = len(CLASSES)
    image, kinds = mosaic(rng, [*textures[:count], *textures], size, scales=(0.4, 1.4))
    for kind in rng.permutation(BROAD)[: rng.choice(3, p=(0.25, 0.45, 0.3))]:
        image = corrupt(image, kind, rng)
    return image, np.where(kinds < 2 * count, kinds % count, 255).astype(np.uint8)


def _patch(rng: np.random.Generator, texture: np.ndarray, size: int, scales: tuple[float, float]) -> np.ndarray:
    """A crop of `size` pixels at a random place and scale, turned, brighter or darker and slightly tinted."""
    scale = scales[0] + (scales[1] - scales[0]) * rng.uniform()
    height, width = texture.shape[:2]
    span = min(round(size / scale), height, width)
    top, left = (int(rng.uniform() * (side - span)) for side in (height, width))
    index = (np.arange(size) * span / size).astype(int)
    crop = texture[top : top + span, left : left + span][np.ix_(index, index)]
    crop = np.rot90(crop, int(rng.integers(4)))
    return crop * rng.uniform(0.8, 1.2) * rng.uniform(0.92, 1.08, 3).astype(np.float32)

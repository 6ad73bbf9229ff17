"""Shifts of a picture's domain that leave its mask valid: another illumination, blur, noise, colour, fog, dusk.

A shift is a function of an RGB picture in [0, 1] and of a generator, which draws how it falls out.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def corrupt(image: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """An RGB uint8 picture (H, W, 3) under the shift `kind`, one of CORRUPTIONS."""
    changed = CORRUPTIONS[kind](image.astype(np.float32) / 255, rng)
    return np.rint(255 * changed.clip(0, 1)).astype(np.uint8)


def _illumination(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    height, width = x.shape[:2]
    angle = rng.uniform(0, 2 * np.pi)
    rows, columns = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    ramp = 0.75 + 0.35 * (np.cos(angle) * rows + np.sin(angle) * columns)
    return x ** rng.uniform(1.5, 2.0) * ramp[..., None]


def _blur(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    from skimage.filters import gaussian

    return gaussian(x, sigma=rng.uniform(1.0, 1.5), channel_axis=2)


def _noise(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return x + rng.normal(0, 0.12, x.shape)


def _colour(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    cast = rng.permutation([1.25, 1.0, 0.7])
    return (0.5 + 0.6 * (x - 0.5)) * cast


def _fog(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Thicker towards the top of the picture, where a street scene is far away."""
    depth = np.linspace(1.0, 0.35, x.shape[0])[:, None, None]
    seen = np.exp(-rng.uniform(0.8, 1.6) * depth)
    return x * seen + rng.uniform(0.75, 0.9) * (1 - seen)


def _dusk(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Darker by a power of 2.5, and the noise of a camera that has little light."""
    return x**2.5 + rng.normal(0, 0.03, x.shape)


CORRUPTIONS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "illumination": _illumination,
    "blur": _blur,
    "noise": _noise,
    "colour": _colour,
    "fog": _fog,
    "dusk": _dusk,
}

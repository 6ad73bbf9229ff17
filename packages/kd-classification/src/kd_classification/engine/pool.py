"""Pools of unlabelled images beside a data set: a folder, a file list, or what the training part has left over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from kd_classification.data import Data, Images, load_data
from kd_classification.engine.selection import DuplicateKind, find_duplicates
from kd_classification.sources import IMAGE_SUFFIXES, Split, check_readable, expanded
from kd_classification.transforms import resized
from kdcore.config import Config
from kdcore.errors import InputError

UNLABELLED = -1
"""Label of an image without one: a loss that reads it fails instead of learning nonsense."""


class PoolConfig(Config):
    """Where unlabelled images come from. Folder names are no labels: nothing but the pixels is used."""

    name: Literal["rest", "image_folder", "file_list"] = Field(
        description="rest: the training images that data.per_class leaves out; else images under or listed at `root`"
    )
    root: str | None = Field(
        None, description="image_folder: a folder of any depth; file_list: a text file, one path a line, relative to it"
    )
    out_of_domain: float = Field(
        0.0, ge=0, lt=1, description="name: rest: share of the pool that is made of shifted images times noise"
    )
    duplicates: DuplicateKind = Field("exact", description="how images of the evaluation are found and left out")
    distance: int = Field(4, ge=0, lt=32, description="bits of 64 in which perceptual hashes of duplicates may differ")

    @property
    def path(self) -> Path:
        """`root` with environment variables expanded; InputError when it is missing or a variable is not set."""
        if self.root is None:
            raise InputError(f"pool.root: required for pool.name = '{self.name}'")
        return expanded(self.root, "pool.root")


@dataclass(frozen=True)
class Pool:
    """`images` under the test preprocessing, labels UNLABELLED; `out_of_domain` bool (N,) where that is known."""

    images: Images
    out_of_domain: Tensor | None
    root: Path | None

    def names(self, index: Tensor) -> list[str]:
        """Paths of the images at `index`, relative to the pool's root where they lie under it; empty in memory."""
        paths = self.images.split.paths
        if not paths:
            return [""] * len(index)
        root = self.root or Path()
        chosen = [paths[i] for i in index.tolist()]
        return [(p.relative_to(root) if p.is_relative_to(root) else p).as_posix() for p in chosen]


def load_pool(config: PoolConfig, data: Data, *, seed: int = 0, used: Sequence[Images] = ()) -> Pool:
    """Reads a pool for `data`. `name: rest` leaves out the images of `used` (what teacher and student are given).

    Raises InputError that names the field or the file.
    """
    if config.name == "rest":
        images, flags = _rest(config, data, seed, used)
        return Pool(images, flags, None)
    if config.out_of_domain:
        raise InputError(f"pool.out_of_domain = {config.out_of_domain}: only with pool.name = 'rest'")
    root = config.path
    paths = _folder(root) if config.name == "image_folder" else _file_list(root)
    check_readable(paths)
    split = Split(np.full(len(paths), UNLABELLED), None, paths, data.channels)
    if data.test.split.in_memory:
        split = _in_memory(split, data.image_size)
    return Pool(unlabelled(split, data.test), None, root if root.is_dir() else root.parent)


def unlabelled(split: Split, like: Images) -> Images:
    """Images without labels under the preprocessing of `like`."""
    labels = torch.full((len(split.labels),), UNLABELLED)
    return Images(split, labels, like.transform, (like.mean, like.std))


def union(images: Images, extra: Split) -> Images:
    """The images and those of `extra`, all without labels, under the preprocessing of `images`."""
    own = images.split
    pixels = None
    if own.images is not None and extra.images is not None:
        pixels = torch.cat([own.images, extra.images])
    elif own.images is not None or extra.images is not None:
        raise InputError("pool: its images are in memory and those of the data in files, or the other way round")
    count = len(own.labels) + len(extra.labels)
    return unlabelled(Split(np.full(count, UNLABELLED), pixels, [*own.paths, *extra.paths], own.channels), images)


def _folder(root: Path) -> list[Path]:
    if not root.is_dir():
        raise InputError(f"pool.root = {root}: no such folder")
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise InputError(f"pool.root = {root}: it has no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return paths


def _file_list(path: Path) -> list[Path]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"pool.root = {path}: not a readable file list ({error})") from None
    paths = [path.parent / line.strip() for line in lines if line.strip()]
    if not paths:
        raise InputError(f"pool.root = {path}: the list is empty")
    return paths


def _in_memory(split: Split, size: int) -> Split:
    """The files of a pool as pixels (shorter side resized, centre cropped), for data that is in memory."""
    from torchvision import transforms

    prepare = transforms.Compose([*resized(size), transforms.PILToTensor()])
    pixels = torch.stack([prepare(split.picture(index)) for index in range(len(split.paths))])
    return Split(split.labels, pixels, [], split.channels)


def _rest(config: PoolConfig, data: Data, seed: int, used: Sequence[Images]) -> tuple[Images, Tensor]:
    everything = load_data(data.config.model_copy(update={"per_class": None}), seed).train_plain
    kept = ~find_duplicates(everything, list(used), "exact") if used else torch.ones(len(everything)).bool()
    rest = everything.subset(torch.nonzero(kept).flatten()).split
    if len(rest.labels) == 0:
        raise InputError("pool.name = 'rest': data.per_class leaves no training image for the pool")
    count = round(len(rest.labels) * config.out_of_domain / (1 - config.out_of_domain))
    if count:
        if rest.images is None:
            raise InputError("pool.out_of_domain: only for data in memory (digits, mnist, cifar, idx, npz)")
        pixels = torch.cat([rest.images, distorted(rest.images, count, np.random.default_rng([seed, 23]))])
        rest = Split(np.full(len(pixels), UNLABELLED), pixels, [], rest.channels)
    flags = torch.arange(len(rest.labels)) >= len(rest.labels) - count
    return unlabelled(rest, data.test), flags


def distorted(images: Tensor, count: int, generator: np.random.Generator) -> Tensor:
    """`count` images that belong to no class: images (N, C, H, W) uint8, shifted around the border by a quarter to
    three quarters of each side, times uniform noise of every pixel."""
    height, width = images.shape[-2:]
    result = []
    for source in generator.integers(len(images), size=count).tolist():
        shift = [int(generator.integers(side // 4, 3 * side // 4 + 1)) for side in (height, width)]
        noise = torch.from_numpy(generator.random(images.shape[1:], dtype=np.float32))
        result.append((images[source].roll(shift, dims=(1, 2)) * noise).round().byte())
    return torch.stack(result)

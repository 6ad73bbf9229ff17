"""Data of the diffusion packages: digits of scikit-learn, MNIST, image folders, prompt files, points of a mixture.

`load_data` gives two `Part`s (train, held out) of images in [-1, 1] with labels and prompts; `Samples` turns a part
into dict items for the loop, and `loader` batches them in a seeded order.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset

from kd_diffusion import sources
from kd_diffusion.attributes import AttributeRule, attributes, class_prompts, digit_prompts
from kd_diffusion.worlds.mixture import GaussianMixture, MixtureConfig, spatial
from kdcore.config import Config
from kdcore.data import seeded_loader
from kdcore.errors import InputError

Item = dict[str, Any]


class DataConfig(Config):
    """A source of images, prompts or points."""

    name: Literal["digits", "mnist", "imagefolder", "prompts", "mixture"] = Field("digits", description="the source")
    root: str | None = Field(
        None,
        description="mnist: folder of its IDX files (default $KD_DATA/mnist); imagefolder: the folder; prompts: a file",
    )
    image_size: int | None = Field(
        None, ge=4, description="side of the images; None: 8 of digits, 14 of mnist, and required for imagefolder"
    )
    channels: Literal[1, 3] = Field(3, description="channels of an imagefolder; digits and mnist have 1")
    held_out: float = Field(0.2, ge=0, lt=1, description="share that is held out, of every class")
    size: int = Field(20_000, ge=1, description="points of a mixture")
    mixture: MixtureConfig = Field(default_factory=MixtureConfig, description="the modes of name: mixture")

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> DataConfig:
        if self.name in ("imagefolder", "prompts") and self.root is None:
            raise ValueError(f"needs root for name: {self.name}")
        if self.name == "imagefolder" and self.image_size is None:
            raise ValueError("needs image_size for name: imagefolder")
        if self.name == "digits" and self.image_size not in (None, 8, 16, 32):
            raise ValueError(f"has image_size {self.image_size}; allowed for digits: 8, 16, 32")
        if self.name == "mnist" and self.image_size is not None and not self.image_size <= 28:
            raise ValueError(f"has image_size {self.image_size}; allowed for mnist: 4 to 28")
        if self.name in ("prompts", "mixture") and self.image_size is not None:
            raise ValueError(f"has image_size {self.image_size}; name: {self.name} has no images")
        return self


@dataclass
class Part:
    """N samples: images in memory, (N, C, H, W) float32 in [-1, 1], or as files; int64 labels (N,); prompts.

    A part of prompts alone has neither images nor labels.
    """

    images: Tensor | None = None
    labels: Tensor | None = None
    prompts: list[str] | None = None
    paths: list[Path] = field(default_factory=list)
    image_size: int = 0
    channels: int = 0

    def __len__(self) -> int:
        return next(len(values) for values in (self.images, self.paths or None, self.prompts) if values is not None)

    @property
    def has_images(self) -> bool:
        return self.images is not None or bool(self.paths)

    def read(self, index: Sequence[int] | Tensor) -> Tensor:
        """Images (B, C, H, W) at these places; files are read now. InputError that names a broken file."""
        if self.images is not None:
            return self.images[torch.as_tensor(index)]
        if not self.paths:
            raise InputError("data: it has prompts alone; this needs images")
        return torch.stack([sources.picture(self.paths[int(i)], self.image_size, self.channels) for i in index])

    @cached_property
    def pixels(self) -> Tensor:
        """All images in memory; of an image folder this reads every file once."""
        return self.images if self.images is not None else self.read(range(len(self)))

    def subset(self, index: np.ndarray) -> Part:
        places = torch.from_numpy(index)
        return Part(
            None if self.images is None else self.images[places],
            None if self.labels is None else self.labels[places],
            None if self.prompts is None else [self.prompts[i] for i in index],
            [self.paths[i] for i in index] if self.paths else [],
            self.image_size,
            self.channels,
        )


@dataclass(frozen=True)
class Data:
    """`rule`: how attributes are read off drawn digits, None for other sources. `mixture`: the density of points."""

    train: Part
    held_out: Part
    class_names: list[str]
    config: DataConfig
    image_size: int
    channels: int
    rule: AttributeRule | None = None
    mixture: GaussianMixture | None = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def asked(self) -> Part:
        """Whose conditions evaluations and pictures ask for: the held-out part, or the training part without one."""
        return self.held_out if len(self.held_out) else self.train


def load_data(config: DataConfig, seed: int = 0) -> Data:
    """Reads and splits a source. The held-out share is the same of every class and follows from the seed.

    Raises InputError that names the file or the field.
    """
    part, names, mixture = _SOURCES[config.name](config, seed)
    train, held_out = _split(part, config.held_out, np.random.default_rng([seed, 17]))
    rule = None
    if config.name in ("digits", "mnist"):
        assert train.images is not None
        assert train.labels is not None
        rule = AttributeRule.fit(train.images, train.labels, len(names))
        generator = np.random.default_rng([seed, 29])
        for piece in (train, held_out):
            piece.prompts = digit_prompts(attributes(piece.images, piece.labels, rule), piece.labels, generator)
    return Data(train, held_out, names, config, part.image_size, part.channels, rule, mixture)


Source = tuple[Part, list[str], GaussianMixture | None]


def _digits(config: DataConfig, seed: int) -> Source:
    images, labels = sources.digits()
    return _drawn(images, labels, config.image_size or 8)


def _mnist(config: DataConfig, seed: int) -> Source:
    images, labels = sources.mnist(_expanded(config.root or "$KD_DATA/mnist"))
    return _drawn(images, labels, config.image_size or 14)


def _drawn(images: Tensor, labels: Tensor, size: int) -> Source:
    """Digits with ink in [0, 1], resized (antialiased when reduced) and scaled to [-1, 1]."""
    if images.shape[-1] != size:
        images = interpolate(images, (size, size), mode="bilinear", antialias=size < images.shape[-1])
    images = images.clamp(0, 1) * 2 - 1
    return Part(images, labels, image_size=size, channels=1), [str(label) for label in range(10)], None


def _imagefolder(config: DataConfig, seed: int) -> Source:
    assert config.root is not None
    assert config.image_size is not None
    paths, labels, names = sources.image_folder(_expanded(config.root))
    prompts = class_prompts(labels, names)
    part = Part(None, labels, prompts, paths, config.image_size, config.channels)
    return part, names, None


def _prompts(config: DataConfig, seed: int) -> Source:
    assert config.root is not None
    return Part(prompts=sources.prompts(_expanded(config.root))), [], None


def _mixture(config: DataConfig, seed: int) -> Source:
    mixture = GaussianMixture.of(config.mixture)
    points, modes = mixture.sample(config.size, torch.Generator().manual_seed(seed))
    names = [f"mode {index}" for index in range(len(mixture.means))]
    return Part(spatial(points), modes, image_size=1, channels=2), names, mixture


_SOURCES = {
    "digits": _digits,
    "mnist": _mnist,
    "imagefolder": _imagefolder,
    "prompts": _prompts,
    "mixture": _mixture,
}


def _expanded(path: str) -> Path:
    text = os.path.expandvars(path)
    if "$" in text:
        raise InputError(f"data.root = '{path}': its environment variable is not set")
    return Path(text).expanduser()


def _split(part: Part, fraction: float, generator: np.random.Generator) -> tuple[Part, Part]:
    """(train, held out), with the share taken of every class that has two samples or more."""
    count = len(part)
    labels = np.zeros(count, dtype=np.int64) if part.labels is None else part.labels.numpy()
    held = np.zeros(count, dtype=bool)
    for label in np.unique(labels):
        places = generator.permutation(np.flatnonzero(labels == label))
        share = round(fraction * len(places))
        if fraction > 0 and len(places) > 1:
            share = min(max(1, share), len(places) - 1)
        held[places[:share]] = True
    return part.subset(np.flatnonzero(~held)), part.subset(np.flatnonzero(held))


# ---------------------------------------------------------------- items and batches


class Samples(Dataset[Item]):
    """Items for the loop: `x` (C, H, W) where encoded data `x` (N, C, H, W) is given, else `pixels` where the part has
    images; `class_labels` where it has labels; and `tokens`, such as `input_ids` (N, L) int64, row by row.

    Raises InputError when `x` or a row of tokens is missing for some samples.
    """

    def __init__(self, part: Part, *, x: Tensor | None = None, tokens: Mapping[str, Tensor] | None = None):
        self.part, self.columns = part, dict(tokens or {})
        if x is not None:
            self.columns["x"] = x
        if part.labels is not None:
            self.columns["class_labels"] = part.labels
        for name, values in self.columns.items():
            if len(values) != len(part):
                raise InputError(f"{name}: {len(values)} rows for {len(part)} samples")
        self._reads_pixels = x is None and part.has_images

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> Item:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> Item:
        """A whole batch at once, already collated."""
        places = torch.as_tensor(list(indices))
        batch = {name: values[places] for name, values in self.columns.items()}
        if self._reads_pixels:
            batch["pixels"] = self.part.read(places)
        return batch


def loader(
    samples: Samples, batch_size: int, seed: int = 0, *, shuffle: bool = True, num_workers: int = 0
) -> DataLoader[Item]:
    """Batches of constant size in a seeded order: the incomplete last one is left out when shuffled."""
    return seeded_loader(
        samples,
        batch_size,
        seed=seed,
        shuffle=shuffle,
        drop_last=shuffle,
        num_workers=num_workers,
        collate=collate,
    )


def collate(items: Item | Sequence[Item]) -> Item:
    """A batch that was read whole passes through; a list of items is stacked."""
    return items if isinstance(items, dict) else torch.utils.data.default_collate(list(items))

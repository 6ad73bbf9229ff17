"""Image classification data: embedded digits and textures, plain files (IDX, npz, CSV tables), torchvision, folders.

Every source becomes two or three `Images` data sets (train, test, validation) that give `Batch`es of normalised
float32 images (B, C, H, W), int64 labels (B,) and sample indices (B,).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kd_classification.sources import SOURCES, Source, Split, expanded
from kdcore.config import Config
from kdcore.data import seeded_loader
from kdcore.errors import InputError, did_you_mean


class Batch(NamedTuple):
    """images (B, C, H, W) float, normalised; labels (B,) int64, or (B, K) probabilities after mixup; index (B,)."""

    images: Tensor
    labels: Tensor
    index: Tensor


class AugmentConfig(Config):
    """Training augmentation, by timm's `create_transform`, and its batch-level mixup.

    With a field from `operations` on set, torchvision's transforms are used instead, in this order: crop, operations,
    rotation, shear and zoom, colour jitter, flips, blur, posterize, erasing.
    """

    crop: Literal["none", "pad", "resized", "margin"] = Field(
        "none", description="random crop: of the padded image, resized, or of the image squashed to a size + padding"
    )
    padding: int = Field(4, ge=0, description="pixels of padding for crop: pad and margin")
    scale: tuple[float, float] = Field((0.08, 1.0), description="area share of crop: resized")
    interpolation: Literal["bilinear", "bicubic"] = Field("bilinear", description="how crop: resized fills its pixels")
    hflip: float = Field(0.0, ge=0, le=1, description="probability of a horizontal flip")
    vflip: float = Field(0.0, ge=0, le=1, description="probability of a vertical flip")
    color_jitter: float | list[float] = Field(
        0.0, description="strength of the colour jitter, or brightness, contrast, saturation and optionally hue"
    )
    auto_augment: str | None = Field(None, description="timm policy string, for example rand-m9-n2-mstd0.5")
    erasing: float = Field(0.0, ge=0, le=1, description="probability of random erasing")
    erasing_area: tuple[float, float] = Field((0.02, 1 / 3), description="area share that erasing takes")
    repeats: int = Field(
        1, ge=1, description="copies of an image in a row, each augmented anew; an epoch keeps its length"
    )
    mixup: float = Field(0.0, ge=0, description="alpha of mixup; 0 is off")
    cutmix: float = Field(0.0, ge=0, description="alpha of cutmix; 0 is off")
    smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing, with mixup or cutmix on")
    operations: list[Literal["brightness", "contrast", "saturation", "sharpness", "rotate", "translate"]] = Field(
        default_factory=list, description="operations that are drawn from, each image by a number of its own"
    )
    operations_drawn: int = Field(2, ge=1, description="N, different operations for each image")
    magnitude: float = Field(9.0, ge=0, le=30, description="M: colour factors 1 +- M/30, translation M % of the side")
    operation_angle: float = Field(30.0, ge=0, description="degrees of `rotate` at M = 30")
    rotation: float = Field(0.0, ge=0, le=180, description="random rotation up to +- this, degrees")
    shear: float = Field(0.0, ge=0, lt=90, description="random horizontal shear up to +- this, degrees")
    zoom: tuple[float, float] = Field((1.0, 1.0), description="range of the random scale factor")
    blur: float = Field(0.0, ge=0, le=1, description="probability of a 3x3 Gaussian blur")
    posterize: float = Field(0.0, ge=0, le=1, description="probability of keeping 4 bits of each channel")


class TableConfig(Config):
    """A CSV file with a header: one row an image."""

    file: str = Field(description="CSV file, relative to data.root; environment variables are expanded")
    image: str = Field("image", description="column of the image path, relative to data.root")
    label: str = Field("label", description="column of the class name")
    group: str | None = Field("patient", description="column of the patient; None: every image stands alone")
    equal: tuple[str, str] | None = Field(None, description="two columns; only rows where they agree are kept")
    classes: list[str] | None = Field(None, description="class names in order; None: those found, sorted")


class DataConfig(Config):
    """Where images come from and how they are split, resized and normalised."""

    name: Literal["digits", "textures", "mnist", "cifar10", "cifar100", "image_folder", "idx", "npz", "csv"] = Field(
        "digits", description="source; digits and textures are embedded, the others read `root`"
    )
    root: str | None = Field(None, description="folder or file of the source; environment variables are expanded")
    table: TableConfig | None = Field(None, description="the table of name: csv; its image paths start at root")
    download: bool = Field(False, description="let torchvision download mnist and cifar")
    resize: Literal["crop", "squash"] = Field(
        "crop", description="image files: shorter side and centre crop, or both sides regardless of the aspect ratio"
    )
    crop_pct: float = Field(
        1.0, gt=0, le=1, description="image files, resize: crop: share of the shorter side that test images keep"
    )
    image_size: int | None = Field(None, ge=4, description="side of the square image, pixels; None keeps the source's")
    channels: Literal[1, 3] | None = Field(None, description="1 or 3; None keeps the source's")
    per_class: int | None = Field(None, ge=1, description="training images kept of each class; None keeps all")
    imbalance: float | None = Field(
        None, gt=0, le=1, description="long tail: training images of the last class / of the first, exponential between"
    )
    label_noise: float = Field(
        0.0, ge=0, lt=1, description="share of the training labels replaced by another class; validation stays clean"
    )
    test_fraction: float = Field(0.5, gt=0, lt=1, description="share held out where the source has no test part")
    validation: float = Field(0.0, ge=0, lt=1, description="share of the training images held out for validation")
    mean: list[float] | None = Field(None, description="per-channel mean of [0, 1] images; None is the source's")
    std: list[float] | None = Field(None, description="per-channel deviation; None is the source's")
    augment: AugmentConfig = Field(default_factory=AugmentConfig)

    @property
    def folder(self) -> Path:
        """`root` as a path, environment variables expanded."""
        if self.root is None:
            raise InputError(f"data.root: required for data.name = '{self.name}'")
        return expanded(self.root, "data.root")


class Images(Dataset[Any]):
    """Labelled images with one preprocessing. In-memory sources without augmentation are read a batch at a time."""

    def __init__(self, split: Split, labels: Tensor, transform: Any, normalise: tuple[Tensor, Tensor]):
        self.split, self.labels, self.transform = split, labels, transform
        self.mean, self.std = normalise
        if transform is None:
            self.__getitems__ = self._batch

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        if self.transform is None:
            images, labels, _ = self._batch([index])
            return images[0], int(labels[0]), index
        return self.transform(self.split.picture(index)), int(self.labels[index]), index

    def _batch(self, indices: Sequence[int]) -> Batch:
        index = torch.as_tensor(indices)
        images = self.split.pixels(index).float().div_(255).sub_(self.mean).div_(self.std)
        return Batch(images, self.labels[index], index)

    def subset(self, indices: Tensor) -> Images:
        """The images at `indices`, re-numbered from 0."""
        return Images(self.split.subset(indices), self.labels[indices], self.transform, (self.mean, self.std))

    def relabelled(self, labels: Tensor) -> Images:
        """The same images under other labels (N,)."""
        return Images(self.split, labels, self.transform, (self.mean, self.std))

    def loader(
        self, batch_size: int, *, seed: int = 0, train: bool = False, num_workers: int = 0, repeats: int = 1
    ) -> DataLoader[Any]:
        """Batches in a seeded random order without the incomplete last one (train), or all in order.

        `repeats`: copies of each image in a row, as `AugmentConfig.repeats`.
        """
        size = min(batch_size, len(self)) if train else batch_size
        order = {"seed": seed, "shuffle": train, "drop_last": train, "repeats": repeats}
        return seeded_loader(self, size, **order, num_workers=num_workers, collate=collate)


def collate(items: Any) -> Batch:
    """Items of `Images` as a Batch; a batch that was read whole passes through."""
    if isinstance(items, Batch):
        return items
    images, labels, index = zip(*items, strict=True)
    return Batch(torch.stack(images), torch.tensor(labels), torch.tensor(index))


@dataclass(frozen=True)
class Data:
    """The splits of a source. `validation` is None unless the config holds a share out."""

    train: Images
    test: Images
    validation: Images | None
    class_names: list[str]
    config: DataConfig
    image_size: int
    channels: int
    mean: list[float]
    std: list[float]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def augmented(self, augment: AugmentConfig) -> Data:
        """The same splits under another training augmentation."""
        from kd_classification.transforms import training_transform

        transform = training_transform(augment, self.image_size, self.channels, self.mean, self.std, self.config.resize)
        plain = self.train_plain
        train = plain if transform is None else Images(plain.split, plain.labels, transform, (plain.mean, plain.std))
        return replace(self, train=train, config=self.config.model_copy(update={"augment": augment}))

    @property
    def train_plain(self) -> Images:
        """The training images under the test preprocessing: for statistics and cached teacher outputs."""
        return Images(self.train.split, self.train.labels, self.test.transform, (self.test.mean, self.test.std))


Parts = tuple[Split, Split, Split | None]
"""Training, test and validation part of a source."""


def load_data(config: DataConfig, seed: int = 0, *, parts: Callable[[Source], Parts] | None = None) -> Data:
    """Reads, splits and prepares a source. Raises InputError that names the file or the field.

    `parts` replaces the split by `test_fraction` and `validation`. Images of one group always stay together.
    """
    source = SOURCES[config.name](config)
    size = config.image_size or source.image_size
    channels = config.channels or source.channels
    mean, std = _statistics(config, source.mean, source.std, channels)
    _check_labels(source.train, source.test, source.class_names)
    generator = np.random.default_rng([seed, 17])
    train, test, validation = source.train, source.test, None
    if parts is not None:
        train, test, validation = parts(source)
    else:
        if test is None:
            train, test = _stratified(train, config.test_fraction, np.random.default_rng(17))
        if config.validation:
            train, validation = _stratified(train, config.validation, generator)
    if config.per_class is not None:
        train = _per_class(train, config.per_class, source.class_names, generator)
    if config.imbalance is not None:
        train = _long_tailed(train, config.imbalance, source.class_names, np.random.default_rng([seed, 31]))
    if config.label_noise:
        train = _noisy(train, config.label_noise, len(source.class_names), np.random.default_rng([seed, 37]))
    normalise = (torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1))
    from kd_classification.transforms import evaluation_transform, training_transform

    test_transform = None if test.in_memory else evaluation_transform(size, mean, std, config.resize, config.crop_pct)
    train_transform = training_transform(config.augment, size, channels, mean, std, config.resize) or test_transform

    def images(split: Split, transform: Any) -> Images:
        split = split.prepared(size, channels)
        return Images(split, torch.as_tensor(split.labels), transform, normalise)

    return Data(
        images(train, train_transform),
        images(test, test_transform),
        None if validation is None else images(validation, test_transform),
        source.class_names,
        config,
        size,
        channels,
        mean,
        std,
    )


def _statistics(
    config: DataConfig, mean: Sequence[float], std: Sequence[float], channels: int
) -> tuple[list[float], list[float]]:
    result = []
    for name, given, default in (("mean", config.mean, mean), ("std", config.std, std)):
        values = list(given if given is not None else default)
        if len(values) == 1 or channels == 1:
            values = [sum(values) / len(values)] * channels
        if len(values) != channels:
            raise InputError(f"data.{name} = {given}: {len(values)} values for {channels} channels")
        if name == "std" and min(values) <= 0:
            raise InputError(f"data.std = {given}: must be positive")
        result.append(values)
    return result[0], result[1]


def _check_labels(train: Split, test: Split | None, class_names: Sequence[str]) -> None:
    for part, split in (("training", train), ("test", test)):
        if split is None:
            continue
        if len(split.labels) == 0:
            raise InputError(f"data: the {part} part has no images")
        low, high = int(split.labels.min()), int(split.labels.max())
        if low < 0 or high >= len(class_names):
            raise InputError(
                f"data: label {low if low < 0 else high} in the {part} part is outside the "
                f"{len(class_names)} classes (0 to {len(class_names) - 1})"
            )


def _stratified(split: Split, fraction: float, generator: np.random.Generator) -> tuple[Split, Split]:
    """(rest, held out): the same share of every class; of the groups of every class where there are groups."""
    labels, member = split.labels, np.arange(len(split.labels))
    if split.groups is not None:
        _, labels, member = group_labels(split.groups, split.labels)
    held = []
    for label in np.unique(labels):
        indices = generator.permutation(np.flatnonzero(labels == label))
        held.append(indices[: max(1, round(fraction * len(indices)))])
    mask = np.isin(member, np.concatenate(held))
    return split.subset(torch.from_numpy(np.flatnonzero(~mask))), split.subset(torch.from_numpy(np.flatnonzero(mask)))


def group_labels(groups: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(names (G,) sorted, the most frequent label of each (G,), the group of each image (N,)); ties: lowest label."""
    names, member = np.unique(groups, return_inverse=True)
    counts = np.zeros((len(names), int(labels.max()) + 1), dtype=np.int64)
    np.add.at(counts, (member, labels), 1)
    return names, counts.argmax(1), member


def _per_class(split: Split, count: int, class_names: Sequence[str], generator: np.random.Generator) -> Split:
    chosen = []
    for label, name in enumerate(class_names):
        indices = np.flatnonzero(split.labels == label)
        if len(indices) < count:
            raise InputError(f"data.per_class = {count}: class '{name}' has only {len(indices)} training images")
        chosen.append(generator.permutation(indices)[:count])
    return split.subset(torch.from_numpy(np.sort(np.concatenate(chosen))))


def long_tailed_counts(most: int, imbalance: float, classes: int) -> list[int]:
    """Images of each class in a long-tailed set: N_i = int(N_max f^(i / (C - 1))), as CIFAR-LT is made.

    >>> long_tailed_counts(5000, 0.01, 10)
    [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    """
    return [int(most * imbalance ** (index / max(1, classes - 1))) for index in range(classes)]


def _long_tailed(split: Split, imbalance: float, class_names: Sequence[str], generator: np.random.Generator) -> Split:
    """As many images of class i as `long_tailed_counts` says of the smallest class's number."""
    available = np.bincount(split.labels, minlength=len(class_names))
    chosen = []
    for label, count in enumerate(long_tailed_counts(int(available.min()), imbalance, len(class_names))):
        if count == 0:
            raise InputError(f"data.imbalance = {imbalance}: leaves no training image of class '{class_names[label]}'")
        chosen.append(generator.permutation(np.flatnonzero(split.labels == label))[:count])
    return split.subset(torch.from_numpy(np.sort(np.concatenate(chosen))))


def _noisy(split: Split, share: float, classes: int, generator: np.random.Generator) -> Split:
    """`share` of the labels, drawn at random, moved to another class, all others alike."""
    labels = split.labels.copy()
    chosen = generator.permutation(len(labels))[: round(share * len(labels))]
    labels[chosen] = (labels[chosen] + generator.integers(1, max(2, classes), len(chosen))) % classes
    return replace(split, labels=labels)


def class_index(name: str, class_names: Sequence[str], field: str) -> int:
    """Index of a class by name; InputError that names the config field and the nearest class."""
    if name not in class_names:
        raise InputError(f"{field}: no class '{name}'{did_you_mean(name, class_names)}")
    return list(class_names).index(name)

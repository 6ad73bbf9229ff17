"""The sources of `DataConfig.name`: each reads its files and gives train, test (or None) and what it knows of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from kdcore.errors import InputError
from kdcore.idx import idx_files, read_idx

if TYPE_CHECKING:
    from PIL.Image import Image

    from kd_classification.data import DataConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}


@dataclass
class Split:
    """Images in memory, uint8 (N, C, H, W), or as paths; with int64 labels (N,).

    `groups` (N,) of str, where the source knows them: images of one group (a patient) must not be torn apart.
    """

    labels: np.ndarray
    images: Tensor | None = None
    paths: list[Path] = field(default_factory=list)
    channels: int = 3
    groups: np.ndarray | None = None

    @property
    def in_memory(self) -> bool:
        return self.images is not None

    def pixels(self, index: Tensor) -> Tensor:
        """uint8 (B, C, H, W) of an in-memory split."""
        assert self.images is not None
        return self.images[index]

    def picture(self, index: int) -> Image:
        """One image as a PIL image; InputError that names a file that cannot be read."""
        from PIL import Image

        if self.images is not None:
            pixels = self.images[index].permute(1, 2, 0).numpy()
            return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        try:
            with Image.open(self.paths[index]) as image:
                return image.convert("L" if self.channels == 1 else "RGB")
        except OSError as error:
            raise InputError(f"image {self.paths[index]}: cannot be read ({error})") from None

    def subset(self, indices: Tensor) -> Split:
        images = None if self.images is None else self.images[indices]
        paths = [self.paths[i] for i in indices.tolist()] if self.paths else []
        groups = None if self.groups is None else self.groups[indices.numpy()]
        return Split(self.labels[indices.numpy()], images, paths, self.channels, groups)

    def prepared(self, size: int, channels: int) -> Split:
        """In-memory images at the wanted size and channel count; paths are resized when they are read."""
        if self.images is None:
            return Split(self.labels, None, self.paths, channels, self.groups)
        images = self.images
        if images.shape[-2:] != (size, size):
            resized = interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
            images = resized.round_().clamp_(0, 255).byte()
        if images.shape[1] != channels:
            images = images.expand(-1, 3, -1, -1) if channels == 3 else images.float().mean(1, True).round().byte()
        return Split(self.labels, images.contiguous(), [], channels, self.groups)


@dataclass
class Source:
    train: Split
    test: Split | None
    class_names: list[str]
    image_size: int
    channels: int
    mean: Sequence[float]
    std: Sequence[float]


def expanded(path: str, field: str) -> Path:
    """A path of a config with its environment variables; InputError that names the field when one is not set."""
    text = os.path.expandvars(path)
    if "$" in text:
        raise InputError(f"{field} = '{path}': its environment variable is not set")
    return Path(text).expanduser()


def image_tensor(images: np.ndarray) -> Tensor:
    """uint8 (N, H, W) or (N, H, W, C) -> (N, C, H, W)."""
    tensor = torch.from_numpy(np.ascontiguousarray(images))
    return tensor.unsqueeze(1) if tensor.ndim == 3 else tensor.permute(0, 3, 1, 2)


def digits(config: DataConfig) -> Source:
    """scikit-learn's 1797 digits of 8x8 pixels, 17 grey levels: embedded, nothing to download."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (bunch.images * (255 / 16)).round().astype(np.uint8)
    split = Split(bunch.target.astype(np.int64), image_tensor(images))
    return Source(split, None, [str(c) for c in range(10)], 8, 1, [0.305], [0.376])


def idx(config: DataConfig) -> Source:
    """A folder of plain IDX files, gzipped or not: `train-*` and `t10k-*`, or a single pair that is split."""
    folder = config.folder
    parts = [_idx_pair(folder, prefix) for prefix in ("train", "t10k")]
    found = [part for part in parts if part is not None]
    if not found:
        raise InputError(f"data.root = {folder}: no pair *-images-idx3-ubyte and *-labels-idx1-ubyte (.gz) in it")
    classes = int(max(part.labels.max() for part in found)) + 1
    size = int(found[0].images.shape[-1])  # type: ignore[union-attr]
    test = found[1] if len(found) == 2 else None
    return Source(found[0], test, [str(c) for c in range(classes)], size, 1, [0.1307], [0.3081])


def _idx_pair(folder: Path, prefix: str) -> Split | None:
    files = idx_files(folder, prefix)
    if files is None:
        return None
    images, labels = read_idx(files[0]), read_idx(files[1])
    if len(images) != len(labels):
        raise InputError(f"data: {files[0].name} holds {len(images)} images, {files[1].name} {len(labels)} labels")
    return Split(labels.astype(np.int64), image_tensor(images), channels=1)


def npz(config: DataConfig) -> Source:
    """An npz file: train_images, train_labels and optionally test_images, test_labels, uint8 (N, H, W[, C])."""
    path = config.folder
    try:
        with np.load(path, allow_pickle=False) as arrays:
            content = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"data file {path}: not a readable npz file ({error})") from None
    parts = []
    for part in ("train", "test"):
        if part == "test" and "test_images" not in content:
            parts.append(None)
            continue
        names = [f"{part}_images", f"{part}_labels"]
        missing = [name for name in names if name not in content]
        if missing:
            raise InputError(f"data file {path}: array '{missing[0]}' is missing; it has {', '.join(content)}")
        parts.append(_npz_split(path, names, content[names[0]], content[names[1]]))
    train, test = parts
    assert train is not None
    assert train.images is not None
    classes = int(train.labels.max()) + 1
    mean = (train.images.float().mean((0, 2, 3)) / 255).tolist()
    std = (train.images.float().std((0, 2, 3)) / 255).clamp(min=1e-3).tolist()
    size = int(train.images.shape[-1])
    return Source(train, test, [str(c) for c in range(classes)], size, train.channels, mean, std)


def _npz_split(path: Path, names: Sequence[str], images: np.ndarray, labels: np.ndarray) -> Split:
    labels = labels.reshape(-1)
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        raise InputError(
            f"data file {path}: '{names[0]}' is {images.dtype} {images.shape}; "
            "allowed: uint8 (N, H, W) or (N, H, W, 1|3)"
        )
    if len(images) != len(labels) or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"data file {path}: '{names[1]}' must be {len(images)} integers, is {labels.dtype} {labels.shape}"
        )
    tensor = image_tensor(images)
    return Split(labels.astype(np.int64), tensor, channels=tensor.shape[1])


def _torchvision(name: str) -> Callable[[DataConfig], Source]:
    """MNIST, CIFAR10 and CIFAR100 in torchvision's own layout under `root`."""

    def read(config: DataConfig) -> Source:
        from torchvision import datasets

        kind = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
        parts = []
        for train in (True, False):
            try:
                part = kind(str(config.folder), train=train, download=config.download)
            except (RuntimeError, OSError) as error:
                raise InputError(f"data.root = {config.folder}: torchvision finds no {name} there ({error})") from None
            images = part.data if isinstance(part.data, np.ndarray) else part.data.numpy()
            parts.append(Split(np.asarray(part.targets, dtype=np.int64), image_tensor(images)))
            class_names = [str(c) for c in part.classes]
        if name == "mnist":
            return Source(parts[0], parts[1], class_names, 28, 1, [0.1307], [0.3081])
        return Source(parts[0], parts[1], class_names, 32, 3, [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616])

    return read


def image_folder(config: DataConfig) -> Source:
    """torchvision's ImageFolder layout: root/<class>/*.png, or root/train and root/val (or test) of that layout."""
    root = config.folder
    if not root.is_dir():
        raise InputError(f"data.root = {root}: no such folder")
    if (root / "train").is_dir():
        held_out = next((root / part for part in ("test", "val") if (root / part).is_dir()), None)
        train, names = _folder_split(root / "train", None)
        test = _folder_split(held_out, names)[0] if held_out is not None else None
    else:
        train, names = _folder_split(root, None)
        test = None
    return Source(train, test, names, 224, 3, IMAGENET_MEAN, IMAGENET_STD)


def _folder_split(folder: Path, class_names: list[str] | None) -> tuple[Split, list[str]]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not names:
        raise InputError(f"image folder {folder}: it has no class folders")
    unknown = sorted(set(names) - set(class_names or names))
    if unknown:
        raise InputError(f"image folder {folder}: class folder '{unknown[0]}' is not among the training classes")
    class_names = class_names or names
    paths, labels = [], []
    for label, name in enumerate(class_names):
        if not (folder / name).is_dir():
            continue
        files = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise InputError(f"image folder {folder / name}: it has no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        paths += files
        labels += [label] * len(files)
    check_readable(paths)
    return Split(np.asarray(labels, dtype=np.int64), None, paths), class_names


def check_readable(paths: Sequence[Path], most: int = 20_000) -> None:
    """Opens the header of the images (of an even selection in a large folder), to fail before training starts."""
    from PIL import Image

    for path in paths[:: max(1, len(paths) // most)]:
        try:
            with Image.open(path) as image:
                image.verify()
        except (OSError, SyntaxError, ValueError) as error:
            raise InputError(f"image {path}: cannot be read ({error})") from None


def _grouped(name: str) -> Callable[[DataConfig], Source]:
    """The sources that know groups of images, in `kd_classification.grouped`."""

    def read(config: DataConfig) -> Source:
        from kd_classification import grouped

        return getattr(grouped, name)(config)

    return read


SOURCES: dict[str, Callable[[DataConfig], Source]] = {
    "digits": digits,
    "idx": idx,
    "npz": npz,
    "image_folder": image_folder,
    "csv": _grouped("csv_table"),
    "textures": _grouped("textures"),
    **{name: _torchvision(name) for name in ("mnist", "cifar10", "cifar100")},
}

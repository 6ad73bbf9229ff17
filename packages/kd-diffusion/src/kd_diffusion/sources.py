"""Readers of the files behind `DataConfig.name`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdcore.errors import InputError
from kdcore.idx import idx_files, read_idx

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1797 digits: ink (N, 1, 8, 8) float32 in [0, 1], labels (N,) int64."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return torch.from_numpy(bunch.images / 16).float()[:, None], torch.from_numpy(bunch.target.astype(np.int64))


def mnist(folder: Path) -> tuple[Tensor, Tensor]:
    """Every pair of IDX files of a folder (train-*, t10k-*; .gz or not), ink (N, 1, 28, 28) in [0, 1] and labels."""
    if not folder.is_dir():
        raise InputError(f"data.root = {folder}: no such folder")
    pairs = [pair for pair in (_idx_pair(folder, prefix) for prefix in ("train", "t10k")) if pair is not None]
    if not pairs:
        raise InputError(f"data.root = {folder}: no pair *-images-idx3-ubyte and *-labels-idx1-ubyte (.gz) in it")
    images, labels = (np.concatenate(part) for part in zip(*pairs, strict=True))
    return torch.from_numpy(images).float()[:, None] / 255, torch.from_numpy(labels.astype(np.int64))


def _idx_pair(folder: Path, prefix: str) -> tuple[np.ndarray, np.ndarray] | None:
    files = idx_files(folder, prefix)
    if files is None:
        return None
    images, labels = (read_idx(path) for path in files)
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise InputError(f"data file {files[1]}: {labels.shape} labels for images of shape {images.shape}")
    return images, labels


def image_folder(root: Path) -> tuple[list[Path], Tensor, list[str]]:
    """(files, labels (N,), class names) of a folder of class folders, in torchvision's order."""
    from torchvision.datasets.folder import find_classes, make_dataset

    if not root.is_dir():
        raise InputError(f"data.root = {root}: no such folder")
    try:
        names, index = find_classes(root)
        found = make_dataset(str(root), index, extensions=IMAGE_SUFFIXES)
    except FileNotFoundError as error:
        raise InputError(f"data.root = {root}: not a folder of class folders with images ({error})") from None
    return [Path(path) for path, _ in found], torch.tensor([label for _, label in found]), names


def picture(path: Path, size: int, channels: int) -> Tensor:
    """One image file, its shorter side resized to `size` and the centre cropped: (C, size, size) in [-1, 1]."""
    from PIL import Image
    from torchvision.transforms import functional as T

    try:
        with Image.open(path) as image:
            image = image.convert("L" if channels == 1 else "RGB")
    except OSError as error:
        raise InputError(f"image {path}: cannot be read ({error})") from None
    image = T.center_crop(T.resize(image, size, antialias=True), [size, size])
    return T.to_tensor(image) * 2 - 1


def prompts(path: Path) -> list[str]:
    """The lines of a UTF-8 text file that are not blank."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"data.root = {path}: not a readable UTF-8 text file ({error})") from None
    lines = [line for line in lines if line]
    if not lines:
        raise InputError(f"data.root = {path}: no prompt in it; it has one prompt a line")
    return lines

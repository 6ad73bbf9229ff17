"""Synthetic image sets: a few images per class on which any network can be trained. How they are stored and decoded.

A saved set is a folder:

    synthetic.safetensors    images (N, C, H, W) float32, labels (N,) int64; with whitening its mean and matrix
    synthetic.json           class names, factor, mean and std of the network's input, the learned rate, who made it
    images/<class>/0000.png  what `torchvision.datasets.ImageFolder` reads: the decoded images, 8 bits, clipped

`images` are pixels, visible from 0 to 1; methods that do not keep to this range store what lies beyond it, too. With a
multi-formation factor r (Kim et al., arXiv 2205.14959), each stored image is r x r tiles, each tile an image.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from kd_classification import __version__
from kdcore.checkpoint import load_weights
from kdcore.errors import InputError

TENSORS, META, PICTURES, VERSION = "synthetic.safetensors", "synthetic.json", "images", 1


def decode(images: Tensor, factor: int) -> Tensor:
    """Every image (N, C, H, W) cut into factor x factor tiles, each enlarged to (H, W): (factor^2 N, C, H, W).

    Tile-major: all images' tile (0, 0), then all images' tile (0, 1), and so on. Bilinear, linear in the image. Where
    the side is not divisible, the image is first padded below and on the right with 1/2.
    """
    if factor == 1:
        return images
    height, width = images.shape[-2:]
    padded = F.pad(images, (0, -width % factor, 0, -height % factor), value=0.5)
    count, channels, rows, columns = padded.shape
    tiles = padded.reshape(count, channels, factor, rows // factor, factor, columns // factor)
    tiles = tiles.permute(2, 4, 0, 1, 3, 5).reshape(-1, channels, rows // factor, columns // factor)
    return F.interpolate(tiles, size=(height, width), mode="bilinear", align_corners=False)


def decoded_labels(labels: Tensor, factor: int) -> Tensor:
    """Labels (N,) of `decode`'s images, (factor^2 N,)."""
    return labels.repeat(factor**2)


def encode(images: Tensor, factor: int) -> Tensor:
    """factor^2 N images (in `decode`'s order) reduced and tiled into N; the start of a multi-formation set."""
    if factor == 1:
        return images
    total, channels, height, width = images.shape
    rows, columns = -(-height // factor), -(-width // factor)
    small = F.interpolate(images, size=(rows, columns), mode="area")
    small = small.reshape(factor, factor, total // factor**2, channels, rows, columns)
    return small.permute(2, 3, 0, 4, 1, 5).reshape(-1, channels, factor * rows, factor * columns)[..., :height, :width]


@dataclass(frozen=True)
class Whitening:
    """ZCA: inputs = (pixels - mean) matrix, over flattened images. mean (D,), matrix and inverse (D, D)."""

    mean: Tensor
    matrix: Tensor
    inverse: Tensor

    @classmethod
    def fit(cls, pixels: Tensor, eps: float = 0.1) -> Whitening:
        """From images (N, C, H, W): matrix U (S + eps)^-1/2 U^T of the covariance U S U^T."""
        flat = pixels.flatten(1)
        mean = flat.mean(0)
        centred = flat - mean
        values, vectors = torch.linalg.eigh(centred.T @ centred / (len(flat) - 1))
        root = (values.clamp_min(0) + eps).sqrt()
        return cls(mean, vectors / root @ vectors.T, vectors * root @ vectors.T)


class Preprocessing(nn.Module):
    """Pixels in [0, 1] (B, C, H, W) to what networks see and back: (x - mean) / std, or ZCA whitening."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], whitening: Whitening | None = None):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.whitened = whitening is not None
        for name in ("mean", "matrix", "inverse"):
            value = getattr(whitening, name) if whitening is not None else None
            self.register_buffer(f"zca_{name}", value, persistent=False)

    def inputs(self, pixels: Tensor) -> Tensor:
        if not self.whitened:
            return (pixels - self.mean) / self.std
        return ((pixels.flatten(1) - self.zca_mean) @ self.zca_matrix).view_as(pixels)

    def pixels(self, inputs: Tensor) -> Tensor:
        if not self.whitened:
            return inputs * self.std + self.mean
        return (inputs.flatten(1) @ self.zca_inverse + self.zca_mean).view_as(inputs)

    @property
    def whitening(self) -> Whitening | None:
        return Whitening(self.zca_mean, self.zca_matrix, self.zca_inverse) if self.whitened else None


class SyntheticSet(Dataset[tuple[Tensor, int]]):
    """A set of images that decodes on read: item i is (input (C, H, W) float32 for a network, class index).

    `SyntheticSet.load(folder)` reads a saved one; `tensors()` gives the whole decoded set for a loop that keeps it in
    memory. `rate` is the learning rate that was learned with the images, or None.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        class_names: Sequence[str],
        preprocessing: Preprocessing,
        *,
        factor: int = 1,
        rate: float | None = None,
    ):
        self.images, self.labels = images.detach().cpu().float(), labels.detach().cpu().long()
        self.class_names, self.factor, self.rate = list(class_names), factor, rate
        self.preprocessing = preprocessing.cpu()

    def __len__(self) -> int:
        return len(self.images) * self.factor**2

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a set of {len(self)} images")
        tile, image = divmod(index, len(self.images))
        decoded = decode(self.images[image : image + 1], self.factor)[tile : tile + 1]
        return self.preprocessing.inputs(decoded)[0], int(self.labels[image])

    def tensors(self) -> tuple[Tensor, Tensor]:
        """(inputs (M, C, H, W), labels (M,)) of all M decoded images."""
        return self.preprocessing.inputs(decode(self.images, self.factor)), decoded_labels(self.labels, self.factor)

    def pictures(self) -> Tensor:
        """The decoded images as uint8 (M, C, H, W), clipped to what is visible."""
        return decode(self.images, self.factor).mul(255).round().clamp(0, 255).byte()

    # ------------------------------------------------------------ files

    def save(self, folder: Path, *, made_by: str = "") -> None:
        """Writes the folder described in the module. `folder` exists."""
        tensors = {"images": self.images.contiguous(), "labels": self.labels.contiguous()}
        whitening = self.preprocessing.whitening
        if whitening is not None:
            tensors |= {f"zca_{name}": getattr(whitening, name).contiguous() for name in ("mean", "matrix", "inverse")}
        save_file(tensors, folder / TENSORS)
        meta = {
            "format": VERSION,
            "class_names": self.class_names,
            "factor": self.factor,
            "mean": self.preprocessing.mean.flatten().tolist(),
            "std": self.preprocessing.std.flatten().tolist(),
            "whitened": self.preprocessing.whitened,
            "rate": self.rate,
            "made_by": made_by,
            "kd_classification": __version__,
        }
        (folder / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        self.save_pictures(folder / PICTURES)

    def save_pictures(self, root: Path) -> None:
        """torchvision's ImageFolder layout: one folder a class, named as the class."""
        from PIL import Image

        pictures, labels = self.pictures(), decoded_labels(self.labels, self.factor)
        for label, name in enumerate(self.class_names):
            place = root / name.replace("/", "_")
            place.mkdir(parents=True, exist_ok=True)
            for number, picture in enumerate(pictures[labels == label]):
                array = picture.permute(1, 2, 0).numpy()
                Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(place / f"{number:04d}.png")

    @classmethod
    def load(cls, folder: Path) -> SyntheticSet:
        """A saved set. Raises InputError that names a missing or broken file."""
        folder = Path(folder)
        tensors = load_weights(folder / TENSORS)
        try:
            meta = json.loads((folder / META).read_text(encoding="utf-8"))
            if meta["format"] != VERSION:
                raise InputError(f"synthetic set {folder}: format {meta['format']}, this version reads {VERSION}")
            whitening = None
            if meta["whitened"]:
                whitening = Whitening(*(tensors[f"zca_{name}"] for name in ("mean", "matrix", "inverse")))
            preprocessing = Preprocessing(meta["mean"], meta["std"], whitening)
            images, labels, names = tensors["images"], tensors["labels"], meta["class_names"]
            return cls(images, labels, names, preprocessing, factor=meta["factor"], rate=meta["rate"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"synthetic set {folder}: {META} or {TENSORS} is not a saved set ({error!r})") from None


class LearnableImages(nn.Module):
    """Images (classes * per_class, C, H, W) as one parameter, sorted by class, and their fixed labels.

    One parameter, so that an optimiser's state is shared by the classes, as the released methods have it.
    """

    def __init__(self, images: Tensor, labels: Tensor):
        super().__init__()
        self.images = nn.Parameter(images.detach().clone())
        self.register_buffer("labels", labels.detach().clone())
        self.per_class = int((labels == labels[0]).sum())
        expected = torch.arange(len(labels) // self.per_class).repeat_interleave(self.per_class).to(labels)
        if not torch.equal(labels, expected):
            raise InputError("labels: expected the same number of images for every class, sorted by class")

    def of_class(self, label: int) -> Tensor:
        """The images of one class, (per_class, C, H, W), with the graph to the parameter."""
        return self.images[label * self.per_class : (label + 1) * self.per_class]

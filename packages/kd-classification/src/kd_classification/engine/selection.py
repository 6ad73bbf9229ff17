"""Choosing from unlabelled images: confident predictions, and no image that the evaluation uses.

`select_top_k` keeps the k most confident images of each predicted class (SSLD, arXiv 2103.05959); `find_duplicates`
says which images of a pool also are, exactly or nearly, in another set.
"""

from __future__ import annotations

import csv
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset

from kd_classification.data import Images
from kd_classification.sources import Split
from kdcore.errors import InputError
from kdcore.stages import write_atomically

DuplicateKind = Literal["none", "exact", "average", "difference"]
SelectionRule = Literal["top_k", "random", "all"]

# ---------------------------------------------------------------- confidence


@dataclass(frozen=True)
class Selection:
    """What was chosen from a pool: index (M,) in the pool, predicted class (M,), score (M,), and for a pool that
    knows it, which images are out of the domain: bool (M,) or None."""

    index: Tensor
    classes: Tensor
    scores: Tensor
    out_of_domain: Tensor | None = None


@torch.no_grad()
def score_images(
    model: nn.Module, images: Images, *, batch_size: int = 256, num_workers: int = 0, device: Any = "cpu"
) -> tuple[Tensor, Tensor]:
    """(s, c) = (max_k q_k, argmax_k q_k) of every image, float32 (N,) and int64 (N,) on the CPU; `model` in eval mode.

    Keeps two numbers an image, so a pool of any size fits.
    """
    was_training, model = model.training, model.to(device).eval()
    scores, classes = [], []
    for batch in images.loader(batch_size, num_workers=num_workers):
        score, label = model(batch.images.to(device)).float().softmax(dim=1).max(dim=1)
        scores.append(score.cpu())
        classes.append(label.cpu())
    model.train(was_training)
    if not scores:
        return torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    return torch.cat(scores), torch.cat(classes)


def select_top_k(scores: Tensor, classes: Tensor, k: int) -> Tensor:
    """Indices of the k largest scores of each predicted class, ascending (SSLD, arXiv 2103.05959, data selection).

    scores float (N,), classes integer (N,) -> int64 (M,), M <= k * number of classes. A class with fewer than k images
    gives all of them. Of equal scores the lower index wins. Raises InputError for k < 1, shapes that differ or scores
    that are not finite.

    >>> select_top_k(torch.tensor([0.9, 0.5, 0.7, 0.6, 0.8]), torch.tensor([0, 0, 0, 1, 1]), 2).tolist()
    [0, 2, 3, 4]
    """
    if k < 1:
        raise InputError(f"k = {k}: must be at least 1")
    if scores.ndim != 1 or scores.shape != classes.shape:
        raise InputError(f"scores {tuple(scores.shape)} and classes {tuple(classes.shape)}: must be one (N,)")
    if not bool(torch.isfinite(scores).all()):
        raise InputError(f"scores: {int((~torch.isfinite(scores)).sum())} of {len(scores)} are not finite")
    # two stable sorts: by score, then by class, so that ties keep the order of the indices
    order = torch.argsort(scores, descending=True, stable=True)
    order = order[torch.argsort(classes[order], stable=True)]
    _, counts = torch.unique_consecutive(classes[order], return_counts=True)
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    rank = torch.arange(len(order)) - starts
    return order[rank < k].sort().values


def choose(
    index: Tensor, scores: Tensor, classes: Tensor, k: int, *, rule: SelectionRule = "top_k", seed: int = 0
) -> Selection:
    """The selection by `rule` among scored images (N,) whose numbers in the pool are `index`.

    top_k: the k most confident of each predicted class; random: as many, drawn at random; all: every image.

    Raises InputError when there is no image.
    """
    if len(index) == 0:
        raise InputError("pool: no image is left in it; all are duplicates of evaluation images")
    kept = torch.arange(len(index)) if rule == "all" else select_top_k(scores, classes, k)
    if rule == "random":
        drawn = np.random.default_rng([seed, 29]).permutation(len(index))[: len(kept)]
        kept = torch.from_numpy(np.sort(drawn))
    return Selection(index[kept], classes[kept], scores[kept])


# ---------------------------------------------------------------- duplicates


def average_hash(images: Tensor) -> Tensor:
    """Average hash: which pixels of the grey image at 8x8 are above its mean.

    images (N, C, H, W), any real type -> bool (N, 64). Survives resizing, re-encoding and a change of contrast.
    """
    cells = _cells(images, (8, 8)).flatten(1)
    return cells > cells.mean(dim=1, keepdim=True)


def difference_hash(images: Tensor) -> Tensor:
    """Difference hash: which pixels of the grey image at 8x9 are brighter than their left neighbour.

    images (N, C, H, W), any real type -> bool (N, 64). Looks at edges, `average_hash` at areas.
    """
    cells = _cells(images, (8, 9))
    return (cells[:, :, 1:] > cells[:, :, :-1]).flatten(1)


def _cells(images: Tensor, size: tuple[int, int]) -> Tensor:
    """The grey images at `size`, (N, *size) float64; the antialiasing filter makes it independent of the resolution."""
    grey = images.double().mean(dim=1, keepdim=True)
    return interpolate(grey, size, mode="bilinear", antialias=True).squeeze(1)


def within_distance(pool: Tensor, other: Tensor, distance: int) -> Tensor:
    """Which rows of `pool` (N, B) bool differ from some row of `other` (M, B) in at most `distance` bits: bool (N,)."""
    if len(other) == 0:
        return torch.zeros(len(pool), dtype=torch.bool)
    # the inner product of +-1 vectors is B - 2 * (bits that differ), exact in float32
    signs = other.float().mul(2).sub(1).T.contiguous()
    bits, chunk = pool.shape[1], max(1, 2**24 // len(other))
    found = [(part.float().mul(2).sub(1) @ signs).amax(dim=1) >= bits - 2 * distance for part in pool.split(chunk)]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.bool)


def find_duplicates(
    pool: Images, others: list[Images], kind: DuplicateKind, *, distance: int = 4, num_workers: int = 0
) -> Tensor:
    """Which images of `pool` also are in one of `others`: bool (N,).

    kind "exact": the same pixels (SHA-256 of the decoded image). "average" and "difference": a perceptual hash within
    `distance` of 64 bits. "none": nothing is compared.
    """
    if kind == "none":
        return torch.zeros(len(pool), dtype=torch.bool)
    own = fingerprints(pool, kind, num_workers=num_workers)
    other = np.concatenate([fingerprints(images, kind, num_workers=num_workers) for images in others])
    if kind == "exact":
        known = {row.tobytes() for row in other}
        return torch.tensor([row.tobytes() in known for row in own], dtype=torch.bool)
    return within_distance(torch.from_numpy(own), torch.from_numpy(other), distance)


def fingerprints(images: Images, kind: DuplicateKind, *, num_workers: int = 0) -> np.ndarray:
    """(N, 32) uint8 SHA-256 of the pixels (kind "exact"), or (N, 64) bool of a perceptual hash."""
    rows = list(DataLoader(_Fingerprints(images.split, kind), batch_size=256, num_workers=num_workers))
    width, dtype = (32, np.uint8) if kind == "exact" else (64, np.bool_)
    return torch.cat(rows).numpy() if rows else np.zeros((0, width), dtype=dtype)


class _Fingerprints(Dataset[Tensor]):
    """The hash of each image, so that workers of a DataLoader decode in parallel."""

    def __init__(self, split: Split, kind: DuplicateKind):
        self.split, self.kind = split, kind

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, index: int) -> Tensor:
        if self.split.images is not None:
            pixels = self.split.images[index]
        else:
            array = np.array(self.split.picture(index))
            pixels = torch.from_numpy(array if array.ndim == 3 else array[:, :, None]).permute(2, 0, 1)
        if self.kind == "exact":
            content = f"{tuple(pixels.shape)}".encode() + pixels.contiguous().numpy().tobytes()
            return torch.from_numpy(np.frombuffer(hashlib.sha256(content).digest(), np.uint8).copy())
        return (average_hash if self.kind == "average" else difference_hash)(pixels.unsqueeze(0))[0]


# ---------------------------------------------------------------- the list of what was chosen

COLUMNS = ["index", "path", "class", "score", "out_of_domain"]


def write_selection(path: Path, selection: Selection, names: list[str]) -> None:
    """The selection as CSV; `names` (M,) are the images' paths, empty for a pool that has no files."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    flags = [""] * len(selection.index)
    if selection.out_of_domain is not None:
        flags = [str(int(flag)) for flag in selection.out_of_domain]
    columns = (selection.index.tolist(), names, selection.classes.tolist(), selection.scores.tolist(), flags)
    writer.writerows((i, name, c, f"{s:.6f}", flag) for i, name, c, s, flag in zip(*columns, strict=True))
    write_atomically(path, text.getvalue())


def read_selection(path: Path, *, size: int | None = None) -> Selection:
    """The counterpart of `write_selection`. Raises InputError that names the line that cannot be read, or an index
    outside a pool of `size` images."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"selection {path}: cannot be read ({error})") from None
    values: list[tuple[int, int, float, str]] = []
    for number, row in enumerate(rows, start=2):
        try:
            index, flag = int(row["index"]), row["out_of_domain"]
            values.append((index, int(row["class"]), float(row["score"]), flag))
        except (KeyError, TypeError, ValueError):
            raise InputError(f"selection {path}, line {number}: expected the columns {', '.join(COLUMNS)}") from None
        if index < 0 or (size is not None and index >= size):
            raise InputError(f"selection {path}, line {number}: index {index} is outside the pool of {size} images")
    index, classes, scores, flags = cast(Any, zip(*values) if values else ((), (), (), ()))
    known = torch.tensor([flag == "1" for flag in flags], dtype=torch.bool)
    return Selection(
        torch.tensor(index, dtype=torch.int64),
        torch.tensor(classes, dtype=torch.int64),
        torch.tensor(scores, dtype=torch.float32),
        None if "" in flags else known,
    )

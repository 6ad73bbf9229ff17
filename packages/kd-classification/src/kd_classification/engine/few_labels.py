"""A target task with few labels: its labelled and unlabelled images in pairs, and images changed into other tasks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from kd_classification.data import Batch, Data, Images, collate
from kd_classification.engine.pool import UNLABELLED
from kdcore.errors import InputError

Change = Literal["none", "rotate", "invert", "permute", "shuffle_labels"]


class Pair(NamedTuple):
    """A labelled and an unlabelled batch of one step."""

    labelled: Batch
    unlabelled: Batch


class Pairs(Dataset[Any]):
    """Item i: unlabelled image i and a labelled one drawn at random. In-memory images are read a batch at a time."""

    def __init__(self, labelled: Images, unlabelled: Images):
        self.labelled, self.unlabelled = labelled, unlabelled
        if labelled.transform is None:
            self.__getitems__ = self._batch

    def __len__(self) -> int:
        return len(self.unlabelled)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        drawn = int(torch.randint(len(self.labelled), ()))
        return self.labelled[drawn], self.unlabelled[index]

    def _batch(self, indices: list[int]) -> Pair:
        drawn = torch.randint(len(self.labelled), (len(indices),)).tolist()
        return Pair(self.labelled._batch(drawn), self.unlabelled._batch(indices))


def collate_pairs(items: Any) -> Pair:
    if isinstance(items, Pair):
        return items
    labelled, unlabelled = zip(*items, strict=True)
    return Pair(collate(labelled), collate(unlabelled))


class Parts(NamedTuple):
    """The training images of the target: with labels, without, and what is left over for sources."""

    labelled: Images
    unlabelled: Images
    rest: Images


def split_target(data: Data, labelled: float, unlabelled: int | None, seed: int) -> Parts:
    """`labelled`: a share of each class's training images, from 1 on their number; `unlabelled`: images without labels,
    None all others. The same parts for one seed. Raises InputError when a class has too few images."""
    generator = np.random.default_rng([seed, 41])
    labels, chosen = data.train.labels.numpy(), []
    for label, name in enumerate(data.class_names):
        indices = generator.permutation(np.flatnonzero(labels == label))
        count = round(labelled if labelled >= 1 else max(1, labelled * len(indices)))
        if len(indices) < count or len(indices) == 0:
            raise InputError(f"labelled = {labelled}: class '{name}' has {len(indices)} training images")
        chosen.append(indices[:count])
    kept = np.sort(np.concatenate(chosen))
    others = generator.permutation(np.setdiff1d(np.arange(len(labels)), kept))
    size = len(others) if unlabelled is None else unlabelled
    if not 0 < size <= len(others):
        raise InputError(f"unlabelled = {unlabelled}: {len(others)} training images are left without a label")
    taught = data.train.subset(torch.from_numpy(np.sort(others[:size])))
    taught = taught.relabelled(torch.full((size,), UNLABELLED))
    rest = data.train_plain.subset(torch.from_numpy(np.sort(others[size:])))
    return Parts(data.train.subset(torch.from_numpy(kept)), taught, rest)


def plain(images: Images, data: Data) -> Images:
    """The images under the test preprocessing."""
    return Images(images.split, images.labels, data.test.transform, (data.test.mean, data.test.std))


def changed(images: Images, change: Change) -> Images:
    """In-memory images turned by 90 degrees, inverted, with pixels in another order, or with labels at random."""
    if change == "none":
        return images
    generator = torch.Generator().manual_seed(43)
    if change == "shuffle_labels":
        return images.relabelled(images.labels[torch.randperm(len(images), generator=generator)])
    pixels = images.split.images
    if pixels is None:
        raise InputError(f"sources: change = '{change}': only for data in memory (digits, mnist, cifar, idx, npz)")
    if change == "permute":
        order = torch.randperm(pixels[0, 0].numel(), generator=generator)
        pixels = pixels.flatten(2)[:, :, order].view_as(pixels)
    else:
        pixels = 255 - pixels if change == "invert" else pixels.rot90(1, (2, 3))
    split = replace(images.split, images=pixels.contiguous())
    return Images(split, images.labels, images.transform, (images.mean, images.std))

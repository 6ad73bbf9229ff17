"""Data order and augmentation as a function of (seed, epoch, index), so that a resumed run sees the same samples.

`seeded_loader` gives a plain DataLoader whose permutation depends on (seed, epoch) and whose random augmentations are
seeded per sample. Neither the number of workers, nor the number of processes, nor the point of a resume changes what
a sample looks like in an epoch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

SampleKey = tuple[int, int]
"""(epoch, index): what the seeded sampler yields and the seeded data set takes. Copy c of a sample that is repeated has
the index c * size + index: the same sample under a seed of its own."""


class SeededSampler(Sampler[SampleKey]):
    """Yields (epoch, index); the permutation of epoch e is drawn from a generator seeded with (seed, e).

    With `repeats`, each sample comes that many times in a row, and an epoch of the same length has fewer of them
    (repeated augmentation, arXiv 1901.09335).
    """

    def __init__(self, size: int, seed: int = 0, shuffle: bool = True, repeats: int = 1):
        self.size, self.seed, self.shuffle, self.repeats = size, seed, shuffle, repeats
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[SampleKey]:
        epoch, order = self.epoch, list(range(self.size))
        if self.shuffle:
            generator = torch.Generator().manual_seed(mix(self.seed, epoch))
            order = torch.randperm(self.size, generator=generator).tolist()
        order = order[: -(-self.size // self.repeats)]
        keys = [(epoch, copy * self.size + index) for index in order for copy in range(self.repeats)]
        return iter(keys[: self.size])


class SeededDataset(Dataset[Any]):
    """Wraps a map-style data set: the global generators are seeded per sample while it is read, then restored.

    A data set that has `__getitems__` is read a whole batch at once, seeded by the batch; its samples do not depend on
    who shares their batch as long as it has no randomness of its own. A torch `Subset` counts as what it wraps.
    """

    def __init__(self, dataset: Dataset[Any], seed: int = 0):
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def __getitem__(self, key: SampleKey) -> Any:
        epoch, index = key
        with seeded(mix(self.seed, epoch, index)):
            return self.dataset[index % len(self)]

    def __getitems__(self, keys: Sequence[SampleKey]) -> Any:
        if not _reads_batches(self.dataset):
            return self._one_by_one(keys)
        indices, size = [index for _, index in keys], len(self)
        with seeded(mix(self.seed, keys[0][0], *indices)):
            return self.dataset.__getitems__([index % size for index in indices])  # type: ignore[attr-defined]

    def _one_by_one(self, keys: Sequence[SampleKey]) -> list[Any]:
        """Every sample under its own seed; the generators are saved and restored once for all of them."""
        items, size = [], len(self)
        with _restored():
            for epoch, index in keys:
                _seed(mix(self.seed, epoch, index))
                items.append(self.dataset[index % size])
        return items


def _reads_batches(dataset: Any) -> bool:
    while isinstance(dataset, Subset):  # it has the method whatever it wraps, as a loop over samples
        dataset = dataset.dataset
    return callable(getattr(dataset, "__getitems__", None))


def seeded_loader(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    drop_last: bool = False,
    num_workers: int = 0,
    collate: Callable[[Any], Any] | None = None,
    repeats: int = 1,
) -> DataLoader[Any]:
    """A DataLoader over `dataset` with reproducible order and augmentation; see the module, `repeats`: the sampler."""
    return DataLoader(
        SeededDataset(dataset, seed),
        batch_size=batch_size,
        sampler=SeededSampler(len(cast(Sized, dataset)), seed, shuffle, repeats),
        drop_last=drop_last,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        collate_fn=collate,
        # A generator of its own: starting an epoch must not advance the global one.
        generator=torch.Generator().manual_seed(seed),
    )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds Python's, numpy's and torch's CPU generators inside the block and restores them after it."""
    with _restored():
        _seed(seed)
        yield


@contextmanager
def _restored() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would touch every accelerator too


def mix(*parts: int) -> int:
    """One 63-bit seed from several numbers; neighbours give unrelated seeds (splitmix64 finaliser)."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def set_epoch(loader: Any, epoch: int) -> None:
    """Tells every sampler and data set inside a (possibly accelerate-wrapped) loader which epoch it is."""
    seen: set[int] = set()
    pending = [loader]
    while pending:
        part = pending.pop()
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
        pending += [getattr(part, name, None) for name in ("batch_sampler", "sampler", "dataset")]

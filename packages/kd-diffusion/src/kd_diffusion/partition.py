"""Which student serves which condition: partitions into disjoint parts of equal size (arXiv 2410.23274)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kd_diffusion.data import Data, Part
from kd_diffusion.integrations.conditioners import TextConditioner
from kd_diffusion.integrations.pipelines import Opened
from kd_diffusion.integrations.routed import Router, pooled
from kdcore.errors import InputError

NOISE = 5e-7  # of the largest projection: two that are nearer count as one, prompts that are alike stay together
FITTED = 1_000_000  # prompts that a tree is fitted to at most


def by_prompt(opened: Opened) -> bool:
    """Whether prompts are what is divided, or classes; InputError for a teacher without a condition."""
    if isinstance(opened.conditioner, TextConditioner):
        return True
    if not hasattr(opened.conditioner, "num_classes"):
        raise InputError("teacher: has no condition to divide among students")
    return False


def class_router(num_classes: int, count: int, *, shuffled: bool, seed: int) -> Router:
    """Consecutive classes, or classes in random order."""
    order = np.random.default_rng([seed, 41]).permutation(num_classes).tolist()
    return split_classes(num_classes, count, order if shuffled else None)


def prompt_router(
    opened: Opened, part: Part, count: int, *, shuffled: bool, seed: int, device: torch.device | str = "cpu"
) -> Router:
    """Prompts by the principal directions of their pooled embeddings, or by random ones."""
    if len(part) > FITTED:
        part = part.subset(np.random.default_rng([seed, 53]).permutation(len(part))[:FITTED])
    generator = torch.Generator().manual_seed(seed) if shuffled else None
    return split_embeddings(pooled_prompts(opened, part, device), count, generator)


def pooled_prompts(opened: Opened, part: Part, device: torch.device | str = "cpu", batch: int = 256) -> Tensor:
    """(N, D): the pooled embedding of each sample's prompt, bit for bit the same of a prompt that occurs again; the
    text encoder is left on `device`."""
    conditioner, prompts = opened.conditioner, part.prompts
    assert isinstance(conditioner, TextConditioner)
    if prompts is None:
        raise InputError("data: the teacher is conditioned on text and the data has no prompts")
    conditioner.to(device)
    unique, found = sorted(set(prompts)), []
    for first in range(0, len(unique), batch):
        rows = {name: value.to(device) for name, value in conditioner.tokens(unique[first : first + batch]).items()}
        found.append(pooled(conditioner.embed(rows)).cpu())
    place = {prompt: row for row, prompt in enumerate(unique)}
    return torch.cat(found)[torch.tensor([place[prompt] for prompt in prompts])]


def served(
    opened: Opened, part: Part, router: Router, students: Sequence[int], device: torch.device | str = "cpu"
) -> Part:
    """The samples whose conditions these students serve."""
    if router.count == 1 or len(part) == 0:
        return part
    if router.table is None:
        places = router.walk(pooled_prompts(opened, part, device))
    else:
        assert part.labels is not None
        places = router.route({"class_labels": part.labels})
    return part.subset(np.flatnonzero(torch.isin(places, torch.tensor(list(students))).numpy()))


def part_of(
    opened: Opened, data: Data, router: Router, students: Sequence[int], device: torch.device | str = "cpu"
) -> Data:
    """The data whose conditions these students serve."""
    parts = {name: served(opened, getattr(data, name), router, students, device) for name in ("train", "held_out")}
    return dataclasses.replace(data, **parts)


def split_classes(num_classes: int, count: int, order: Sequence[int] | None = None) -> Router:
    """Consecutive classes (in `order`), parts whose sizes differ by one at most.

    >>> [split_classes(n, k).table.bincount().tolist() for n, k in ((10, 4), (1000, 3))]
    [[3, 3, 2, 2], [334, 333, 333]]
    """
    if not 1 <= count <= num_classes:
        raise InputError(f"students = {count}: allowed: 1 to the {num_classes} classes")
    table = torch.empty(num_classes, dtype=torch.int64)
    classes = np.arange(num_classes) if order is None else np.asarray(order)
    for student, part in enumerate(np.array_split(classes, count)):
        table[torch.from_numpy(part)] = student
    return Router(count, table=table)


def split_embeddings(embeddings: Tensor, count: int, generator: torch.Generator | None = None) -> Router:
    """Median splits of prompt embeddings (N, D) along their first log2(count) principal directions, random ones with a
    generator: parts of equal size, up to prompts that occur more than once and stay together."""
    levels = count.bit_length() - 1
    if count < 1 or 2**levels != count or count > len(embeddings):
        raise InputError(
            f"students = {count}: allowed for {len(embeddings)} prompts: a power of two up to their number"
        )
    if count == 1:
        return Router(1)
    x = embeddings.double()
    if levels > x.shape[1]:
        raise InputError(f"students = {count}: embeddings of {x.shape[1]} numbers have no {levels} directions")
    if generator is None:
        centred = x - x.mean(0)
        directions = torch.linalg.eigh(centred.T @ centred).eigenvectors.T.flip(0)[:levels]
    else:
        directions = torch.randn(levels, x.shape[1], generator=generator, dtype=torch.float64)
    thresholds = torch.zeros(2**levels - 1, dtype=torch.float64)
    node = torch.zeros(len(x), dtype=torch.int64)
    for level, direction in enumerate(directions):
        values, first = x @ direction, 2**level - 1
        for part in range(2**level):
            thresholds[first + part] = _middle(values[node == part], NOISE * float(values.abs().max()), count)
        node = 2 * node + (values > thresholds[first + node]).long()
    return Router(count, directions=directions.contiguous(), thresholds=thresholds)


def _middle(values: Tensor, noise: float, count: int) -> Tensor:
    """The number between two different values (N,) that leaves the most equal halves."""
    values = values.sort().values
    places = torch.nonzero(values.diff() > noise).flatten()
    if len(places) == 0:
        raise InputError(f"students = {count}: the prompts are too alike to be split into as many parts")
    place = places[(places + 1 - len(values) / 2).abs().argmin()]
    return (values[place] + values[place + 1]) / 2

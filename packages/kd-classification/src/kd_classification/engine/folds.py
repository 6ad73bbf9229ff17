"""Patient-disjoint cross-validation: folds made once, kept in the run as `folds.json`, shared by every stage.

A unit is what must not be torn apart: a patient, or a single image (which lets a patient's images fall into training
and test alike; there to measure how much such a leak flatters the result). A unit's label is the most frequent one of
its images. The folds are stratified by it, and so is the validation part inside the training units of each fold.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from kd_classification.data import Parts, group_labels
from kd_classification.sources import Source, Split
from kdcore.config import Config
from kdcore.errors import InputError
from kdcore.stages import digest, write_atomically


class ProtocolConfig(Config):
    """Which fold of which cross-validation a run trains and tests on."""

    split: Literal["patients", "images"] = Field("patients", description="what stays together; images leaks patients")
    folds: int = Field(5, ge=2, description="number of folds")
    fold: int = Field(0, ge=0, description="the fold that is held out, from 0")
    seed: int = Field(43, ge=0, lt=2**32, description="seed of the folds; not that of the run")
    validation: float = Field(0.2, gt=0, lt=1, description="share of the training units held out for validation")

    @model_validator(mode="after")
    def _has_the_fold(self) -> ProtocolConfig:
        if self.fold >= self.folds:
            raise ValueError(f"has no fold {self.fold}: folds = {self.folds}, counted from 0")
        return self


@dataclass(frozen=True)
class FoldPlan:
    """`parts[k]` maps train, validation and test to the names of their units in fold k."""

    split: str
    folds: int
    seed: int
    validation: float
    parts: list[dict[str, list[str]]]

    @property
    def fingerprint(self) -> str:
        return digest(asdict(self))

    def write(self, path: Path) -> None:
        write_atomically(path, json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, path: Path) -> FoldPlan:
        """A plan that `write` wrote. Raises InputError that names a broken file."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"folds {path}: not a readable plan of folds ({error})") from None

    def apply(self, source: Source, fold: int) -> Parts:
        """(train, test, validation) of a fold. A source with a test part of its own keeps that one as the test.

        Raises InputError when a unit of the source is in none of the parts: the data are not those of the plan.
        """
        units, parts = units_of(source.train, self.split), self.parts[fold]
        where = {name: np.flatnonzero(np.isin(units, parts[name])) for name in ("train", "validation", "test")}
        placed = np.concatenate(list(where.values()))
        if len(placed) != len(units):
            missing = sorted(set(units.tolist()) - set(units[placed].tolist()))
            raise InputError(f"folds: the plan was made for other data; '{missing[0]}' is in no part of it")
        pieces = {name: source.train.subset(torch.from_numpy(index)) for name, index in where.items()}
        return pieces["train"], source.test or pieces["test"], pieces["validation"]


def make_plan(source: Source, protocol: ProtocolConfig) -> FoldPlan:
    """Stratified folds over units. Without a test part in the source: (test | train, validation); else validation only.

    Raises InputError when the source knows no patients, or a class has fewer of them than there are folds.
    """
    from sklearn.model_selection import StratifiedKFold, train_test_split

    units, labels, _ = group_labels(units_of(source.train, protocol.split), source.train.labels)
    counts = np.bincount(labels, minlength=len(source.class_names))
    for name, count in zip(source.class_names, counts, strict=True):
        if 0 < count < protocol.folds:
            raise InputError(f"protocol.folds = {protocol.folds}: class '{name}' has only {count} {protocol.split}")
    splitter = StratifiedKFold(protocol.folds, shuffle=True, random_state=protocol.seed)
    parts = []
    for rest, held in splitter.split(units, labels):
        train, validation, test = rest, held, held[:0]
        if source.test is None:
            test = held
            try:
                train, validation = train_test_split(
                    rest, test_size=protocol.validation, random_state=protocol.seed, stratify=labels[rest]
                )
            except ValueError as error:
                raise InputError(f"protocol.validation = {protocol.validation}: {error}") from None
        named = {"train": train, "validation": validation, "test": test}
        parts.append({name: sorted(units[index].tolist()) for name, index in named.items()})
    return FoldPlan(protocol.split, protocol.folds, protocol.seed, protocol.validation, parts)


def units_of(split: Split, kind: str) -> np.ndarray:
    """The unit of each image (N,) of str: its patient, or its number."""
    if kind == "images":
        return np.array([f"{index:08d}" for index in range(len(split.labels))])
    if split.groups is None:
        raise InputError(
            "protocol.split = 'patients': this source knows no patients; use data.name = 'csv' with data.table.group, "
            "or protocol.split = 'images'"
        )
    return split.groups.astype(str)


def shared_groups(*splits: Split) -> int:
    """How many patients have images in more than one of the splits; 0 where the source knows no patients."""
    known = [group for split in splits if split.groups is not None for group in set(split.groups.tolist())]
    return sum(count > 1 for count in Counter(known).values())

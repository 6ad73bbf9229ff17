"""BEVTap: the two maps and the head's responses of a detector while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from kdcore.config import Config
from kdcore.errors import InputError
from kdcore.taps import FeatureTap

LOW = {"lidar": "pts_middle_encoder", "camera": "view_transform", "fusion": "fusion"}
REGRESSION = ("reg", "height", "dim", "rot", "vel", "iou")
CLASSES = "heatmap"


class TapNames(Config):
    """Modules of a detector, as in `named_modules()`; a name with `:input` is what the module was given."""

    low: str = Field(description="whose output is the low-level BEV map: behind the sensors")
    high: str = Field("pts_neck", description="whose output is the high-level BEV map: behind the BEV encoder")
    head: str = Field("pts_bbox_head", description="the centre-based head: a list of dicts of maps")

    @classmethod
    def of(cls, modality: str) -> TapNames:
        """Of the detectors of mmdet3d and of this package; modality: lidar, camera or fusion."""
        return cls(low=LOW[modality])


class BEVTap:
    """Context manager: inside, `low`, `high`, `classes` (B, K, H, W) and `regression` (B, M, H, W) of the last run.

    `classes` are raw logits, copied before the head's own loss turns them into probabilities in place; classes and
    regression maps of all tasks of the head are concatenated.
    Raises InputError for a module that the network does not have, with `field` and near names.
    """

    def __init__(self, network: nn.Module, names: TapNames, field: str):
        self.field = field
        self._splits: tuple[int, ...] = ()
        selects = {"low": first, "high": first, "head": self._responses}
        try:
            self._tap = FeatureTap(network, names.model_dump(), select=selects)
        except InputError as error:
            raise InputError(f"{field}: {error}") from None

    def __enter__(self) -> BEVTap:
        self._tap.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._tap.__exit__(*error)

    def clear(self) -> None:
        self._tap.clear()

    @property
    def low(self) -> Tensor:
        return self._tap["low"]

    @property
    def high(self) -> Tensor:
        return self._tap["high"]

    @property
    def classes(self) -> Tensor:
        return self._tap["head"][:, : self._splits[0]]

    @property
    def regression(self) -> Tensor:
        return self._tap["head"][:, self._splits[0] :]

    def _responses(self, output: Any) -> Tensor:
        """Class logits of every task, then the regression maps of every task, as one copy."""
        tasks = [task[0] if isinstance(task, Sequence) else task for task in output]
        if not tasks or not all(isinstance(task, dict) and CLASSES in task for task in tasks):
            raise InputError(f"{self.field}.head: expected a centre-based head, a dict with '{CLASSES}' for every task")
        classes = [task[CLASSES] for task in tasks]
        self._splits = (sum(item.shape[1] for item in classes),)
        return torch.cat([*classes, *(task[name] for task in tasks for name in REGRESSION if name in task)], dim=1)

    def check_head_fits(self, other: BEVTap) -> None:
        """Raises InputError where the responses of two heads cannot be compared."""
        for what in ("classes", "regression"):
            own, theirs = getattr(self, what).shape, getattr(other, what).shape
            if own != theirs:
                raise InputError(
                    f"{other.field}.head: its {what} are of shape {tuple(theirs)}, the student's of {tuple(own)}; "
                    "responses are distilled between heads of the same classes, tasks and resolution"
                )


def first(output: Any) -> Any:
    """The first map of a neck that returns several."""
    return output[0] if isinstance(output, list | tuple) and output else output


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean over processes of a scalar without gradient; itself where there is one process."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        value = value.detach().clone()
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value

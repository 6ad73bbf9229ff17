"""Monitor: what the validations of a training stage decide, early stopping and the best weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from kdcore.config import TrainConfig
from kdcore.errors import InputError


class Monitor:
    """The monitor of a TrainConfig over the validations of one stage.

    best: (value of the best validation, higher is better; its weights with `restore_best`), None before the first.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        self.best: tuple[float, dict[str, Tensor] | None] | None = None
        self.bad_evaluations = 0

    def check(self, stage: str, *, has_validation: bool) -> None:
        """InputError where a metric is to be watched that no validation gives."""
        if self.config.monitor is not None and not has_validation:
            raise InputError(
                f"train.monitor = '{self.config.monitor}': stage '{stage}' has no validation to take it from"
            )

    def judge(self, metrics: Mapping[str, float], weights: Callable[[], Mapping[str, Tensor]]) -> None:
        """One validation. `weights()` is asked for the state dict where it is to be kept; the copies are on the CPU."""
        monitor = self.config.monitor
        if monitor is None:
            return
        if monitor not in metrics:
            raise InputError(f"train.monitor = '{monitor}': validation gives {', '.join(sorted(metrics))}")
        value = metrics[monitor] if self.config.mode == "max" else -metrics[monitor]
        if value > (self.best[0] if self.best is not None else -math.inf):  # NaN is never an improvement
            kept = {k: v.detach().cpu().clone() for k, v in weights().items()} if self.config.restore_best else None
            self.best, self.bad_evaluations = (value, kept), 0
        else:
            self.bad_evaluations += 1

    @property
    def best_weights(self) -> dict[str, Tensor] | None:
        """What the stage ends with in the place of its last weights."""
        return self.best[1] if self.best is not None else None

    @property
    def out_of_patience(self) -> bool:
        return self.config.patience is not None and self.bad_evaluations >= self.config.patience

"""The loss terms of a training: summed over the micro-batches and processes of a step, averaged between two lines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kdcore.distiller import LossTerms
from kdcore.errors import NonFiniteLoss


class TermMeter:
    """Keeps terms on the device between two lines; no step waits for them.

    `reduce` sums a tensor over all processes. `last_good` names the newest whole checkpoint, for the error.
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor], last_good: Callable[[], Path | None], player: str):
        self.reduce, self.last_good, self.player = reduce, last_good, player
        self.names: list[tuple[str, float]] = []
        self.rows: list[tuple[int, Tensor]] = []
        self.ready: dict[str, list[tuple[float, float, int]]] = {}

    def record(self, step: int, terms: LossTerms) -> None:
        """The terms of one micro-batch of optimiser step `step` (counted from 0)."""
        names = [(name, float(weight)) for name, (weight, _) in terms.items()]
        if names != self.names:  # weights that change (warm-up, schedules) end a block
            self.check()
            self.names = names
        self.rows.append((step, torch.stack([term.detach().float() for _, term in terms.values()])))

    def check(self) -> None:
        """Looks at every step since the last time. Raises NonFiniteLoss, on all processes."""
        if not self.rows:
            return
        steps = sorted({step for step, _ in self.rows})
        place = {step: i for i, step in enumerate(steps)}
        values = torch.zeros(len(steps), len(self.names), device=self.rows[0][1].device)
        values.index_add_(
            0,
            torch.tensor([place[step] for step, _ in self.rows], device=values.device),
            torch.stack([row for _, row in self.rows]),
        )
        values = self.reduce(values).cpu()
        self.rows = []
        if not torch.isfinite(values).all():
            row, column = (~torch.isfinite(values)).nonzero()[0].tolist()
            value = values[row, column].item()
            raise NonFiniteLoss(steps[row], self.player, self.names[column][0], value, self.last_good())
        for (name, weight), column in zip(self.names, values.T.tolist(), strict=True):
            self.ready.setdefault(name, []).extend((weight, raw, step) for raw, step in zip(column, steps, strict=True))

    def means(self) -> dict[str, dict[str, float]]:
        """Name -> {"raw", "weighted"}, means over the steps since the last call. Raises NonFiniteLoss."""
        self.check()
        ready, self.ready = self.ready, {}
        return {
            name: {
                "raw": sum(raw for _, raw, _ in rows) / len({step for _, _, step in rows}),
                "weighted": sum(weight * raw for weight, raw, _ in rows) / len({step for _, _, step in rows}),
            }
            for name, rows in ready.items()
        }

    def clear(self) -> None:
        """Forgets what has not been written."""
        self.rows, self.ready = [], {}


def flat(terms: dict[str, dict[str, float]]) -> dict[str, float]:
    """What `Trainer.log` shows: "term/soft" raw, "term/soft/weighted"."""
    values = {}
    for name, term in terms.items():
        values[f"term/{name}"] = term["raw"]
        values[f"term/{name}/weighted"] = term["weighted"]
    return values

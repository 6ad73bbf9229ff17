"""The loop's log: loss terms stay on the device between two lines, and no step waits for them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import find_batch_size
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

from kdcore.distiller import LossTerms
from kdcore.errors import NonFiniteLoss
from kdcore.stages import RunContext


class TermLog:
    """Collects raw terms per player, writes their means to metrics.jsonl, and stops on a non-finite one.

    The check looks at every single step; it happens when a line is written, before a checkpoint and before a
    validation, so that a bad step never becomes a checkpoint.
    """

    def __init__(self, context: RunContext, stage: str, every: int):
        self.context, self.stage, self.every = context, stage, every
        self.rows: dict[str, list[tuple[int, Tensor]]] = {}
        self.names: dict[str, list[tuple[str, float]]] = {}
        self.samples, self.since = 0, time.perf_counter()
        self.step = self.epoch = 0
        self.loop: Any = None
        self.progress: Progress | None = None

    def attach(self, loop: Any) -> None:
        """The loop whose turns and budget are shown."""
        self.loop = loop
        self.step, self.epoch = loop.step, loop.epoch

    def record(self, step: int, player: str, terms: LossTerms, batch: Any) -> None:
        names = [(name, float(weight)) for name, (weight, _) in terms.items()]
        if self.names.get(player, names) != names:  # weights that change (warm-up) start a new line
            self.flush()
        self.names[player] = names
        raw = torch.stack([term.detach().float() for _, term in terms.values()])
        self.rows.setdefault(player, []).append((step, raw))
        if player == self.loop.turns[0].player.name:
            self.samples += samples_in(batch) * self.context.accelerator.num_processes

    def step_done(self, step: int, epoch: int) -> None:
        self.step, self.epoch = step, epoch
        if step % self.every == 0 or step == self.loop.steps:
            self.flush()

    def flush(self) -> None:
        """Writes one line per player for the steps since the last one. Raises NonFiniteLoss."""
        rate = self.samples / max(1e-9, time.perf_counter() - self.since)
        for turn in self.loop.turns:
            name = turn.player.name
            rows = self.rows.pop(name, [])
            if rows:
                self._line(turn, rows, self.names[name], rate)
        self.samples, self.since = 0, time.perf_counter()

    def _line(self, turn: Any, rows: list[tuple[int, Tensor]], names: list[tuple[str, float]], rate: float) -> None:
        values = torch.stack([row for _, row in rows])
        reduced: Any = self.context.accelerator.reduce(values, "mean")  # a NaN on one rank reaches all
        values = reduced.cpu()
        if not torch.isfinite(values).all():
            self._stop(turn.player.name, rows, names, values)
        means = values.mean(0).tolist()
        terms = {n: {"raw": raw, "weighted": weight * raw} for (n, weight), raw in zip(names, means, strict=True)}
        record = {
            "kind": "train",
            "stage": self.stage,
            "player": turn.player.name,
            "step": self.step,
            "epoch": self.epoch,
            "terms": terms,
            "total": sum(term["weighted"] for term in terms.values()),
            "lr": turn.optimizer.param_groups[0]["lr"],
            "samples_per_second": round(rate, 1),
        }
        self.context.log(**record)
        track(self.context, record)
        self._show(terms)

    def _stop(
        self, player: str, rows: list[tuple[int, Tensor]], names: list[tuple[str, float]], values: Tensor
    ) -> None:
        bad = (~torch.isfinite(values)).nonzero()[0].tolist()
        step, (term, _) = rows[bad[0]][0], names[bad[1]]
        value = values[bad[0], bad[1]].item()
        raise NonFiniteLoss(step, player, term, value, self.loop.last_good())

    # ------------------------------------------------------------ terminal and trackers

    def __enter__(self) -> TermLog:
        if self.context.is_main and not self.context.quiet:
            self.progress, self.task = progress_bar(self.stage, self.loop.steps, self.step)
            self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def _show(self, terms: Mapping[str, Mapping[str, float]]) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=self.step, terms=terms_text(terms))

    def show_metrics(self, metrics: Mapping[str, float]) -> None:
        if self.progress is not None:
            self.progress.console.print(metrics_text(self.stage, self.epoch, metrics))


def samples_in(batch: Any) -> int:
    """Samples of a batch for the rate that is logged: rows of its first tensor, or what a batch of graphs says."""
    graphs = getattr(batch, "num_graphs", None)
    if isinstance(graphs, int):
        return graphs
    try:
        return find_batch_size(batch) or 0
    except (TypeError, ValueError):  # of a class of its own, or empty
        return 0


# ---------------------------------------------------------------- for every training loop


def progress_bar(stage: str, total: int | None = None, completed: int = 0) -> tuple[Progress, TaskID]:
    """A bar over the steps of a stage, with the terms beside it; not started yet."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    bar = Progress(*columns, TextColumn("{task.fields[terms]}"))
    return bar, bar.add_task(stage, total=total, completed=completed, terms="")


def terms_text(terms: Mapping[str, Mapping[str, float]]) -> str:
    """The raw terms of a record, for the bar."""
    return "  ".join(f"{name} {term['raw']:.4g}" for name, term in terms.items())


def metrics_text(stage: str, epoch: int, metrics: Mapping[str, float]) -> str:
    """A validation in one line."""
    values = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    return f"{stage}  epoch {epoch}  {values}"


def track(context: RunContext, record: Mapping[str, Any]) -> None:
    """Gives a record of kind "train" to the run's trackers."""
    if not context.accelerator.trackers:
        return
    prefix = f"{record['stage']}/{record['player']}"
    values = {f"{prefix}/{name}": term["raw"] for name, term in record["terms"].items()}
    context.accelerator.log({**values, f"{prefix}/lr": record["lr"]}, step=record["step"])

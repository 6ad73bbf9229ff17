"""A run directory as plain dataclasses. Whatever is missing or broken becomes a note, not an error."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from kdcore.errors import InputError
from kdcore.report.text import flatten

RUN_FILES = "config.yaml, environment.json, stages.json, metrics.jsonl, metrics.json"
_NOT_CURVES = {"time", "kind", "stage", "player", "step", "epoch", "terms", "metrics"}


@dataclass(frozen=True)
class Curve:
    """`steps` (N,) ascending and `values` (N,), float64; NaN where the logged value was not a finite number."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def finite(self) -> np.ndarray:
        return self.values[np.isfinite(self.values)]


@dataclass(frozen=True)
class Term:
    """A loss term as it was computed, and times its weight."""

    raw: Curve
    weighted: Curve


@dataclass(frozen=True)
class Training:
    """What one player logged in one stage. `scalars` holds total, lr, samples_per_second and what else was logged."""

    stage: str
    player: str
    terms: dict[str, Term]
    scalars: dict[str, Curve]


@dataclass(frozen=True)
class Validation:
    """Validation metrics of one stage, by name."""

    stage: str
    metrics: dict[str, Curve]


@dataclass(frozen=True)
class Profile:
    """Curves over labels `x` (N) of one stage: step -> values (N,), float64, NaN for a gap; the steps ascend."""

    stage: str
    name: str
    x: tuple[str, ...]
    curves: dict[int, np.ndarray]


@dataclass(frozen=True)
class Confusion:
    """`counts` (C, C): rows are the truth, columns the prediction."""

    name: str
    counts: np.ndarray
    classes: list[str]


@dataclass
class Run:
    """One run directory. `results` is None when the run has no (readable) metrics.json."""

    folder: Path
    label: str
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, dict[str, str]] = field(default_factory=dict)
    trainings: list[Training] = field(default_factory=list)
    validations: list[Validation] = field(default_factory=list)
    profiles: list[Profile] = field(default_factory=list)
    results: dict[str, Any] | None = None
    confusions: list[Confusion] = field(default_factory=list)
    started: float | None = None
    ended: float | None = None
    last_step: tuple[str, int] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def method(self) -> str:
        """The method's key, or an empty string."""
        return str(self.config.get("method") or "")


def read_run(folder: Path, label: str | None = None) -> Run:
    """Reads a run directory, finished or not.

    Raises:
        InputError: `folder` is no run directory.
    """
    if not folder.is_dir():
        raise InputError(f"run '{folder}': no such folder; expected a run directory, which holds {RUN_FILES}")
    if not any((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl", "metrics.json")):
        raise InputError(f"run '{folder}': not a run directory; a run directory holds {RUN_FILES}")
    run = Run(folder=folder, label=label or folder.resolve().name)
    _read_config(run)
    run.environment = _read_json(run, "environment.json") or {}
    run.stages = _read_json(run, "stages.json") or {}
    _read_log(run)
    _read_results(run)
    if run.results is None:
        run.notes.insert(0, _unfinished(run))
    return run


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Every run, labelled by as much of its path as tells it apart from the others."""
    paths = [Path(folder).resolve() for folder in folders]
    for index, path in enumerate(paths):
        if path in paths[:index]:
            raise InputError(f"run '{folders[index]}': given twice")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    labels = ["/".join(path.parts[-depth:]).replace("//", "/") for path in paths]
    return [read_run(Path(folder), label) for folder, label in zip(folders, labels, strict=True)]


def _unfinished(run: Run) -> str:
    done = f"finished stages: {', '.join(run.stages)}" if run.stages else "no stage finished"
    last = f"; last line of the log: stage {run.last_step[0]}, step {run.last_step[1]}" if run.last_step else ""
    return f"This run has no results (metrics.json): it failed, was stopped or is still going ({done}{last})."


def _read_config(run: Run) -> None:
    path = run.folder / "config.yaml"
    try:
        run.config_text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(run.config_text)
    except FileNotFoundError:
        run.notes.append("config.yaml is missing.")
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        run.notes.append("config.yaml cannot be read.")
    else:
        if isinstance(values, dict):
            run.config = values
        else:
            run.notes.append("config.yaml holds no mapping.")


def _read_json(run: Run, name: str) -> dict[str, Any] | None:
    """The mapping in a JSON file of the run; None when it is missing, None and a note when it is broken."""
    try:
        value = json.loads((run.folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        value = None
    if not isinstance(value, dict):
        run.notes.append(f"{name} cannot be read.")
        return None
    return value


# ---------------------------------------------------------------- metrics.jsonl


def _read_log(run: Run) -> None:
    trains: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    evals: dict[str, dict[str, dict[int, float]]] = {}
    profiles: dict[tuple[str, str, tuple[str, ...]], dict[int, np.ndarray]] = {}
    odd = 0
    for record in _records(run):
        stage, step = str(record.get("stage", "")), record["step"]
        run.last_step = (stage, step)
        # A resumed run logs the steps after its checkpoint again: the later line replaces the earlier one.
        if record.get("kind") == "train":
            player = str(record.get("player", ""))
            trains.setdefault((stage, player), {})[step] = record
        elif record.get("kind") == "eval":
            for name, value in _mapping(record.get("metrics")).items():
                evals.setdefault(stage, {}).setdefault(str(name), {})[step] = _float(value)
        elif record.get("kind") == "profile":
            found = _profile(record)
            if found is None:
                odd += 1
            else:
                profiles.setdefault(found[0], {})[step] = found[1]
    run.trainings = [_training(stage, player, lines) for (stage, player), lines in trains.items()]
    run.validations = [
        Validation(stage, {name: _curve(points) for name, points in metrics.items()})
        for stage, metrics in evals.items()
    ]
    run.profiles = [Profile(*key, dict(sorted(curves.items()))) for key, curves in profiles.items()]
    if odd:
        run.notes.append(
            f"metrics.jsonl: {odd} profiles were skipped whose 'x' and 'values' are not lists of one length."
        )


def _records(run: Run) -> Iterator[dict[str, Any]]:
    """The well-formed lines that have a step. A killed process leaves a broken last line, which is skipped."""
    path = run.folder / "metrics.jsonl"
    if not path.is_file():
        run.notes.append("metrics.jsonl is missing: nothing was logged, so there are no curves.")
        return
    broken: list[int] = []
    number = 0
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                if line.strip():
                    broken.append(number)
                continue
            if not isinstance(record, dict):
                broken.append(number)
                continue
            _take_time(run, record.get("time"))
            step = record.get("step")
            if isinstance(step, int) and not isinstance(step, bool):
                yield record
    inside = [line for line in broken if line != number]
    if inside:
        run.notes.append(f"metrics.jsonl: {len(inside)} broken lines were skipped (the first is line {inside[0]}).")


def _take_time(run: Run, value: Any) -> None:
    if isinstance(value, int | float) and 0 < value < 1e11:
        run.started = value if run.started is None else min(run.started, value)
        run.ended = value if run.ended is None else max(run.ended, value)


def _training(stage: str, player: str, lines: Mapping[int, Mapping[str, Any]]) -> Training:
    terms: dict[str, tuple[dict[int, float], dict[int, float]]] = {}
    scalars: dict[str, dict[int, float]] = {}
    for step, record in lines.items():
        for name, value in _mapping(record.get("terms")).items():
            raw, weighted = terms.setdefault(str(name), ({}, {}))
            value = _mapping(value)
            raw[step], weighted[step] = _float(value.get("raw")), _float(value.get("weighted"))
        for name, value in record.items():
            if name not in _NOT_CURVES and (value is None or isinstance(value, int | float)):
                scalars.setdefault(name, {})[step] = _float(value)
    return Training(
        stage,
        player,
        {name: Term(_curve(raw), _curve(weighted)) for name, (raw, weighted) in terms.items()},
        {name: _curve(points) for name, points in scalars.items()},
    )


def _profile(record: Mapping[str, Any]) -> tuple[tuple[str, str, tuple[str, ...]], np.ndarray] | None:
    """((stage, name, labels), values); None where labels and values are not lists of one length."""
    x, values = record.get("x"), record.get("values")
    if not isinstance(x, list) or not isinstance(values, list) or len(x) != len(values) or not x:
        return None
    key = (str(record.get("stage", "")), str(record.get("name", "")), tuple(map(str, x)))
    return key, np.array([_float(value) for value in values])


def _curve(points: Mapping[int, float]) -> Curve:
    steps = sorted(points)
    return Curve(np.array(steps, dtype=np.float64), np.array([points[step] for step in steps], dtype=np.float64))


def _float(value: Any) -> float:
    """A finite number, else NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        number = float(value)
    except OverflowError:  # an integer beyond float64
        return math.nan
    return number if math.isfinite(number) else math.nan


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


# ---------------------------------------------------------------- metrics.json


def _read_results(run: Run) -> None:
    values = _read_json(run, "metrics.json")
    if values is None:
        return
    classes = values.get("class_names")
    run.results = {}
    for name, value in flatten({k: v for k, v in values.items() if k != "class_names"}, "/").items():
        if name.endswith("confusion_matrix"):
            confusion = _confusion(name, value, classes)
            if confusion is None:
                run.notes.append(f"metrics.json: '{name}' is not a square matrix of counts.")
            else:
                run.confusions.append(confusion)
        else:
            run.results[name] = value


def _confusion(name: str, value: Any, classes: Any) -> Confusion | None:
    try:
        counts = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or 0 in counts.shape or not np.isfinite(counts).all():
        return None
    if not isinstance(classes, list) or len(classes) != len(counts):
        classes = list(range(len(counts)))
    return Confusion(name, counts, [str(label) for label in classes])

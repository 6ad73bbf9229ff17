"""`kd train`, `kd eval`, `kd report`, `kd cache`, `kd compare`: what they do and print."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kdcore.cli.session import session
from kdcore.errors import InputError
from kdcore.method import find_config, load_config


def train(
    name: str,
    overrides: Sequence[str],
    *,
    resume: bool,
    seed: int | None,
    output: Path | None,
    cpu: bool,
    quiet: bool,
) -> None:
    method, config = load_config(name, with_seed(overrides, seed))
    folder = output or Path("runs") / f"{method.key}-{config_name(name)}-seed{config.seed}"
    from kdcore import run
    from kdcore.report import write_report

    session.run = folder
    metrics = run.train(method, config, folder, resume=resume, quiet=quiet, cpu=cpu)
    if is_main():
        report = write_report([folder])
        console = Console()
        print_metrics(console, metrics)
        console.print(f"run     {folder}\nreport  {report}", highlight=False, soft_wrap=True)


def with_seed(overrides: Sequence[str], seed: int | None) -> list[str]:
    """The overrides with `--seed` among them; giving both is a mistake."""
    if seed is None:
        return list(overrides)
    if any(text.partition("=")[0].strip() == "seed" for text in overrides):
        raise InputError("seed: given both as --seed and as an override; give one")
    return [*overrides, f"seed={seed}"]


def config_name(name: str) -> str:
    """Last part of a config's name: `small` of `kd/small` and of `configs/small.yaml`."""
    return find_config(name).stem


def is_main() -> bool:
    """Whether this process is the one that writes and prints, under a launcher or alone."""
    return os.environ.get("RANK", "0") == "0"


def print_metrics(console: Console, metrics: Mapping[str, Any]) -> None:
    """Student and teacher side by side, then what has no role."""
    from kdcore.run import scalars

    values = scalars(metrics)
    roles = [role for role in ("student", "teacher") if any(name.startswith(f"{role}/") for name in values)]
    rows = dict.fromkeys(name.partition("/")[2] if name.partition("/")[0] in roles else name for name in values)
    table = Table("metric", *roles)
    for row in rows:
        cells = [number(values.get(f"{role}/{row}")) for role in roles]
        table.add_row(row, *(cells if any(cells) else [number(values.get(row))]))
    console.print(table)


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{int(value):,}" if float(value).is_integer() and abs(value) >= 1000 else f"{value:.4f}"


def evaluate(folder: Path, *, as_json: bool) -> None:
    from kdcore import run

    metrics = run.evaluate(folder)
    if as_json:
        print(run.to_json(metrics))
    else:
        print_metrics(Console(), metrics)


def cache(name: str, folder: Path, overrides: Sequence[str]) -> None:
    method, config = load_config(name, overrides)
    if method.cache is None:
        raise InputError(f"method '{method.key}' has no teacher outputs to cache")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"output {folder}: exists and is not empty; give a new folder")
    for key, value in method.cache(config, folder).items():
        print(f"{key}: {value}")

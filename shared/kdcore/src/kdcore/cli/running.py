"""`kd train`, `kd compare`, `kd eval` and `kd cache`: what they do and print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kdcore.cli.console import wide_console
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

    session.run, session.again = folder, "give --resume to go on with it"
    metrics = run.train(method, config, folder, resume=resume, quiet=quiet, cpu=cpu)
    if run.is_main():
        report = write_report([folder])
        console = wide_console()
        print_metrics(console, metrics)
        console.print(f"run     {folder}\nreport  {report}", soft_wrap=True)


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


def print_metrics(console: Console, metrics: Mapping[str, Any]) -> None:
    """Student and teacher side by side, then what belongs to neither."""
    from kdcore.run import scalars

    values = scalars(metrics)
    roles = [role for role in ("student", "teacher") if any(name.startswith(f"{role}/") for name in values)]
    names = dict.fromkeys(name.partition("/")[2] for name in values if name.partition("/")[0] in roles)
    if names:
        table = Table("metric", *roles)
        for name in names:
            table.add_row(name, *(number(values.get(f"{role}/{name}")) for role in roles))
        console.print(table)
    for name, value in values.items():
        if name.partition("/")[0] not in roles:
            console.print(f"{name}  {number(value)}")


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
        print_metrics(wide_console(), metrics)


def cache(name: str, folder: Path, overrides: Sequence[str]) -> None:
    method, config = load_config(name, overrides)
    if method.cache is None:
        raise InputError(f"method '{method.key}' has no teacher outputs to cache")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"output {folder}: exists and is not empty; give a new folder")
    for key, value in method.cache(config, folder).items():
        print(f"{key}: {value}")


# ---------------------------------------------------------------- compare


def compare(name: str, overrides: Sequence[str], *, seeds: int, output: Path | None, cpu: bool, quiet: bool) -> None:
    from kdcore import compare as comparison
    from kdcore import run

    if seeds < 1:
        raise InputError(f"--seeds = {seeds}: expected 1 or more")
    method, _ = load_config(name, overrides)
    folder = output or Path("runs") / f"{method.key}-{config_name(name)}-compare"
    console = wide_console()

    def announce(target: Path, text: str) -> None:
        session.run, session.again = target, "the same command goes on with it"
        if not quiet and run.is_main():
            console.print(text)

    result = comparison.compare(name, overrides, range(seeds), folder, quiet=quiet, cpu=cpu, announce=announce)
    if run.is_main():
        print_comparison(console, result)
        console.print(f"comparison  {folder / comparison.COMPARISON}", soft_wrap=True)


def print_comparison(console: Console, result: Mapping[str, Any]) -> None:
    """One block a metric: mean ± std of each arm and, against the method, the difference ± its standard error."""
    arms, own = result["arms"], result["method"]
    table = Table(box=None)
    for heading in ("metric", "arm", "mean ± std", f"{own} − arm", ""):
        table.add_column(heading, no_wrap=True)
    for metric in arms[own]["mean"]:
        rows = [name for name in arms if metric in arms[name]["mean"]]
        if len(rows) == len(arms) > 1 and _the_same(metric, list(arms.values())):
            table.add_row(metric, "all arms", _spread(arms[own], metric), "", "")
        else:
            for index, name in enumerate(rows):
                difference = result["differences"].get(name, {}).get(metric)
                cells = _against(metric, difference) if difference else ("", "")
                table.add_row("" if index else metric, name, _spread(arms[name], metric), *cells)
    console.print(f"{result['config']}, seeds {', '.join(map(str, result['seeds']))}")
    console.print(table)


def _the_same(metric: str, arms: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every arm has the same values: what belongs to the shared teacher, sizes."""
    values = [[run["metrics"][metric] for run in arm["runs"]] for arm in arms]
    return all(row == values[0] for row in values)


def _spread(arm: Mapping[str, Any], metric: str) -> str:
    std = arm["std"][metric]
    return number(arm["mean"][metric]) + (f" ± {number(std)}" if std else "")


def _against(metric: str, difference: Mapping[str, Any]) -> tuple[str, str]:
    from kdcore.report.text import direction

    mean, error = difference["mean"], difference["standard_error"]
    text = f"{mean:+.4f}" + (f" ± {error:.4f}" if error is not None else "")
    if difference["within_noise"]:
        return text, "one seed" if error is None else "same" if mean == 0 == error else "within noise"
    sign = direction(metric) * mean
    return text, "better" if sign > 0 else "worse" if sign < 0 else "differs"

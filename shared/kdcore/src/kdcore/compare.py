"""Arms x seeds: every arm of a config trained with the same seeds, means, and differences paired by seed.

With d_s = metric(method, seed s) - metric(arm, seed s) over n seeds, a difference is reported as the mean of d and its
standard error, std(d) / sqrt(n) with n - 1 in the variance. It is within noise unless |mean| >= 2 standard errors.
Pairing takes out what the seeds share: the teacher, the split, the initialisation.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcore import run
from kdcore.config import Config, override, parse_override
from kdcore.errors import InputError
from kdcore.method import Method, arm_config, find_config, load_config, read_config
from kdcore.stages import write_atomically

COMPARISON = "comparison.json"


@dataclass(frozen=True)
class Arm:
    """A named variant of a config: its overrides, its method, and its run config for any seed."""

    name: str
    overrides: Mapping[str, Any]
    method: Method[Any]
    config: Config

    def with_seed(self, seed: int) -> Config:
        return self.config.model_copy(update={"seed": seed})

    def folder(self, output: Path, seed: int) -> Path:
        return output / self.name / f"seed-{seed}"


def load_arms(name: str, overrides: Sequence[str] = ()) -> list[Arm]:
    """The config itself, named by its method's key, then each entry of its `compare`; all of them validated."""
    given = dict(parse_override(text) for text in overrides)
    _no_seed(given, "override")
    method, config = load_config(name, overrides)
    values = override(read_config(find_config(name)), given)
    if not config.compare:
        raise InputError(f"config '{name}': 'compare' has no arm to compare with")
    arms = [_arm(method.key, values, {})]
    for arm, changes in config.compare.items():
        if arm == method.key:
            raise InputError(f"config '{name}': compare.{arm}: '{arm}' is the name of the config's own arm")
        if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", arm):
            raise InputError(f"config '{name}': compare.{arm}: expected a name that can be a folder, letters and _.+-")
        _no_seed(changes, f"compare.{arm}")
        arms.append(_arm(arm, values, changes))
    return arms


def _arm(name: str, values: Mapping[str, Any], changes: Mapping[str, Any]) -> Arm:
    return Arm(name, changes, *arm_config(values, changes, source=f"arm '{name}'"))


def _no_seed(changes: Mapping[str, Any], where: str) -> None:
    if "seed" in changes:
        raise InputError(f"{where}: 'seed' is what the comparison varies; give --seeds")


# ---------------------------------------------------------------- running


def compare(
    name: str,
    overrides: Sequence[str],
    seeds: Sequence[int],
    output: Path,
    *,
    quiet: bool = False,
    cpu: bool = False,
    announce: Callable[[Path, str], None] = lambda folder, text: None,
) -> dict[str, Any]:
    """Trains what is not finished of arms x seeds in `output/<arm>/seed-<n>`, and writes `output/comparison.json`.

    `announce(folder, text)` is called before each training. A finished run is not run again and one that was cut is
    resumed, so the same command goes on after a failure. Returns the content of comparison.json.

    Raises:
        InputError: an arm is wrong (all are checked before the first training), or `output` holds something else.
        RunFailed: a run failed; what is finished stays.
    """
    arms = load_arms(name, overrides)
    _check_output(output, arms)
    runs = [(arm, seed) for seed in seeds for arm in arms]
    for arm, seed in runs:
        run.check_folder(arm.method, arm.with_seed(seed), arm.folder(output, seed), resume=True)
    pending = [(arm, seed) for arm, seed in runs if run.read_metrics(arm.folder(output, seed)) is None]
    for arm in arms:
        if any(arm is other for other, _ in pending):
            _check_stages(arm, seeds[0], output, cpu=cpu)
    for index, (arm, seed) in enumerate(pending, 1):
        folder = arm.folder(output, seed)
        announce(folder, f"run {index} of {len(pending)}: {arm.name}, seed {seed}")
        run.train(arm.method, arm.with_seed(seed), folder, resume=True, quiet=quiet, cpu=cpu)
    return _write(name, overrides, arms, seeds, output)


def _check_output(output: Path, arms: Sequence[Arm]) -> None:
    if output.exists() and not output.is_dir():
        raise InputError(f"output {output}: is a file; give a folder")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if (output / run.CONFIG).is_file():
        raise InputError(f"output {output}: holds a run; a comparison needs a folder of its own")
    known = {COMPARISON, *(arm.name for arm in arms)}
    if not any(path.name in known for path in output.iterdir()):
        raise InputError(f"output {output}: holds other files and no comparison; give a new or empty folder")


def _check_stages(arm: Arm, seed: int, output: Path, *, cpu: bool) -> None:
    try:
        run.check(arm.method, arm.with_seed(seed), arm.folder(output, seed), cpu=cpu)
    except InputError as error:
        raise InputError(f"arm '{arm.name}': {error}") from None


def _write(
    name: str, overrides: Sequence[str], arms: Sequence[Arm], seeds: Sequence[int], output: Path
) -> dict[str, Any]:
    metrics = {
        arm.name: [run.scalars(run.read_metrics(arm.folder(output, seed)) or {}) for seed in seeds] for arm in arms
    }
    own = arms[0]
    result = {
        "config": name,
        "method": own.method.key,
        "seeds": list(seeds),
        "overrides": list(overrides),
        "environment": run.read_environment(own.folder(output, seeds[0])),
        "arms": {
            arm.name: {
                "overrides": dict(arm.overrides),
                "runs": [{"seed": s, "metrics": m} for s, m in zip(seeds, metrics[arm.name], strict=True)],
                **summary(metrics[arm.name]),
            }
            for arm in arms
        },
        "differences": {arm.name: differences(metrics[own.name], metrics[arm.name]) for arm in arms[1:]},
    }
    if run.is_main():
        write_atomically(output / COMPARISON, run.to_json(result) + "\n")
    return result


# ---------------------------------------------------------------- statistics


def summary(runs: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    """Mean and standard deviation (n - 1; None for one run) of every metric that all runs have.

    >>> summary([{"accuracy": 0.5}, {"accuracy": 0.75}, {"accuracy": 1.0}])
    {'mean': {'accuracy': 0.75}, 'std': {'accuracy': 0.25}}
    """
    values = {name: [metrics[name] for metrics in runs] for name in _common(runs)}
    return {
        "mean": {name: statistics.fmean(row) for name, row in values.items()},
        "std": {name: _std(row) for name, row in values.items()},
    }


def differences(
    method: Sequence[Mapping[str, float]], arm: Sequence[Mapping[str, float]]
) -> dict[str, dict[str, float | int | bool | None]]:
    """Method minus arm, paired: `method[i]` and `arm[i]` are the metrics of the same seed.

    With one pair there is no standard error (None), and no difference can be told from noise.
    """
    return {name: _difference([m[name] - a[name] for m, a in zip(method, arm)]) for name in _common([*method, *arm])}


def _difference(pairs: Sequence[float]) -> dict[str, float | int | bool | None]:
    mean, deviation = statistics.fmean(pairs), _std(pairs)
    error = None if deviation is None else deviation / len(pairs) ** 0.5
    shown = error is not None and mean != 0 and abs(mean) >= 2 * error  # False where one of them is NaN
    return {"mean": mean, "standard_error": error, "n": len(pairs), "within_noise": not shown}


def _std(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = statistics.fmean(values)  # statistics.stdev refuses NaN
    return (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5


def _common(runs: Sequence[Mapping[str, float]]) -> list[str]:
    return [name for name in runs[0] if all(name in metrics for metrics in runs)]

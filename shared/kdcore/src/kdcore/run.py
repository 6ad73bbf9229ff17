"""A run: one method, one config, one seed, in one folder that stands alone and can be moved.

`train` fills the folder (see `kdcore.stages` for what is in it), `load_run` reads a finished one back, `evaluate`
computes its metrics again.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcore.config import config_difference, read_yaml, to_yaml
from kdcore.errors import InputError
from kdcore.method import Method, config_of, installed, method_of
from kdcore.stages import Artefacts, RunContext, run_stages, write_atomically

if TYPE_CHECKING:
    from accelerate import Accelerator

CONFIG, ENVIRONMENT, STAGES, METRICS = "config.yaml", "environment.json", "stages.json", "metrics.json"


def train(
    method: Method[Any], config: Any, folder: Path, *, resume: bool = False, quiet: bool = False, cpu: bool = False
) -> dict[str, Any]:
    """Runs the method's stages in `folder`, evaluates, and returns the metrics (on every process).

    With `resume`, finished stages are kept and the one that was cut goes on from its newest checkpoint; a folder
    without a run starts from the beginning. Where bad input shows before anything has trained, a folder that this
    call made is removed again.

    Raises:
        InputError: the folder holds another run or foreign files, the run to resume has another config, or what the
            method's stages say of the config.
        RunFailed: a loss term became non-finite.
    """
    from accelerate.utils import set_seed

    with _accelerator(config, folder, cpu) as accelerator:
        check_folder(method, config, folder, resume=resume)
        context = RunContext(config, folder, accelerator, resume=resume, quiet=quiet)
        with _removed_on_bad_input(context):
            stages = method.stages(config, context)
            _open(method, context)
            set_seed(config.seed)
            artefacts = run_stages(stages, context)
        return _results(method, context, artefacts)


def check_folder(method: Method[Any], config: Any, folder: Path, *, resume: bool) -> None:
    """Raises InputError unless `folder` can take this run: new, empty, or with `resume` the same run."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output {folder}: is a file; give a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / CONFIG).is_file():
        raise InputError(f"output {folder}: holds other files and no run; give a new or empty folder")
    if not resume:
        state = "a finished run" if (folder / METRICS).is_file() else "an unfinished run"
        raise InputError(f"output {folder}: holds {state}; give --resume to go on with it, or another --output")
    values = read_yaml(folder / CONFIG)
    if values.get("method") != method.key:
        raise InputError(f"output {folder}: 'method' was {values.get('method')!r} and is {method.key!r} now")
    before = config_of(method, values, source=str(folder / CONFIG))
    difference = config_difference(before, config, ignore=("compare",))
    if difference is not None:
        field, old, new = difference
        raise InputError(
            f"output {folder}: cannot resume with another config: '{field}' was {old!r} and is {new!r} now; "
            "give another --output"
        )


def check(method: Method[Any], config: Any, folder: Path, *, cpu: bool = False) -> None:
    """What `train` would check before it trains, without a trace. Raises InputError."""
    with _accelerator(config, folder, cpu) as accelerator:
        context = RunContext(config, folder, accelerator, quiet=True)
        with _removed_on_bad_input(context):
            method.stages(config, context)


def load_run(folder: Path) -> tuple[Method[Any], Any, Artefacts]:
    """Method, config and artefacts of a finished run, wherever its folder lies now.

    Raises InputError when the folder is no run, the run is not finished, or one of its artefacts is missing.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        what = "not a run directory, it has no config.yaml" if folder.is_dir() else "no such folder"
        raise InputError(f"run '{folder}': {what}")
    stages = _read_json(folder / STAGES)
    if not (folder / METRICS).is_file():
        done = f"finished stages: {', '.join(stages)}" if stages else "no stage is finished"
        again = f"kd train {folder / CONFIG} --resume --output {folder}"
        raise InputError(f"run '{folder}': not finished ({done}); go on with `{again}`")
    values = read_yaml(folder / CONFIG)
    method = method_of(values, source=str(folder / CONFIG))
    config = config_of(method, values, source=str(folder / CONFIG))
    artefacts = {name: folder / path for paths in stages.values() for name, path in paths.items()}
    for name, path in artefacts.items():
        if not path.exists():
            raise InputError(f"run '{folder}': its artefact '{name}' is missing ({path.relative_to(folder)})")
    return method, config, artefacts


def evaluate(folder: Path) -> dict[str, Any]:
    """The metrics of a finished run, computed again from its artefacts. Raises InputError like `load_run`."""
    method, config, artefacts = load_run(folder)
    return _evaluate(method, config, artefacts)


def _evaluate(method: Method[Any], config: Any, artefacts: Artefacts) -> dict[str, Any]:
    """The same metrics in the run and later: the generators do not depend on what ran before."""
    from accelerate.utils import set_seed

    set_seed(config.seed)
    return plain(method.evaluate(config, artefacts))


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among the metrics; a null, which is how a non-finite number is written, becomes NaN."""
    kept = {name: math.nan if value is None else value for name, value in metrics.items()}
    return {k: float(v) for k, v in kept.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def read_metrics(folder: Path) -> dict[str, Any] | None:
    """The metrics that a finished run wrote; None when it has not finished."""
    return _read_json(folder / METRICS) if (folder / METRICS).is_file() else None


def read_environment(folder: Path) -> dict[str, Any]:
    """What a run ran on."""
    return _read_json(folder / ENVIRONMENT)


def is_main() -> bool:
    """Whether this process is the one that writes and prints, under a launcher or alone."""
    return os.environ.get("RANK", "0") == "0"


def plain(value: Any) -> Any:
    """`value` with tensors and arrays as lists and numbers of Python."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return plain(value.tolist()) if hasattr(value, "tolist") else value


def to_json(value: Any) -> str:
    """Strict JSON: a number that is not finite becomes null."""
    return json.dumps(_finite(plain(value)), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None


# ---------------------------------------------------------------- the parts of `train`


@contextmanager
def _accelerator(config: Any, folder: Path, cpu: bool) -> Iterator[Accelerator]:
    """The run's accelerator. Its process-wide state goes when the run ends, unless the caller had made it before."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from kdcore.training import make_accelerator

    inherited = bool(PartialState._shared_state)
    accelerator = None
    try:
        accelerator = make_accelerator(config.train, cpu=cpu, seed=config.seed, folder=folder)
        yield accelerator
    finally:
        for tracker in accelerator.trackers if accelerator is not None else ():
            tracker.finish()
        if not inherited:
            # The process group outlives the run: a second one in the same processes could not find the store again.
            alone = accelerator is None or accelerator.num_processes == 1
            AcceleratorState._reset_state(reset_partial_state=alone)
            GradientState._reset_state()


@contextmanager
def _removed_on_bad_input(context: RunContext) -> Iterator[None]:
    """On InputError before anything has trained, removes the folder that this run made."""
    folder = context.folder
    fresh = not (folder / CONFIG).is_file()
    existed = [path for path in (folder, *folder.parents) if path.is_dir()]
    try:
        yield
    except InputError:
        trained = (folder / "metrics.jsonl").is_file() or any((folder / "checkpoints").glob("*/*"))
        if fresh and not trained and context.is_main and folder.is_dir():
            shutil.rmtree(folder)
            if folder in existed:
                folder.mkdir()
            for parent in folder.parents:
                if parent in existed or any(parent.iterdir()):
                    break
                parent.rmdir()
        raise


def _open(method: Method[Any], context: RunContext) -> None:
    """Makes the folder and writes config.yaml and environment.json; a resumed run adds what has changed."""
    from kdcore import environment

    accelerator, path = context.accelerator, context.folder / ENVIRONMENT
    accelerator.wait_for_everyone()  # every process has checked the folder before one fills it
    if context.is_main:
        context.folder.mkdir(parents=True, exist_ok=True)
        now = environment.describe(
            distribution(method), device=str(accelerator.device), processes=accelerator.num_processes
        )
        if path.is_file():
            first = _read_json(path)
            changed = {key: value for key, value in now.items() if first.get(key) != value}
            now = {**first, "resumed": [*first.get("resumed", []), {"time": round(time.time(), 3), **changed}]}
        write_atomically(path, to_json(now))
        if not (context.folder / CONFIG).is_file():
            write_atomically(context.folder / CONFIG, to_yaml(context.config))
    if context.config.train.trackers:
        accelerator.init_trackers(method.key)
    accelerator.wait_for_everyone()


def distribution(method: Method[Any]) -> str | None:
    """Name of the installed package that registers the method."""
    point = installed().get(method.key)
    return point.dist.name if point is not None and point.dist is not None else None


def _results(method: Method[Any], context: RunContext, artefacts: Artefacts) -> dict[str, Any]:
    """Evaluates on the main process, writes metrics.json and gives every process the metrics."""
    metrics: dict[str, Any] = {}
    if context.is_main:
        metrics = _evaluate(method, context.config, artefacts)
        write_atomically(context.folder / METRICS, to_json(metrics))
    if context.accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        metrics = broadcast_object_list([metrics])[0]
    return metrics

"""MMEngineStage: a stage of a `kd` run whose training is mmengine's Runner.

The Runner gets its own sections of the config. The stage adds what a run promises: the seed of the stage, the records
of metrics.jsonl and the bar, checkpoints that are safe to open, `--resume`, one artefact folder. In a loop by
iterations the order of the data and the randomness of a sample are functions of (seed, pass, index), and a resumed run
of one process has bit-identical weights.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import LOOPS, MODEL_WRAPPERS
from mmengine.runner import IterBasedTrainLoop, Runner
from mmengine.runner.loops import _InfiniteDataloaderIterator
from torch import nn

from kd_segmentation.integrations.hooks import unwrapped
from kdcore.checkpoint import fault, trainer_checkpoints
from kdcore.errors import InputError
from kdcore.stages import Artefacts, RunContext, forget_lines_after, replace_folder, stage_seed
from kdcore.termlog import TermLog

# What asserts a tuple, and comes as a list from a YAML file.
TUPLES = {"crop_size", "scale", "ratio_range", "img_scale", "size", "stride", "out_indices"}
ITERATION_LOOPS = {"IterBasedTrainLoop", "SeededIterLoop"}


@dataclass
class RunnerSetup:
    """config: the Runner's sections. save(model, dataset_meta, folder) writes the artefact from the trained model."""

    config: Mapping[str, Any]
    save: Callable[[Any, Mapping[str, Any], Path], None]


@dataclass
class MMEngineStage:
    """Trains by mmengine's Runner and saves `<run>/<artefact>/`. `build` is called with seeded generators.

    seed: in the place of the run's.
    """

    name: str
    build: Callable[[RunContext], RunnerSetup]
    artefact: str = "student"
    seed: int | None = None

    def run(self, context: RunContext) -> Artefacts:
        from accelerate.utils import set_seed

        seed = stage_seed(context, self.name, self.seed)
        set_seed(seed)
        work = context.folder / "checkpoints" / self.name
        with ExitStack() as stack:
            stack.enter_context(on_device(context.accelerator.device.type))
            stack.enter_context(quiet_mmengine())
            setup = self.build(context)
            config = runner_config(setup.config, work, seed, context)
            runner = make_runner(config)
            run_hook = RunHook(context, self.name, _intervals(setup.config), Path(work))
            runner.register_hook(run_hook)
            with run_hook:
                runner.train()
        target = context.folder / self.artefact
        if context.is_main:
            meta = dict(runner.train_dataloader.dataset.metainfo)
            replace_folder(target, lambda folder: setup.save(unwrapped(runner), meta, folder))
        context.accelerator.wait_for_everyone()
        return {self.artefact: target}


def make_runner(config: Mapping[str, Any]) -> Runner:
    """The Runner of its sections; `model` may be a config dict or a model."""
    cfg = Config({name: value for name, value in config.items() if name != "model" or isinstance(value, Mapping)})
    known = set(inspect.signature(Runner.__init__).parameters) - {"self", "cfg", "model"}
    model = cfg.get("model", config["model"])
    return Runner(model=model, cfg=cfg, **{name: cfg[name] for name in known if name in cfg})


def runner_config(config: Mapping[str, Any], work: Path, seed: int, context: RunContext) -> dict[str, Any]:
    """The Runner's config inside a run: seeds, work_dir, safe checkpoints, nothing printed, resume."""
    values = tupled(dict(config))
    _, save_every = _intervals(config)
    hooks = {name: hook for name, hook in (values.get("default_hooks") or {}).items() if name != "logger"}
    checkpoint = {"type": "SafeCheckpointHook", "interval": save_every}
    values.update(
        default_scope="mmseg",
        work_dir=str(work),
        experiment_name=f"{work}",
        randomness={"seed": seed},
        launcher="pytorch" if context.accelerator.num_processes > 1 else "none",
        default_hooks={**hooks, "logger": None, "checkpoint": checkpoint},
        log_level="ERROR",
    )
    values["train_dataloader"] = seeded_dataloader(values["train_dataloader"], seed)
    values["train_cfg"] = seeded_loop(values["train_cfg"])
    if values.get("val_dataloader") is None or values.get("val_cfg") is None:
        values.update(val_dataloader=None, val_cfg=None, val_evaluator=None)
    values.update(test_dataloader=None, test_cfg=None, test_evaluator=None)
    if context.accelerator.num_processes > 1 and not values.get("model_wrapper_cfg"):
        unused = bool(values.get("find_unused_parameters", False))
        wrapper = {"type": "AnyDeviceDDP", "broadcast_buffers": False, "find_unused_parameters": unused}
        values["model_wrapper_cfg"] = wrapper
    newest = _resume_from(work) if context.resume else None
    if newest is not None:
        values.update(resume=True, load_from=str(newest))
    return values


def _resume_from(work: Path) -> Path | None:
    from kd_segmentation.integrations.hooks import STATE, check_checkpoint

    check_checkpoint(work)
    found = trainer_checkpoints(work)
    return found[-1] / STATE if found else None


def _intervals(config: Mapping[str, Any]) -> tuple[int, int]:
    """Iterations between two lines of the log, and between two checkpoints."""
    hooks = config.get("default_hooks") or {}
    logger, checkpoint = hooks.get("logger") or {}, hooks.get("checkpoint") or {}
    return int(logger.get("interval", 10)), int(checkpoint.get("interval", 500))


def tupled(value: Any, key: str = "") -> Any:
    """A copy in which the sizes of transforms are tuples again."""
    if isinstance(value, Mapping):
        return {name: tupled(item, name) for name, item in value.items()}
    if isinstance(value, list | tuple):
        items = [tupled(item) for item in value]
        numbers = all(isinstance(item, int | float) for item in items)
        return tuple(items) if isinstance(value, tuple) or (key in TUPLES and numbers) else items
    return value


# ---------------------------------------------------------------- order of the data


def seeded_dataloader(loader: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """A loader with an InfiniteSampler, order and augmentation as functions of the seed; others as they are."""
    sampler = dict(loader.get("sampler") or {"type": "InfiniteSampler"})
    if sampler.get("type") != "InfiniteSampler":
        return dict(loader)
    return {
        "num_workers": 0,
        **loader,
        "dataset": {"type": "SeededSamples", "dataset": loader["dataset"], "seed": seed},
        "sampler": {**sampler, "type": "SeededInfiniteSampler", "seed": seed},
    }


def seeded_loop(train_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The loop by iterations that goes on at the right item without reading the items before it."""
    values = dict(train_cfg)
    kind = values.get("type", "EpochBasedTrainLoop" if values.get("by_epoch", True) else "IterBasedTrainLoop")
    if kind not in ITERATION_LOOPS:
        return values
    values.pop("by_epoch", None)
    return {**values, "type": "SeededIterLoop"}


@LOOPS.register_module()
class SeededIterLoop(IterBasedTrainLoop):
    """IterBasedTrainLoop over a SeededInfiniteSampler: resuming starts the sampler at the right item."""

    def run(self) -> Any:
        if self._iter > 0 and hasattr(self.dataloader.sampler, "start"):
            self.dataloader.sampler.start = self._iter * self.dataloader.batch_size
            rest = _InfiniteDataloaderIterator(self.dataloader)
            # The loop drops as many batches as have been trained on: these are none.
            self.dataloader_iterator = itertools.chain(itertools.repeat(None, self._iter), rest)
        return super().run()


# ---------------------------------------------------------------- several processes


@MODEL_WRAPPERS.register_module()
class AnyDeviceDDP(MMDistributedDataParallel):
    """mmengine's DDP also for networks on the CPU, for which torch takes no device ids."""

    def __init__(self, module: nn.Module, device_ids: Any = None, **arguments: Any):
        on_cpu = all(parameter.device.type == "cpu" for parameter in module.parameters())
        super().__init__(module=module, device_ids=None if on_cpu else device_ids, **arguments)


# ---------------------------------------------------------------- log


class RunHook(Hook):
    """Writes the loss terms and validations of a DistilledModel to metrics.jsonl and shows the bar."""

    priority = "BELOW_NORMAL"  # after the averages, before the checkpoint: a bad step never becomes one

    def __init__(self, context: RunContext, stage: str, intervals: tuple[int, int], work: Path):
        self.context, self.stage, self.work = context, stage, work
        self.log = TermLog(context, stage, intervals[0])
        self.save_every = intervals[1]
        self._open = False

    def __enter__(self) -> RunHook:
        return self

    def __exit__(self, *error: object) -> None:
        if self._open:
            self.log.__exit__(*error)

    def before_train(self, runner: Any) -> None:
        turn = SimpleNamespace(player=SimpleNamespace(name="student"), optimizer=runner.optim_wrapper)
        step = runner.iter
        self.log.attach(
            SimpleNamespace(turns=[turn], steps=runner.max_iters, step=step, epoch=0, last_good=self._last_good)
        )
        if self.context.resume:
            forget_lines_after(self.context, self.stage, step, evaluates_again=False)
            if step:
                self.context.say(f"{self.stage}: resumed at step {step} of {runner.max_iters}")
        self.log.__enter__()
        self._open = True

    def _last_good(self) -> Path | None:
        return next((path for path in reversed(trainer_checkpoints(self.work)) if not fault(path)), None)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        step = runner.iter + 1
        self.log.record(step, "student", unwrapped(runner).terms, torch.empty(_samples(data_batch)))
        self.log.step_done(step, runner.epoch)
        if step % self.save_every == 0:
            self.log.flush()

    def after_val_epoch(self, runner: Any, metrics: Mapping[str, float] | None = None) -> None:
        self.log.flush()
        values = {name: float(value) for name, value in (metrics or {}).items()}
        self.context.log(kind="eval", stage=self.stage, step=runner.iter, epoch=runner.epoch, metrics=values)
        self.log.show_metrics(values)


def _samples(data: Any) -> int:
    if isinstance(data, Mapping):
        return len(data["inputs"]) if "inputs" in data else sum(_samples(stream) for stream in data.values())
    return 0


# ---------------------------------------------------------------- the process


@contextmanager
def on_device(kind: str) -> Iterator[None]:
    """mmengine takes an accelerator where there is one; inside, a run on the CPU stays there."""
    from mmengine.device import utils

    kept = utils.DEVICE
    if kind == "cpu":
        utils.DEVICE = "cpu"
    try:
        yield
    finally:
        utils.DEVICE = kept


@contextmanager
def quiet_mmengine() -> Iterator[None]:
    """Inside, mmengine's loggers say errors alone; its warnings about its own libraries are not the user's."""
    root = MMLogger.get_current_instance()  # the one that speaks outside a Runner
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for library in ("mmengine", "mmseg", "mmcv", "torch"):
                warnings.filterwarnings("ignore", category=DeprecationWarning, module=rf"{library}\.")
                warnings.filterwarnings("ignore", category=FutureWarning, module=rf"{library}\.")
                warnings.filterwarnings("ignore", category=UserWarning, module=rf"{library}\.")
            yield
    finally:
        root.setLevel(level)


def check_dataset(config: Mapping[str, Any], field: str) -> Any:
    """Builds a data set, so that what is wrong with it is said before anything trains."""
    from mmengine.registry import init_default_scope
    from mmseg.registry import DATASETS

    init_default_scope("mmseg")
    try:
        return DATASETS.build(Config(tupled(dict(config)))._cfg_dict)
    except InputError as error:
        raise InputError(f"{field}.{error}") from None
    except (KeyError, TypeError, ValueError, AssertionError, OSError) as error:
        raise InputError(f"{field}: the data set cannot be built ({' '.join(str(error).split())})") from None

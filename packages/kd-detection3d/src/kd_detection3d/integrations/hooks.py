"""Hooks of mmengine in mmdet3d's registry: checkpoints without pickled objects, and the student alone.

Both work in a Runner of a user's own:

    default_hooks = dict(checkpoint=dict(type="SafeCheckpointHook", interval=500))
    custom_hooks = [dict(type="StudentHook")]
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmdet3d.registry import HOOKS
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from kd_detection3d.integrations import networks
from kdcore.checkpoint import check, rng_state, save_trainer_state, set_rng_state, trainer_checkpoints
from kdcore.errors import InputError
from kdcore.state_files import plain_state

STATE = "state.pth"


def unwrapped(runner: Any) -> Any:
    """The runner's model without DDP."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


# ---------------------------------------------------------------- checkpoints


@HOOKS.register_module()
class SafeCheckpointHook(Hook):
    """Checkpoints for `resume=True` that hold tensors and plain values only, so that torch opens them safely.

    Stock checkpoints hold pickled objects of mmengine, which torch refuses by default. Every `interval` iterations
    (epochs in a loop by epochs) this writes `work_dir/checkpoint-00000500/state.pth` with a manifest of its SHA-256,
    under a temporary name first, and `last_checkpoint`, where Runner's `resume=True` looks. Frozen teachers are left
    out. The generators' state goes along: with one process training goes on as if it had not been cut.
    """

    priority = "VERY_LOW"

    def __init__(self, interval: int = 500, keep: int = 2, by_epoch: bool = False):
        if interval < 1 or keep < 1:
            raise InputError(f"SafeCheckpointHook: interval = {interval}, keep = {keep}: both are at least 1")
        self.interval, self.keep, self.by_epoch = interval, keep, by_epoch
        self._generators: Any = None

    def before_run(self, runner: Any) -> None:
        if runner._resume and runner._load_from is None:
            check_checkpoint(Path(runner.work_dir))

    def after_load_checkpoint(self, runner: Any, checkpoint: Mapping[str, Any]) -> None:
        if runner._resume:
            self._generators = checkpoint.get("generators")

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if self._generators is not None:  # reading the batches that are skipped has drawn from them
            set_rng_state(self._generators)
            self._generators = None

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        done = runner.iter + 1
        if not self.by_epoch and done % self.interval == 0 and done < runner.max_iters:
            write_checkpoint(runner, done, runner.epoch, keep=self.keep)

    def after_train_epoch(self, runner: Any) -> None:
        done = runner.epoch + 1
        if self.by_epoch and done % self.interval == 0 and done < runner.max_epochs:
            write_checkpoint(runner, runner.iter, done, keep=self.keep)


@master_only
def write_checkpoint(runner: Any, iteration: int, epoch: int, *, keep: int = 2) -> Path:
    """Writes the runner's state atomically and removes all but the newest `keep` checkpoints."""
    work = Path(runner.work_dir)
    final = save_trainer_state(work, checkpoint_state(runner, iteration, epoch), iteration, STATE)
    (work / "last_checkpoint").write_text(str(final / STATE))
    for old in trainer_checkpoints(work)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoint_state(runner: Any, iteration: int, epoch: int) -> dict[str, Any]:
    """What Runner.resume reads, of plain values and tensors."""
    schedulers = runner.param_schedulers or []
    if isinstance(schedulers, dict):
        states: Any = {name: [item.state_dict() for item in group] for name, group in schedulers.items()}
    else:
        states = [item.state_dict() for item in schedulers]
    dataset = runner.train_dataloader.dataset
    state = {
        "meta": {
            "epoch": epoch,
            "iter": iteration,
            "seed": runner.seed,
            "experiment_name": runner.experiment_name,
            "dataset_meta": dict(getattr(dataset, "metainfo", None) or {}),
        },
        "state_dict": unwrapped(runner).state_dict(),
        "optimizer": runner.optim_wrapper.state_dict(),
        "param_schedulers": states,
        # The smoothed log is not part of the training.
        "message_hub": {"log_scalars": {}, "runtime_info": {}, "resumed_keys": {}},
        "generators": rng_state(),
    }
    runner.call_hook("before_save_checkpoint", checkpoint=state)
    return plain_state(state)


def check_checkpoint(work: Path) -> None:
    """Raises InputError where the newest checkpoint of a work_dir is damaged, with the newest that is good."""
    found = trainer_checkpoints(work)
    if found:
        check(found[-1], found[:-1])


# ---------------------------------------------------------------- the student


@HOOKS.register_module()
class StudentHook(Hook):
    """Saves the student alone as `work_dir/student/`, config and checkpoint that stock mmdet3d opens.

    At the end of training, and with `interval` every so many iterations.
    """

    priority = "LOWEST"

    def __init__(self, interval: int | None = None, folder: str = "student"):
        self.interval, self.folder = interval, folder

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self.interval and (runner.iter + 1) % self.interval == 0:
            self._save(runner)

    def after_train(self, runner: Any) -> None:
        self._save(runner)

    @master_only
    def _save(self, runner: Any) -> None:
        config = runner.cfg.to_dict()
        student = unwrapped(runner).student
        networks.save(
            Path(runner.work_dir) / self.folder,
            student,
            config["model"]["student"],
            stock_dataset(config, networks.sensors(student)),
            dataset_meta=getattr(runner.train_dataloader.dataset, "metainfo", None),
        )


CAMERA_STEPS = {"LoadCameras", "ResizeCropImages", "LoadMultiViewImageFromFiles", "LoadImageFromFileMono3D"}


def stock_dataset(config: Mapping[str, Any], sensors: set[str]) -> dict[str, Any]:
    """The test data as a stock data set's config, its pipeline with what a network of these sensors reads alone."""
    section = next((config[name]["dataset"] for name in ("test_dataloader", "val_dataloader") if config.get(name)), {})
    kind = section.get("type", "KittiDataset")
    steps = [dict(step) for step in section.get("pipeline", ())]
    if "img" not in sensors:
        steps = [step for step in steps if step["type"] not in CAMERA_STEPS]
    for step in steps:
        if step["type"] == "Pack3DDetInputs":
            step["keys"] = [key for key in step["keys"] if key in sensors]
    found = {
        "type": "KittiDataset" if kind == "RenderedScenes" else kind,
        "data_root": "",
        "ann_file": "",
        "pipeline": steps,
        "box_type_3d": section.get("box_type_3d", "LiDAR"),
        "test_mode": True,
    }
    return {**found, **{name: section[name] for name in ("metainfo", "modality") if name in section}}

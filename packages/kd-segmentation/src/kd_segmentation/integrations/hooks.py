"""Hooks of mmengine: checkpoints without pickled objects, the student alone, its average, switching stages, pictures.

All work in a Runner of a user's own:

    default_hooks = dict(checkpoint=dict(type="SafeCheckpointHook", interval=500))
    custom_hooks = [dict(type="StudentHook"), dict(type="PicturesHook", count=4)]
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS

from kd_segmentation import pictures
from kd_segmentation.integrations import networks
from kdcore.checkpoint import check, rng_state, save_trainer_state, set_rng_state, trainer_checkpoints
from kdcore.config import EMAConfig, parse
from kdcore.ema import EMA
from kdcore.errors import InputError, did_you_mean
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
class StudentEMAHook(Hook):
    """Moving average of the student's trained weights: what is validated and saved. Arguments as in EMAConfig."""

    priority = "NORMAL"

    def __init__(self, **config: Any):
        self.config = parse(EMAConfig, config, source="StudentEMAHook")
        self.ema: EMA | None = None
        self._open: Any = None

    def before_run(self, runner: Any) -> None:
        self.ema = EMA(unwrapped(runner).student, self.config, 1)
        self._loaded = False

    def before_train(self, runner: Any) -> None:
        if not self._loaded:  # the average starts from the initialised weights
            self.ema = EMA(unwrapped(runner).student, self.config, 1)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.ema.update()

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["student_ema"] = self.ema.state_dict()

    def after_load_checkpoint(self, runner: Any, checkpoint: Mapping[str, Any]) -> None:
        if runner._resume and "student_ema" in checkpoint:
            self.ema.load_state_dict(checkpoint["student_ema"])
            self._loaded = True

    def before_val_epoch(self, runner: Any) -> None:
        self._open = self.ema.applied()
        self._open.__enter__()

    def after_val_epoch(self, runner: Any, metrics: Any = None) -> None:
        self._open.__exit__(None, None, None)

    def after_train(self, runner: Any) -> None:
        self.ema.copy_to_module()


@HOOKS.register_module()
class StudentHook(Hook):
    """Saves the student alone as `work_dir/student/`, config and checkpoint that stock mmseg opens.

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
        model = config["model"]
        student = {**model["student"]}
        student.setdefault("data_preprocessor", model.get("data_preprocessor"))
        networks.save(
            Path(runner.work_dir) / self.folder,
            unwrapped(runner).student,
            student,
            dataset_meta=getattr(runner.train_dataloader.dataset, "metainfo", None),
            test_pipeline=inference_pipeline(config),
        )


def inference_pipeline(config: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The pipeline of the test data, or of the validation data."""
    for name in ("test_dataloader", "val_dataloader"):
        pipeline = ((config.get(name) or {}).get("dataset") or {}).get("pipeline")
        if pipeline:
            return pipeline
    return None


# ---------------------------------------------------------------- stages inside a training


@HOOKS.register_module()
class SwitchHook(Hook):
    """Changes weights of loss terms, and what is trained, at given iterations.

        dict(type="SwitchHook", switches=[dict(at=0, freeze=["backbone"]),
                                          dict(at=500, unfreeze=["backbone"], scales=dict(kl=0.0))])

    scales: term name -> factor on its weight from there on. freeze, unfreeze: modules of the student by name; frozen
    ones are in eval mode too. What holds at an iteration follows from the list alone, so a resumed run agrees.
    """

    def __init__(self, switches: Sequence[Mapping[str, Any]]):
        for switch in switches:
            unknown = set(switch) - {"at", "scales", "freeze", "unfreeze"}
            if unknown or "at" not in switch:
                raise InputError(
                    f"SwitchHook: switches need 'at' and take scales, freeze, unfreeze; got {sorted(switch)}"
                )
        self.switches = sorted((dict(switch) for switch in switches), key=lambda switch: switch["at"])
        self._state: tuple[int, list[Any]] = (-1, [])

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        model = unwrapped(runner)
        passed = sum(switch["at"] <= runner.iter for switch in self.switches)
        if passed != self._state[0]:
            self._apply(model, passed)
        for module in self._state[1]:  # Runner puts the whole model in train mode before each iteration
            module.eval()

    def _apply(self, model: Any, passed: int) -> None:
        scales: dict[str, float] = {}
        frozen: dict[str, Any] = {}
        for switch in self.switches[:passed]:
            scales.update(switch.get("scales", {}))
            for name in switch.get("freeze", ()):
                frozen[name] = _module(model.student, name)
            for name in switch.get("unfreeze", ()):
                frozen.pop(name, None)
                _module(model.student, name).requires_grad_(True)
        for module in frozen.values():
            module.requires_grad_(False)
        model.scales = scales
        self._state = (passed, list(frozen.values()))


def _module(network: Any, name: str) -> Any:
    known = dict(network.named_modules())
    if name not in known:
        raise InputError(f"SwitchHook: the student has no module '{name}'{did_you_mean(name, [n for n in known if n])}")
    return known[name]


# ---------------------------------------------------------------- pictures


@HOOKS.register_module()
class PicturesHook(Hook):
    """At each validation, image, truth, teachers and student of the first `count` images.

    Files work_dir/pictures/<iteration>/<n>.png, and the runner's visualizer.
    """

    def __init__(self, count: int = 4):
        self.count = count
        self._shown = 0

    def before_val_epoch(self, runner: Any) -> None:
        self._shown = 0

    @master_only
    def after_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self._shown >= self.count:
            return
        model = unwrapped(runner)
        palette = runner.val_dataloader.dataset.metainfo["palette"]
        teachers = getattr(model.distiller, "teachers", {})
        prepared = model.data_preprocessor(data_batch, False)
        answers = {name: teacher_labels(teachers[name], prepared["inputs"], outputs[0].ori_shape) for name in teachers}
        for place, sample in enumerate(outputs):
            if self._shown >= self.count:
                return
            columns = pictures.row(
                rgb(data_batch["inputs"][place], model.data_preprocessor, sample.ori_shape),
                sample.gt_sem_seg.data[0].cpu().numpy() if "gt_sem_seg" in sample else None,
                {
                    **{name: labels[place] for name, labels in answers.items()},
                    "student": sample.pred_sem_seg.data[0].cpu().numpy(),
                },
                palette,
            )
            self._write(runner, pictures.strip(columns))
            self._shown += 1

    def _write(self, runner: Any, picture: np.ndarray) -> None:
        from PIL import Image

        folder = Path(runner.work_dir) / "pictures" / f"{runner.iter:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{self._shown:02d}.png")
        runner.visualizer.add_image(f"pictures/{self._shown:02d}", picture, step=runner.iter)


@torch.no_grad()
def teacher_labels(teacher: Any, inputs: Any, size: Sequence[int]) -> np.ndarray:
    """argmax of a teacher's logits at the original size, (B, H, W)."""
    logits = torch.nn.functional.interpolate(teacher(inputs), size=tuple(size[:2]), mode="bilinear")
    return logits.argmax(1).cpu().numpy()


def rgb(image: Any, preprocessor: Any, size: Sequence[int]) -> np.ndarray:
    """The raw input (3, H, W) of a pipeline as an RGB uint8 picture (H, W, 3) of the original size."""
    from PIL import Image

    pixels = image.permute(1, 2, 0).cpu().numpy().astype(np.uint8)
    if getattr(preprocessor, "channel_conversion", False):
        pixels = pixels[..., ::-1]
    if pixels.shape[:2] != tuple(size[:2]):
        pixels = np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize((size[1], size[0])))
    return np.ascontiguousarray(pixels)

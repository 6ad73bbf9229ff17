"""NerfstudioStage: a stage of a `kd` run whose training is nerfstudio's Trainer.

The Trainer gets a TrainerConfig. The stage adds what a run promises: the seed, the records of metrics.jsonl and the
bar, validation over wall-clock time, `--resume` from the newest checkpoint, and one artefact folder,

    <artefact>/kd-pvd/nerfstudio/config.yml, nerfstudio_models/step-*.ckpt, dataparser_transforms.json
    <artefact>/curve.json                   step, seconds of training and metrics of every validation

whose config.yml has paths relative to the run, so that `cd RUN; ns-viewer --load-config <artefact>/.../config.yml`
works wherever the run lies.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackLocation
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from nerfstudio.utils import writer
from nerfstudio.utils.rich_utils import CONSOLE

from kd_nerf.integrations.model import image_metrics
from kd_nerf.integrations.teachers import find_checkpoint
from kdcore.distiller import LossTerms
from kdcore.stages import Artefacts, RunContext, forget_lines_after, replace_folder, stage_seed
from kdcore.termlog import TermLog

CURVE = "curve.json"
RUN_NAME = "nerfstudio"


@dataclass
class Intervals:
    """Steps between two lines of the log, two validations, two checkpoints."""

    log: int = 10
    evaluate: int = 1000
    save: int = 500


@dataclass
class NerfstudioStage:
    """Trains by nerfstudio's Trainer and saves `<run>/<artefact>/`. `build` is called with seeded generators.

    `data_path` is what the artefact's config.yml says of the photographs; None leaves it.
    """

    name: str
    build: Callable[[RunContext], TrainerConfig]
    intervals: Intervals = field(default_factory=Intervals)
    artefact: str = "student"
    data_path: Path | None = None

    def run(self, context: RunContext) -> Artefacts:
        from accelerate.utils import set_seed

        set_seed(stage_seed(context, self.name))
        config = self.build(context)
        total = config.max_num_iterations
        config.output_dir = context.folder / "checkpoints"
        config.experiment_name, config.timestamp = self.name, RUN_NAME
        config.machine.device_type = context.accelerator.device.type
        config.vis = "none"  # type: ignore[assignment]  no viewer, no event files
        config.logging.local_writer.enable = False
        config.logging.profiler = "none"
        config.viewer.quit_on_train_completion = True
        config.steps_per_save = self.intervals.save
        if context.resume and any(config.get_checkpoint_dir().glob("step-*.ckpt")):
            config.load_dir = config.get_checkpoint_dir()
        with quiet():
            trainer = config.setup()
            trainer.setup()
            hook = RunHook(context, self.name, self.intervals, trainer, total)
            trainer.config.max_num_iterations = total - trainer._start_step
            with hook:
                trainer.train()
        target = context.folder / self.artefact
        replace_folder(target, lambda folder: self.save(config, hook, folder))
        return {self.artefact: target}

    def save(self, config: TrainerConfig, hook: RunHook, folder: Path) -> None:
        """The artefact: nerfstudio's own files under paths relative to the run, and the curve."""
        inside = folder / str(config.method_name) / RUN_NAME
        (inside / config.relative_model_dir).mkdir(parents=True)
        checkpoint = find_checkpoint(config.get_checkpoint_dir(), "checkpoint")
        shutil.copy2(checkpoint, inside / config.relative_model_dir / checkpoint.name)
        transforms = config.get_base_dir() / "dataparser_transforms.json"
        if transforms.is_file():
            shutil.copy2(transforms, inside / transforms.name)
        (inside / "config.yml").write_text(yaml.dump(self.portable(config)), encoding="utf-8")
        (folder / CURVE).write_text(json.dumps(hook.curve, indent=1))

    def portable(self, config: TrainerConfig) -> TrainerConfig:
        saved = copy.deepcopy(config)
        saved.output_dir, saved.experiment_name, saved.load_dir = Path("."), self.artefact, None
        saved.vis = "viewer"
        saved.logging.local_writer.enable = True
        saved.pipeline.teacher_checkpoint = None  # type: ignore[attr-defined]  of training alone
        manager: Any = saved.pipeline.datamanager
        if self.data_path is not None:
            manager.data = manager.dataparser.data = self.data_path
        return saved


class RunHook:
    """Writes loss terms and validations to metrics.jsonl and shows the bar, by callbacks of nerfstudio's Trainer."""

    def __init__(self, context: RunContext, stage: str, intervals: Intervals, trainer: Trainer, total: int):
        self.context, self.stage, self.intervals, self.trainer = context, stage, intervals, trainer
        self.total, self.start = total, trainer._start_step
        self.log = TermLog(context, stage, intervals.log)
        self.weights: dict[str, float] = {}
        self.window = -1
        self.curve: list[dict[str, float]] = []
        self.seconds, self.since = 0.0, 0.0
        self.kept = trainer.base_dir / CURVE
        before, after = TrainingCallbackLocation.BEFORE_TRAIN_ITERATION, TrainingCallbackLocation.AFTER_TRAIN_ITERATION
        trainer.callbacks.insert(0, TrainingCallback([before], self.before))
        trainer.callbacks.append(TrainingCallback([after], self.after))

    def __enter__(self) -> RunHook:
        first = next(iter(self.trainer.optimizers.optimizers.values()))
        turn = SimpleNamespace(player=SimpleNamespace(name="student"), optimizer=first)
        self.log.attach(
            SimpleNamespace(turns=[turn], steps=self.total, step=self.start, epoch=0, last_good=self.last_good)
        )
        if self.context.resume:
            forget_lines_after(self.context, self.stage, self.start, evaluates_again=False)
            self._recall()
        self.log.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.log.__exit__(*error)

    def _recall(self) -> None:
        if self.start and self.kept.is_file():
            self.curve = [point for point in json.loads(self.kept.read_text()) if point["step"] <= self.start]
            self.seconds = self.curve[-1]["seconds"] if self.curve else 0.0
            self.context.say(f"{self.stage}: resumed at step {self.start} of {self.total}")

    def last_good(self) -> Path | None:
        found = sorted(self.trainer.checkpoint_dir.glob("step-*.ckpt"))
        return found[-1] if found else None

    # ------------------------------------------------------------ callbacks; step counts from 0

    def before(self, step: int) -> None:
        self.since = time.perf_counter()

    def after(self, step: int) -> None:
        pipeline: Any = self.trainer.pipeline
        if self.trainer.device.startswith("cuda"):
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self.since
        done = step + 1
        rays = torch.empty(self.trainer.pipeline.datamanager.get_train_rays_per_batch())
        self.log.record(done, "student", self.steady(pipeline.terms, step), rays)
        self.log.step_done(done, 0)
        if done % self.intervals.evaluate == 0 or done == self.total:
            self.evaluate(done)
        if step and step % self.intervals.save == 0:  # nerfstudio's rule for a checkpoint
            self.log.flush()  # a non-finite loss must stop the run before it becomes a checkpoint

    def steady(self, terms: LossTerms, step: int) -> LossTerms:
        """The terms with the weights of the first step of this line of the log, where they change every step."""
        window = step // self.intervals.log
        if window != self.window or self.weights.keys() != terms.keys():
            self.window, self.weights = window, {name: weight for name, (weight, _) in terms.items()}
        return LossTerms({name: (self.weights[name], value) for name, (_, value) in terms.items()})

    def evaluate(self, done: int) -> None:
        """PSNR and SSIM on the evaluation photographs; its time does not count."""
        self.log.flush()
        metrics = mean_metrics(self.trainer.pipeline)
        point = {"step": done, "seconds": round(self.seconds, 3), **metrics}
        self.curve.append(point)
        self.kept.parent.mkdir(parents=True, exist_ok=True)
        self.kept.write_text(json.dumps(self.curve))
        values = {**metrics, "train_seconds": self.seconds}
        self.context.log(kind="eval", stage=self.stage, step=done, epoch=0, metrics=values)
        self.log.show_metrics(metrics)
        if done == self.total:
            self.profile(done)

    def profile(self, step: int) -> None:
        """The curves over wall-clock time, for the report."""
        labels = [f"{point['seconds']:.1f} s" for point in self.curve]
        for name in ("psnr", "ssim"):
            values = [point[name] for point in self.curve]
            title = f"{name} over seconds of training"
            self.context.log(kind="profile", name=title, stage=self.stage, step=step, x=labels, values=values)


def mean_metrics(pipeline: Any) -> dict[str, float]:
    """Means over the evaluation photographs of a pipeline."""
    pipeline.eval()
    rows = []
    for camera, batch in pipeline.datamanager.fixed_indices_eval_dataloader:
        outputs = pipeline.model.get_outputs_for_camera(camera)
        truth = pipeline.model.truth(batch["image"]).to(outputs["rgb"])
        rows.append(image_metrics(outputs["rgb"], truth))
    pipeline.train()
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, nerfstudio's console says nothing, nor do warnings about its code; its writers end with the block."""
    kept = CONSOLE.quiet
    CONSOLE.quiet = True
    writers = list(writer.EVENT_WRITERS)
    try:
        with warnings.catch_warnings():  # about nerfstudio's own code
            for kind in (FutureWarning, UserWarning):
                warnings.filterwarnings("ignore", category=kind, module=r"nerfstudio\.|torch\.utils\.data")
            yield
    finally:
        CONSOLE.quiet = kept
        writer.EVENT_WRITERS[:] = writers
        writer.EVENT_STORAGE.clear()

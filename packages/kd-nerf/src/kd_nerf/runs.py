"""The run config of radiance fields, and the stages and evaluation that its methods share.

teacher    trained on the photographs once and cached, or the field of a nerfstudio checkpoint
student    trained by the method from rays of random cameras, or from the photographs as a baseline
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from pydantic import Field, model_validator

from kd_nerf import __version__
from kd_nerf.data import SCENE, DataConfig, existing_root, folder_of, parser_config, views
from kd_nerf.engine.fields import FieldConfig, make_field
from kdcore.config import Config, MethodConfig, MethodRunConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from kdcore.errors import InputError
from kdcore.method import Method
from kdcore.stages import Artefacts, CachedStage, Procedure, RunContext, Stage, replace_folder

A = TypeVar("A", bound=MethodConfig)


class FieldTrain(TrainConfig):
    """Training by nerfstudio's Trainer: `steps` is the budget, `batch_size` counts rays; no epochs."""

    batch_size: int = Field(4096, ge=1, description="rays per step")
    optimizer: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(name="adamw", lr=1e-2, betas=(0.9, 0.99), eps=1e-15, weight_decay=0.01),
        description="of what stores the scene (tables, planes, grids)",
    )
    network_lr: float | None = Field(
        None, gt=0, description="rate of the nets; null: 1e-3 for mlp, vm and cp fields, else 1e-2"
    )
    schedule: ScheduleConfig = Field(
        default_factory=lambda: ScheduleConfig(name="cosine", min_ratio=0.007), description="constant or cosine"
    )
    eval_every: int = Field(1000, ge=1, description="steps between two validations")

    @model_validator(mode="after")
    def _of_nerfstudio(self) -> FieldTrain:
        if self.steps is None:
            raise ValueError("needs steps: fields are trained without epochs")
        if self.optimizer.name != "adamw" or self.schedule.name not in ("constant", "cosine"):
            raise ValueError("optimizer.name: allowed: adamw; schedule.name: allowed: constant, cosine")
        for name in ("ema", "clip", "patience", "monitor"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name}: is not available here, nerfstudio's Trainer trains")
        return self


class TeacherConfig(FieldConfig):
    train: FieldTrain | None = Field(None, description="how to train it on the photographs; null: give checkpoint")
    checkpoint: str | None = Field(None, description="a .ckpt file or the folder of a nerfstudio run")
    stock_contraction: bool = Field(True, description="whether a nerfacto checkpoint contracts space")

    @model_validator(mode="after")
    def _has_weights(self) -> TeacherConfig:
        if (self.train is None) == (self.checkpoint is None):
            raise ValueError("has no weights: give either train, or checkpoint")
        return self


class RenderConfig(Config):
    """The paper's marching: up to 1024 samples a ray, a grid of 128^3 cells, density 10."""

    samples: int = Field(1024, ge=1, description="samples per ray, before those in empty cells are left out")
    occupancy_resolution: int = Field(128, ge=2, le=512, description="cells per axis of the occupancy grid")
    occupancy_threshold: float = Field(10.0, gt=0, description="density above which a cell is always kept")
    occupancy_warmup: int = Field(256, ge=0, description="steps on photographs before the first cell is left out")
    eval_rays: int = Field(4096, ge=1, description="rays per chunk in evaluation")


class NerfRun(MethodRunConfig[A], Generic[A]):
    """The config of a run: two fields, the photographs, the renderer, the method's arguments and the budget."""

    teacher: TeacherConfig
    student: FieldConfig
    data: DataConfig = Field(default_factory=lambda: DataConfig.model_validate({}))
    render: RenderConfig = Field(default_factory=RenderConfig)
    train: FieldTrain = Field(
        default_factory=lambda: FieldTrain.model_validate({"steps": 30000}), description="training of the student"
    )
    export: list[Literal["nerfacto"]] = Field(
        default_factory=list,
        description="written to export/: a nerfacto student as a run of nerfstudio's method, which needs no kd-nerf",
    )

    @model_validator(mode="after")
    def _can_be_exported(self) -> NerfRun[A]:
        if self.export and self.student.architecture != "nerfacto":
            raise ValueError(
                f"export = {self.export}: student.architecture = '{self.student.architecture}' is no field of "
                "nerfstudio's; allowed: nerfacto"
            )
        return self


Run = NerfRun[Any]


# ---------------------------------------------------------------- stages


def trainer_config(
    config: Run, field: FieldConfig, train: FieldTrain, method_args: Mapping[str, Any], data: Path
) -> Any:
    """nerfstudio's trainer config of one training."""
    from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManagerConfig

    from kd_nerf.integrations import plugin
    from kd_nerf.integrations.model import RadianceModelConfig
    from kd_nerf.integrations.pipeline import PVDPipelineConfig
    from kd_nerf.integrations.settings import FieldSettings, PVDSettings, untyped
    from kd_nerf.integrations.trainer import ResumableTrainerConfig

    render, steps = config.render, train.steps or 1
    rates = {"encodings": train.optimizer.lr, "networks": train.network_lr or plugin.network_rate(field.architecture)}
    optimizers = {}
    for name, rate in rates.items():
        final = train.schedule.min_ratio * train.optimizer.lr
        optimizers[name] = plugin.group(rate, steps, lr_final=final, shape=train.schedule.name)
        for key in ("betas", "eps", "weight_decay"):
            setattr(optimizers[name]["optimizer"], key, getattr(train.optimizer, key))
    return ResumableTrainerConfig(
        method_name=plugin.METHOD_NAME,
        max_num_iterations=steps,
        mixed_precision=train.precision == "fp16",
        save_only_latest_checkpoint=True,
        pipeline=PVDPipelineConfig(
            datamanager=VanillaDataManagerConfig(
                data=data,
                dataparser=parser_config(config.data, data),
                train_num_rays_per_batch=train.batch_size,
                eval_num_rays_per_batch=train.batch_size,
                camera_res_scale_factor=config.data.scale,
            ),
            model=RadianceModelConfig(
                field=untyped(FieldSettings, field),
                samples=render.samples,
                occupancy_resolution=render.occupancy_resolution,
                occupancy_threshold=render.occupancy_threshold,
                occupancy_warmup=render.occupancy_warmup,
                eval_num_rays_per_chunk=render.eval_rays,
                collider_params={"near_plane": config.data.near, "far_plane": config.data.far},
            ),
            pvd=PVDSettings(**method_args),
        ),
        optimizers=optimizers,
    )


def intervals(train: FieldTrain) -> Any:
    from kd_nerf.integrations.stage import Intervals

    return Intervals(train.log_every, train.eval_every, train.checkpoint_every)


def data_path(config: Run) -> Path | None:
    """What config.yml of an artefact says: relative to the run for the embedded scene."""
    return Path(SCENE) if config.data.name == "scene" else existing_root(config.data).resolve()


def teacher_stage(config: Run) -> Stage:
    """Gives the artefact `teacher`: a checkpoint copied into the run, or a field trained once and cached."""
    teacher = config.teacher

    def copied(context: RunContext) -> Artefacts:
        from kd_nerf.integrations.teachers import find_checkpoint

        source = find_checkpoint(Path(teacher.checkpoint or ""), "teacher.checkpoint")
        target = context.folder / "teacher"
        replace_folder(target, lambda folder: shutil.copy2(source, folder / source.name))
        return {"teacher": target}

    if teacher.train is None:
        return Procedure("teacher", copied)
    train = teacher.train
    from kd_nerf.integrations.stage import NerfstudioStage

    def build(context: RunContext) -> Any:
        data = folder_of(config.data, context.folder)
        return trainer_config(config, teacher, train, {"from_scratch": True}, data)

    stage = NerfstudioStage("teacher", build, intervals(train), "teacher", data_path(config))
    identity = {
        "version": __version__,
        "torch": torch.__version__,
        "field": teacher.model_dump(mode="json"),
        "data": config.data.model_dump(mode="json"),
        "render": config.render.model_dump(mode="json"),
        "seed": config.seed,
    }
    return CachedStage(stage, identity)


def student_stage(config: Run) -> Stage:
    """Trains the student by the method; gives the artefact `student`, a nerfstudio run's folder."""
    from kd_nerf.integrations.stage import NerfstudioStage

    def build(context: RunContext) -> Any:
        data = folder_of(config.data, context.folder)
        made = trainer_config(config, config.student, config.train, config.method_args.model_dump(), data)
        made.pipeline.teacher_checkpoint = context.artefacts["teacher"]
        made.pipeline.teacher_contraction = config.teacher.stock_contraction
        return made

    return NerfstudioStage("student", build, intervals(config.train), "student", data_path(config))


def export_stage(config: Run) -> Stage:
    """Writes export/nerfacto/nerfstudio/, whose config.yml names nerfstudio's own classes alone."""

    def run(context: RunContext) -> Artefacts:
        from kd_nerf.integrations.export import export_nerfacto

        data = folder_of(config.data, context.folder)
        made = trainer_config(config, config.student, config.train, config.method_args.model_dump(), data)
        export_nerfacto(context.artefacts["student"], made, context.folder / "export", data=data_path(config))
        return {"export": context.folder / "export"}

    return Procedure("export", run)


def check(config: Run) -> None:
    """Says what is wrong with fields and data before anything trains."""
    if config.data.name != "scene":
        existing_root(config.data)
    if config.teacher.checkpoint is not None:
        from kd_nerf.integrations.teachers import find_checkpoint

        find_checkpoint(Path(config.teacher.checkpoint), "teacher.checkpoint")
    elif config.teacher.contraction != config.student.contraction:
        raise InputError(
            f"student.contraction = {config.student.contraction}: the teacher's is {config.teacher.contraction}; "
            "both fields have to map the same space"
        )
    with torch.random.fork_rng(devices=[]):
        box = torch.tensor([[-1.0] * 3, [1.0] * 3])
        make_field(config.student.model_copy(update={"resolution": 2, "log2_size": 4, "width": 4}), box)


# ---------------------------------------------------------------- evaluation


def open_models(config: Run, artefacts: Artefacts) -> tuple[dict[str, Any], Any]:
    """The saved models by role, and the test views."""
    from kd_nerf.integrations.evaluation import open_model

    run = artefacts["student"].parent
    test = views(config.data, folder_of(config.data, run))
    return {role: open_model(config, artefacts[role], test.scene_box, role) for role in ("teacher", "student")}, test


def evaluate(config: Run, artefacts: Artefacts) -> dict[str, Any]:
    """PSNR and SSIM of teacher and student on the test views, and how close the student's field is to the teacher's.

    student/psnr_to_teacher: of its views against the teacher's; logit_gap: mean |q_S - q_T| at random points of
    occupied space; train_seconds and seconds_to_teacher_minus_3db: of the training, the latter only once reached.
    """
    from kd_nerf.integrations.evaluation import compare_models
    from kd_nerf.integrations.stage import quiet

    with quiet():
        result = compare_models(*open_models(config, artefacts))
    curve = json.loads((artefacts["student"] / "curve.json").read_text())
    result["student/train_seconds"] = curve[-1]["seconds"]
    goal = result["teacher/psnr"] - 3
    reached = next((point for point in curve if point["psnr"] >= goal), None)
    if reached is not None:
        result["student/seconds_to_teacher_minus_3db"] = reached["seconds"]
        result["student/steps_to_teacher_minus_3db"] = reached["step"]
    return result


def predict(config: Run, artefacts: Artefacts, count: int) -> list[dict[str, Any]]:
    """Rows of truth, teacher, student and their errors on test views, for the report."""
    from kd_nerf.integrations.evaluation import rows
    from kd_nerf.integrations.stage import quiet

    with quiet():
        return rows(*open_models(config, artefacts), count)


# ---------------------------------------------------------------- registration


def nerf_method(key: str, doc: str | None, arguments: type[A]) -> Method[Any]:
    """A method of a teacher and a student that nerfstudio's Trainer trains through the method's pipeline."""

    def stages(config: Run, context: RunContext) -> list[Stage]:
        check(config)
        made = [teacher_stage(config), student_stage(config)]
        return [*made, export_stage(config)] if config.export else made

    return Method(key, doc or "", NerfRun[arguments], stages, evaluate, predict)

"""The run config of 3D detection and the stages that its methods share.

A config is a Python file of mmengine, with `_base_` where it builds on another. Its sections are those of mmengine's
Runner; `method`, `seed`, `compare` and `teacher_training` are ours. The arguments of the method stand where
the Runner reads them, in `model.distiller`; `kd` shows and overrides them as `method_args`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from pydantic import Field, model_validator

from kd_detection3d import __version__, scenes
from kdcore.config import Config, MethodConfig, MethodRunConfig, TrainConfig
from kdcore.errors import InputError
from kdcore.method import Method
from kdcore.stages import Artefacts, CachedStage, Procedure, RunContext, Stage
from kdcore.state_files import load_strictly

A = TypeVar("A", bound=MethodConfig)
Section = dict[str, Any]


class TeacherTraining(Config):
    """How teachers without a checkpoint are trained before the student; sections as in mmengine."""

    train_cfg: Section = Field(description="the loop: type, max_iters")
    optim_wrapper: Section = Field(description="the optimiser")
    param_scheduler: list[Section] = Field(default_factory=list, description="learning-rate schedules")
    train_dataloader: Section | None = Field(None, description="its data; None: the student's")


class DetectionRun(MethodRunConfig[A], Generic[A]):
    """The config of a run: mmengine's sections, and how teachers come by their weights."""

    train: TrainConfig = Field(
        default_factory=lambda: TrainConfig.model_validate({"epochs": 1}),
        exclude=True,
        description="not used here: the budget is train_cfg, the optimiser optim_wrapper, the batch train_dataloader",
    )
    model: Section = Field(description="DistilledDetector3D: student and teachers as stock config dicts, checkpoints")
    teacher_training: TeacherTraining | None = Field(None, description="training of teachers without a checkpoint")
    train_dataloader: Section = Field(description="data, sampler and batch size of the training")
    train_cfg: Section = Field(description="the loop: type, max_iters, val_interval")
    optim_wrapper: Section = Field(description="optimiser, clipping, mixed precision, accumulation")
    param_scheduler: list[Section] = Field(default_factory=list, description="learning-rate schedules")
    val_dataloader: Section | None = Field(None, description="data of the validations during training")
    val_cfg: Section | None = Field(None, description="loop of the validations")
    val_evaluator: Section | list[Section] | None = Field(None, description="metrics of the validations")
    test_dataloader: Section = Field(description="data that the finished networks are measured on")
    test_cfg: Section | None = Field(None, description="loop of mmengine's own test; `kd` does not need it")
    test_evaluator: Section | list[Section] | None = Field(None, description="metrics of mmengine's own test")
    default_hooks: Section = Field(default_factory=dict, description="logger.interval, checkpoint.interval, others")
    custom_hooks: list[Section] = Field(default_factory=list, description="further hooks")
    custom_imports: Section | None = Field(None, description="modules that register classes")
    default_scope: str = Field("mmdet3d", description="registry in which types are looked up")
    env_cfg: Section = Field(default_factory=dict, description="cudnn_benchmark, mp_cfg, dist_cfg")
    visualizer: Section | None = Field(None, description="mmengine's visualizer")
    log_processor: Section | None = Field(None, description="mmengine's log processor")
    log_level: str | None = Field(None, description="of mmengine's logger, outside `kd`")
    auto_scale_lr: Section | None = Field(None, description="mmengine's linear scaling of the rate with the batch")
    load_from: str | None = Field(None, description="weights of the whole distiller to start from")
    find_unused_parameters: bool = Field(True, description="of DDP")
    work_dir: str | None = Field(None, description="mmengine's folder, outside `kd`")

    @model_validator(mode="before")
    @classmethod
    def _budget_is_mmengines(cls, values: Any) -> Any:
        if isinstance(values, dict) and "train" in values and not isinstance(values["train"], TrainConfig):
            raise ValueError(
                "takes no 'train' section: the budget is train_cfg.max_iters, the rate optim_wrapper.optimizer.lr, "
                "the batch train_dataloader.batch_size"
            )
        return values


Run = DetectionRun[Any]

RUNNER_SECTIONS = (
    *("train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler", "val_dataloader", "val_cfg"),
    *("val_evaluator", "test_dataloader", "test_cfg", "test_evaluator", "default_hooks", "custom_hooks"),
    *("custom_imports", "default_scope", "env_cfg", "visualizer", "log_processor", "auto_scale_lr", "load_from"),
    "find_unused_parameters",
)


def read_config(path: Path) -> dict[str, Any]:
    """The sections of a Python config; `method_args` are what `model.distiller` holds besides its type.

    Helper variables of the file are left out. Raises InputError where one looks like a misspelt section.
    """
    from mmengine.config import Config as MMConfig

    try:
        values = MMConfig.fromfile(path, import_custom_modules=False, format_python_code=False).to_dict()
    except (OSError, ValueError, SyntaxError, NameError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"config {path}: mmengine cannot read it ({' '.join(str(error).split())})") from None
    known = list(DetectionRun.model_fields)
    for name in values:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.87)
        if name not in known and near:
            raise InputError(f"config {path}: '{name}' is no section; did you mean '{near[0]}'?")
    sections = {name: value for name, value in values.items() if name in known and value is not None}
    distiller = dict(sections.get("model", {}).pop("distiller", None) or {})
    distiller.pop("type", None)
    sections["method_args"] = {**distiller, **sections.get("method_args", {})}
    if isinstance(sections.get("param_scheduler"), dict):
        sections["param_scheduler"] = [sections["param_scheduler"]]
    return sections


# ---------------------------------------------------------------- the Runner's config


def runner_sections(config: Run, **changes: Any) -> dict[str, Any]:
    """The Runner's sections of a run config, with `changes`."""
    values = {name: getattr(config, name) for name in RUNNER_SECTIONS}
    return {**{name: value for name, value in values.items() if value is not None}, **changes}


def student_model(config: Run, distiller: Section, artefacts: Mapping[str, Path]) -> dict[str, Any]:
    """`model` of the student's training, with the teachers that earlier stages left."""
    from kd_detection3d.integrations.networks import WEIGHTS

    teachers = {
        name: {
            "model": teacher_model(name, section),
            "checkpoint": str(artefacts[artefact(name)] / WEIGHTS),
        }
        for name, section in teacher_models(config).items()
    }
    return {"type": "DistilledDetector3D", **config.model, "teachers": teachers, "distiller": distiller}


def teacher_models(config: Run) -> dict[str, Section]:
    return dict(config.model.get("teachers") or {})


def teacher_model(name: str, section: Section) -> Section:
    from kd_detection3d.integrations import networks

    return networks.teacher_model(section, f"model.teachers.{name}")


def artefact(teacher: str) -> str:
    """Name of a teacher's folder: `teacher`, or `teacher_<name>`."""
    return teacher if teacher == "teacher" else f"teacher_{teacher}"


# ---------------------------------------------------------------- stages


def student_stage(config: Run, distiller: Section) -> Stage:
    """Trains the student under a registered distiller; gives the artefact `student`, a stock mmdet3d checkpoint."""
    from kd_detection3d.integrations.stage import MMEngineStage, RunnerSetup

    def build(context: RunContext) -> RunnerSetup:
        model = student_model(config, distiller, context.artefacts)
        return RunnerSetup(runner_sections(config, model=model), saver(config, config.model["student"]))

    return MMEngineStage("student", build)


def saver(config: Run, model: Mapping[str, Any]) -> Callable[[Any, Mapping[str, Any] | None, Path], None]:
    """Writes the trained model's student, or a network itself, as a stock checkpoint."""
    from kd_detection3d.integrations import networks
    from kd_detection3d.integrations.hooks import stock_dataset

    def save(trained: Any, meta: Mapping[str, Any] | None, folder: Path) -> None:
        network = getattr(trained, "student", trained)
        data = stock_dataset({"test_dataloader": config.test_dataloader}, networks.sensors(network))
        networks.save(folder, network, model, data, dataset_meta=meta)

    return save


def teacher_stage(config: Run, name: str, section: Section) -> Stage:
    """Gives the artefact `teacher` or `teacher_<name>`: its checkpoint copied into the run, or trained and cached."""
    from kd_detection3d.integrations import networks
    from kd_detection3d.integrations.stage import MMEngineStage, RunnerSetup

    field, target = f"model.teachers.{name}", artefact(name)
    model = teacher_model(name, section)

    def from_checkpoint(context: RunContext) -> Artefacts:
        network = networks.build(networks.without_initialisation(model), field)
        load_strictly(network, section["checkpoint"], f"{field}.checkpoint")
        if context.is_main:
            saver(config, model)(network, {"classes": networks.class_names(network)}, context.folder / target)
        context.accelerator.wait_for_everyone()
        return {target: context.folder / target}

    if section.get("checkpoint"):
        return Procedure(target, from_checkpoint)
    training = config.teacher_training
    if training is None:
        raise InputError(f"{field}.checkpoint: the teacher has no weights; give a checkpoint, or teacher_training")
    changes = {key: getattr(training, key) for key in ("train_cfg", "optim_wrapper", "param_scheduler")}
    loader = training.train_dataloader or config.train_dataloader

    def build(context: RunContext) -> RunnerSetup:
        sections = runner_sections(config, **changes, train_dataloader=loader, custom_hooks=[], load_from=None)
        sections["model"] = {"type": "DistilledDetector3D", "student": model, "distiller": {"type": "Supervised"}}
        return RunnerSetup(sections, saver(config, model))

    identity = {
        "version": __version__,
        "scenes": scenes.VERSION,
        "torch": torch.__version__,
        "model": model,
        "training": training.model_dump(mode="json"),
        "data": loader,
        "test_data": config.test_dataloader["dataset"],
        "seed": config.seed,
    }
    return CachedStage(MMEngineStage(target, build, artefact=target), identity)


def check(config: Run, distiller: Section) -> None:
    """Builds networks, distiller and data sets, so that what is wrong with them is said before anything trains."""
    from kd_detection3d import integrations  # noqa: F401  registers
    from kd_detection3d.integrations import detector, networks
    from kd_detection3d.integrations.stage import check_dataset, check_frame, quiet_mmengine
    from kdcore.distiller import freeze

    unknown = set(config.model) - {"type", "student", "teachers"}
    if unknown:
        raise InputError(f"model.{min(unknown)}: unknown; allowed: student, teachers")
    if "student" not in config.model:
        raise InputError("model.student: is required, a stock config dict of mmdet3d")
    with quiet_mmengine(), torch.random.fork_rng(devices=[]):
        student = networks.build(networks.without_initialisation(config.model["student"]), "model.student")
        teachers = torch.nn.ModuleDict()
        for name, section in teacher_models(config).items():
            field = f"model.teachers.{name}"
            network = networks.build(networks.without_initialisation(teacher_model(name, section)), field)
            detector.check_classes(student, network, field)
            if section.get("checkpoint"):
                load_strictly(network, section["checkpoint"], f"{field}.checkpoint")
            teachers[name] = freeze(network)
        detector.make_distiller(distiller, student, teachers)
        for field in ("train_dataloader", "test_dataloader"):
            data = check_dataset(getattr(config, field)["dataset"], f"{field}.dataset")
            check_classes_of_data(student, data, f"{field}.dataset")
            check_frame(data, f"{field}.dataset")


def check_classes_of_data(student: Any, data: Any, field: str) -> None:
    """Raises InputError where the student has other classes than the data set."""
    from kd_detection3d.integrations.networks import class_names

    names, own = list(data.metainfo.get("classes") or ()), class_names(student)
    if names and own is not None and own != names:
        raise InputError(
            f"model.student: has {len(own)} classes ({', '.join(own)}), {field} has {len(names)} ({', '.join(names)}); "
            "they agree in number and order"
        )


# ---------------------------------------------------------------- evaluation


def limits_of(config: Run) -> list[float] | None:
    """The area in which boxes are measured: that of the method's maps, where it has one."""
    return getattr(config.method_args, "point_cloud_range", None)


def evaluate(config: Run, artefacts: Artefacts) -> dict[str, Any]:
    """AP by centre distance, errors of the matched boxes and size of student and teachers on the test data."""
    from kd_detection3d import integrations  # noqa: F401  registers
    from kd_detection3d import metrics as m
    from kd_detection3d.integrations.evaluation import measure, open_networks, parameters

    networks = open_networks(artefacts)
    section = config.test_dataloader["dataset"]
    result: dict[str, Any] = {}
    for role, found in measure(networks, config, section, "test_dataloader.dataset", limits_of(config)).items():
        result.update(m.prefixed(role, found))
        result[f"{role}/parameters"] = parameters(networks[role])
    return result


def predict(config: Run, artefacts: Artefacts, count: int) -> list[dict[str, Any]]:
    """Rows of a camera's picture and views from above, with truth, teachers and student, for the report."""
    from kd_detection3d import integrations  # noqa: F401  registers
    from kd_detection3d.integrations.evaluation import open_networks, rows

    section = config.test_dataloader["dataset"]
    limits = limits_of(config) or [-54.0, -54.0, -5.0, 54.0, 54.0, 3.0]
    return rows(open_networks(artefacts), config, section, "test_dataloader.dataset", limits, count)


# ---------------------------------------------------------------- registration


def detection_method(
    key: str,
    doc: str | None,
    arguments: type[A],
    distiller: str,
    *,
    evaluation: Callable[[Any, Artefacts], dict[str, Any]] = evaluate,
) -> Method[Any]:
    """A method of teachers, then student, under a registered distiller with `method_args`."""

    def stages(config: Run, context: RunContext) -> list[Stage]:
        named = {"type": distiller, **config.method_args.model_dump(mode="python")}
        check(config, named)
        teachers = [teacher_stage(config, name, section) for name, section in teacher_models(config).items()]
        return [*teachers, student_stage(config, named)]

    return Method(key, doc or "", DetectionRun[arguments], stages, evaluation, predict, read=read_config)

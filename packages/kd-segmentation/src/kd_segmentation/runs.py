"""The run config of segmentation and the stages that its methods share.

A config is a Python file of mmengine, with `_base_` where it builds on another. Its sections are those of mmengine's
Runner; `method`, `seed`, `compare`, `teacher_training` and `domains` are ours. The arguments of the method stand where
the Runner reads them, in `model.distiller`; `kd` shows and overrides them as `method_args`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from pydantic import Field, model_validator

from kd_segmentation import __version__, textures
from kdcore.config import Config, MethodConfig, MethodRunConfig, TrainConfig
from kdcore.errors import InputError
from kdcore.method import Method
from kdcore.stages import Artefacts, CachedStage, Procedure, RunContext, Stage
from kdcore.state_files import load_strictly

A = TypeVar("A", bound=MethodConfig)
Section = dict[str, Any]


class TeacherTraining(Config):
    """How teachers without a checkpoint are trained before the student; sections as in mmengine."""

    algorithm: Literal["supervised", "cps"] = Field(
        "supervised", description="the labels alone, or cross pseudo supervision with the unlabelled streams"
    )
    cps_start: int = Field(0, ge=0, description="iterations on the labels alone before cps; 0 with pre-trained weights")
    train_cfg: Section = Field(description="the loop: type, max_iters")
    optim_wrapper: Section = Field(description="the optimiser")
    param_scheduler: list[Section] = Field(default_factory=list, description="learning-rate schedules")
    train_dataloader: Section | None = Field(None, description="its data; None: the student's")
    seed: int | None = Field(
        None, ge=0, description="its own, so that runs of all seeds have one teacher; None: the run's"
    )


class SegmentationRun(MethodRunConfig[A], Generic[A]):
    """The config of a run: mmengine's sections, and how teachers come by their weights."""

    train: TrainConfig = Field(
        default_factory=lambda: TrainConfig.model_validate({"epochs": 1}),
        exclude=True,
        description="not used here: the budget is train_cfg, the optimiser optim_wrapper, the batch train_dataloader",
    )
    model: Section = Field(description="DistilledSegmentor: student and teachers as stock config dicts, checkpoints")
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
    domains: dict[str, Section] = Field(
        default_factory=dict, description="further test domains: name -> keys that replace those of the test data set"
    )
    default_hooks: Section = Field(default_factory=dict, description="logger.interval, checkpoint.interval, others")
    custom_hooks: list[Section] = Field(default_factory=list, description="further hooks, such as StudentEMAHook")
    custom_imports: Section | None = Field(None, description="modules that register classes")
    default_scope: str = Field("mmseg", description="registry in which types are looked up")
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


Run = SegmentationRun[Any]

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
    known = list(SegmentationRun.model_fields)
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
    from kd_segmentation.integrations.networks import CONFIG, WEIGHTS

    teachers = {
        name: {
            "config": str(artefacts[artefact(name)] / CONFIG),
            "checkpoint": str(artefacts[artefact(name)] / WEIGHTS),
        }
        for name in teacher_models(config)
    }
    return {"type": "DistilledSegmentor", **config.model, "teachers": teachers, "distiller": distiller}


def teacher_models(config: Run) -> dict[str, Section]:
    return dict(config.model.get("teachers") or {})


def artefact(teacher: str) -> str:
    """Name of a teacher's folder: `teacher`, or `teacher_<name>`."""
    return teacher if teacher == "teacher" else f"teacher_{teacher}"


def stock_model(config: Run, model: Mapping[str, Any]) -> dict[str, Any]:
    """A network's config dict with the run's data preprocessor where it has none."""
    preprocessor = config.model.get("data_preprocessor") or config.model["student"].get("data_preprocessor")
    kept = {**model}
    if not kept.get("data_preprocessor"):
        kept["data_preprocessor"] = preprocessor
    return kept


# ---------------------------------------------------------------- stages


def student_stage(config: Run, distiller: Section, *, name: str = "student", **changes: Any) -> Stage:
    """Trains the student under a registered distiller; gives the artefact `student`, a stock mmseg checkpoint."""
    from kd_segmentation.integrations.stage import MMEngineStage, RunnerSetup

    def build(context: RunContext) -> RunnerSetup:
        model = student_model(config, distiller, context.artefacts)
        return RunnerSetup(runner_sections(config, model=model, **changes), saver(config, config.model["student"]))

    return MMEngineStage(name, build)


def saver(config: Run, model: Mapping[str, Any]) -> Callable[[Any, Mapping[str, Any], Path], None]:
    """Writes the trained model's student as a stock checkpoint."""
    from kd_segmentation.integrations import networks
    from kd_segmentation.integrations.hooks import inference_pipeline

    def save(trained: Any, meta: Mapping[str, Any], folder: Path) -> None:
        networks.save(
            folder,
            trained.student,
            stock_model(config, model),
            dataset_meta=meta,
            test_pipeline=inference_pipeline({"test_dataloader": config.test_dataloader}),
            modules=(config.custom_imports or {}).get("imports", ()) if needs_imports(model) else (),
        )

    return save


def needs_imports(model: Any) -> bool:
    """Whether a network's config names a class of ours."""
    from mmseg.registry import MODELS

    if isinstance(model, Mapping):
        kind = MODELS.get(model["type"]) if isinstance(model.get("type"), str) else None
        ours = kind is not None and not kind.__module__.startswith(("mmseg.", "mmengine.", "mmcv.", "torch", "mmdet."))
        return ours or any(needs_imports(value) for value in model.values())
    return isinstance(model, list | tuple) and any(needs_imports(value) for value in model)


def teacher_stages(config: Run) -> list[Stage]:
    """A stage for every teacher: its checkpoint copied into the run, or trained once and cached."""
    return [teacher_stage(config, name, section) for name, section in teacher_models(config).items()]


def teacher_stage(config: Run, name: str, section: Section) -> Stage:
    """Gives the artefact `teacher` or `teacher_<name>`, a saved network."""
    from kd_segmentation.integrations import networks
    from kd_segmentation.integrations.hooks import inference_pipeline
    from kd_segmentation.integrations.stage import MMEngineStage, RunnerSetup

    field, target = f"model.teachers.{name}", artefact(name)
    model = networks.teacher_model(section, field)
    pipeline = inference_pipeline({"test_dataloader": config.test_dataloader})

    def from_checkpoint(context: RunContext) -> Artefacts:
        network = networks.build(networks.without_initialisation(stock_model(config, model)), field)
        meta = load_strictly(network, section["checkpoint"], f"{field}.checkpoint")
        if context.is_main:
            networks.save(
                context.folder / target,
                network,
                stock_model(config, model),
                dataset_meta=meta.get("dataset_meta"),
                test_pipeline=pipeline,
            )
        context.accelerator.wait_for_everyone()
        return {target: context.folder / target}

    if section.get("checkpoint"):
        return Procedure(target, from_checkpoint)
    training = config.teacher_training
    if training is None:
        raise InputError(f"{field}.checkpoint: the teacher has no weights; give a checkpoint, or teacher_training")
    cps = {"type": "CPS", "start": training.cps_start}
    distiller = cps if training.algorithm == "cps" else {"type": "TappedDistiller"}
    changes = {key: getattr(training, key) for key in ("train_cfg", "optim_wrapper", "param_scheduler")}
    loader = training.train_dataloader or config.train_dataloader
    seed = config.seed if training.seed is None else training.seed

    def build(context: RunContext) -> RunnerSetup:
        sections = runner_sections(config, **changes, train_dataloader=loader, custom_hooks=[], load_from=None)
        network = stock_model(config, model)
        sections["model"] = {"type": "DistilledSegmentor", "student": network, "distiller": distiller}
        return RunnerSetup(sections, saver(config, model))

    identity = {
        "version": __version__,
        "textures": textures.VERSION,
        "torch": torch.__version__,
        "model": stock_model(config, model),
        "training": training.model_dump(mode="json", exclude={"seed"}),
        "data": loader,
        "test_pipeline": pipeline,
        "seed": seed,
    }
    return CachedStage(MMEngineStage(target, build, artefact=target, seed=seed), identity)


def check(config: Run, distiller: Section) -> None:
    """Builds networks, distiller and data sets, so that what is wrong with them is said before anything trains."""
    from kd_segmentation import integrations  # noqa: F401  registers
    from kd_segmentation.integrations import networks, segmentor
    from kd_segmentation.integrations.stage import check_dataset, quiet_mmengine

    unknown = set(config.model) - {"type", "student", "teachers", "data_preprocessor", "same_classes"}
    if unknown:
        raise InputError(f"model.{min(unknown)}: unknown; allowed: data_preprocessor, same_classes, student, teachers")
    if "student" not in config.model:
        raise InputError("model.student: is required, a stock config dict of mmseg")
    with quiet_mmengine(), torch.random.fork_rng(devices=[]):
        student = networks.build(
            networks.without_initialisation(stock_model(config, config.model["student"])), "model.student"
        )
        teachers = torch.nn.ModuleDict()
        for name, section in teacher_models(config).items():
            field = f"model.teachers.{name}"
            model = networks.teacher_model(section, field)
            network = networks.build(networks.without_initialisation(stock_model(config, model)), field)
            if config.model.get("same_classes", True):
                segmentor.check_classes(student, network, field)
            if section.get("checkpoint"):
                load_strictly(network, section["checkpoint"], f"{field}.checkpoint")
            teachers[name] = networks.Teacher(network)
        segmentor.make_distiller(distiller, student, teachers)
        data = check_dataset(config.train_dataloader["dataset"], "train_dataloader.dataset")
        check_classes_of_data(student, data, "train_dataloader.dataset")
        for name, section in measured_sets(config).items():
            check_classes_of_data(student, check_dataset(section, name), name)


def check_classes_of_data(student: Any, data: Any, field: str) -> None:
    """Raises InputError where the student has another number of classes than the data set."""
    from kd_segmentation.integrations.networks import num_classes

    names, own = data.metainfo.get("classes"), num_classes(student)
    if names and own is not None and own != len(names):
        raise InputError(f"model.student: has {own} classes, {field} has {len(names)}: {', '.join(names)}")


def measured_sets(config: Run) -> dict[str, Section]:
    """Field -> data set config of the test data and of every further domain."""
    base = config.test_dataloader["dataset"]
    return {
        "test_dataloader.dataset": base,
        **{f"domains.{name}": {**base, **changes} for name, changes in config.domains.items()},
    }


# ---------------------------------------------------------------- evaluation


def evaluate(config: Run, artefacts: Artefacts) -> dict[str, Any]:
    """IoU by class and its mean of student and teachers on the test data, the mean on every further domain, and what
    `engine.mechanisms` measures where the networks have it."""
    from kd_segmentation import metrics as m
    from kd_segmentation.engine.mechanisms import Complements, TokenSimilarity
    from kd_segmentation.integrations.evaluation import measure, open_networks, parameters

    networks = open_networks(artefacts)
    sets = measured_sets(config)
    complements, tokens = Complements.of(networks), TokenSimilarity.of(networks) if len(sets) > 1 else None
    result: dict[str, Any] = {}
    base, field = sets.pop("test_dataloader.dataset"), "test_dataloader.dataset"
    observers = [observer for observer in (complements, tokens) if observer is not None]
    counts, names = measure(networks, config, base, field, observers)
    if tokens is not None:
        tokens.end_of_set()
    for role, found in counts.items():
        result.update(m.prefixed(role, m.summary(found, names)))
        result[f"{role}/parameters"] = parameters(networks[role])
    for field, section in sets.items():
        shifted, _ = measure(networks, config, section, field, [tokens] if tokens is not None else [])
        if tokens is not None:
            tokens.end_of_set()
        for role, found in shifted.items():
            result[f"{role}/mIoU_{field.removeprefix('domains.')}"] = m.summary(found, names)["mIoU"]
    if sets:
        for role in counts:
            values = [result[f"{role}/mIoU_{field.removeprefix('domains.')}"] for field in sets]
            result[f"{role}/mIoU_unseen"] = sum(values) / len(values)
    for observer in observers:
        result.update(observer.result())
    return {**result, "confusion_matrix": counts["student"], "class_names": list(names)}


def predict(config: Run, artefacts: Artefacts, count: int) -> list[dict[str, Any]]:
    """Rows of image, truth, teachers and student of test images for the report, also from the further domains."""
    from kd_segmentation.integrations.evaluation import open_networks, rows

    networks = open_networks(artefacts)
    sets = list(measured_sets(config).items())
    shares = [count // len(sets) + (index < count % len(sets)) for index in range(len(sets))]
    return [
        item for (field, section), share in zip(sets, shares) for item in rows(networks, config, section, field, share)
    ]


# ---------------------------------------------------------------- registration


def segmentation_method(
    key: str,
    doc: str | None,
    arguments: type[A],
    distiller: str | Callable[[Any], Section],
    *,
    stages: Callable[[Any], Sequence[Stage]] | None = None,
    evaluation: Callable[[Any, Artefacts], dict[str, Any]] | None = None,
) -> Method[Any]:
    """A method of teachers, then student, under a registered distiller with `method_args` (or a function's section)."""

    def named(config: Run) -> Section:
        if not isinstance(distiller, str):
            return distiller(config)
        return {"type": distiller, **config.method_args.model_dump(mode="python")}

    def all_stages(config: Run, context: RunContext) -> list[Stage]:
        check(config, named(config))
        return list(stages(config)) if stages else [*teacher_stages(config), student_stage(config, named(config))]

    run_class = SegmentationRun[arguments]
    return Method(key, doc or "", run_class, all_stages, evaluation or evaluate, predict, read=read_config)

"""The stages that the methods of diffusion distillation share.

`score_method` registers a method with the usual stages: a teacher (a pipeline by name, or one of the embedded worlds,
trained once and cached), a feature network for the metrics, and a student. Methods with other stages build their list
from `prepare`, `student_stage` and `evaluate`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kd_diffusion import __version__
from kd_diffusion import evaluation as ev
from kd_diffusion.config import A, DiffusionRun, Run
from kd_diffusion.data import Data, Samples, load_data, loader
from kd_diffusion.engine.distillation import Networks, ScoreArgs, ScoreDistiller
from kd_diffusion.engine.lora import shared_views
from kd_diffusion.engine.process import EDM
from kd_diffusion.engine.rollout import Renoise, Start
from kd_diffusion.integrations.pipelines import Opened, open_pipeline, sampler_config, save_student
from kd_diffusion.networks import make_networks, open_teacher
from kd_diffusion.snapshots import Snapshots
from kd_diffusion.worlds import world_stages
from kdcore.config import TrainConfig
from kdcore.errors import InputError
from kdcore.method import Method, get
from kdcore.stages import Artefacts, CachedStage, Procedure, RunContext, Stage
from kdcore.training import TrainSetup, TrainStage

Build = Callable[[Any, Networks], ScoreDistiller]
MakeNetworks = Callable[[Run, Opened, Artefacts, Data], Networks]


# ---------------------------------------------------------------- stages


def prepare(config: Run, data: Data) -> list[Stage]:
    """The stages before the student's: the teacher's where it is a world, and the feature network."""
    stages: list[Stage] = []
    if config.teacher.world is not None:
        stages += world_stages(config.teacher.world, data, config.seed)
    if uses_features(config, data):
        stages.append(features_stage(config, data))
    return stages


def uses_features(config: Run, data: Data) -> bool:
    """Whether the metrics are computed in the features of a classifier of the data. Raises InputError where the config
    asks for what the data does not allow."""
    wanted, images = config.evaluation.features, data.train.has_images and len(data.held_out) > 0
    labelled = images and data.train.labels is not None and data.mixture is None
    if wanted == "classifier" and not labelled:
        raise InputError("evaluation.features = 'classifier': needs labelled images, some of them held out")
    if wanted == "inception" and not images:
        raise InputError("evaluation.features = 'inception': needs images, some of them held out")
    return wanted == "classifier" or (wanted == "auto" and labelled and data.train.images is not None)


def measures(config: Run, features: Path | None, data: Data) -> bool:
    """Whether samples can be measured; else they are only timed, and a batch is enough."""
    return features is not None or data.mixture is not None or config.evaluation.features == "inception"


def features_stage(config: Run, data: Data) -> Stage:
    """Gives the artefact `features`: a classifier of the training images, cached."""

    def run(context: RunContext) -> Artefacts:
        from kd_diffusion.metrics import save_features, train_features

        folder = context.folder / "features"
        if context.is_main:
            assert data.train.labels is not None
            net = train_features(data.train.pixels, data.train.labels, data.num_classes, config.seed)
            save_features(net, folder)
        context.accelerator.wait_for_everyone()
        return {"features": folder}

    identity = {
        "version": __version__,
        "torch": torch.__version__,
        "data": data.config.model_dump(mode="json"),
        "seed": config.seed,
    }
    return CachedStage(Procedure("features", run), identity)


def adapter_networks(config: Run, opened: Opened, artefacts: Artefacts, data: Data) -> Networks:
    """Teacher, fake and generator; the adapted teacher shares the teacher's weights."""
    networks = make_networks(config, opened, artefacts, data)
    if config.method_args.fake == "lora":
        networks.teacher, networks.fake = shared_views(
            opened.denoiser, config.method_args.lora, field="method_args.lora"
        )
    return networks


def make_loader(config: Run, opened: Opened, data: Data, *, batch_factor: int = 1) -> Any:
    """Batches of the training part: encoded once where it is in memory, tokens where the teacher reads text."""
    part = data.train
    x = None
    if part.images is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            x = torch.cat([opened.space.encode(chunk) for chunk in part.images.split(256)])
    wanted = ev.requests(opened, part, len(part))
    tokens = {name: value for name, value in wanted.batch.items() if name not in ("index", "class_labels")}
    return loader(
        Samples(part, x=x, tokens=tokens),
        config.train.batch_size * batch_factor,
        config.seed,
        num_workers=config.train.num_workers,
    )


@dataclass(frozen=True)
class Sampling:
    """How the student of a method steps: from unit noise or the noised zero image, at which levels, and whether fresh
    noise or Euler's step leads from one level to the next."""

    start: Start = "unit"
    floor: bool = False
    renoise: Renoise = "noise"


def student_stage(
    config: Run,
    data: Data,
    build: Build,
    *,
    name: str = "student",
    train: TrainConfig | None = None,
    artefact: str = "student",
    sampling: Sampling = Sampling(),
    batch_factor: int = 1,
    networks: MakeNetworks = make_networks,
    snapshots: type[Snapshots] = Snapshots,
) -> TrainStage:
    """Trains the distiller that `build(config, networks)` makes; gives a diffusers pipeline folder."""
    budget = train or config.train
    kept: dict[str, Any] = {}

    def setup(context: RunContext) -> TrainSetup:
        opened = kept["teacher"] = open_teacher(config, context.artefacts, data)
        check_data(opened, data, config)
        distiller = build(config, networks(config, opened, context.artefacts, data))
        kept["levels"] = distiller.indices
        batches = make_loader(config, opened, data, batch_factor=batch_factor)
        return TrainSetup(distiller, batches, snapshots(context, name, opened, data, distiller, sampling.start))

    def save(network: nn.Module, folder: Path) -> None:
        save_pipeline(config, kept["teacher"], network, folder, kept["levels"], sampling)

    # The generator's player has the average; the fake score would only waste memory on one.
    return TrainStage(name, budget.model_copy(update={"ema": None}), setup, save, artefact)


def save_pipeline(
    config: Run, opened: Opened, network: nn.Module, folder: Path, indices: list[float], sampling: Sampling
) -> None:
    """The student as a pipeline folder whose scheduler takes its steps."""
    scheduler = sampler_config(
        opened.pipe.scheduler,
        opened.denoiser.prediction_type,
        opened.process,
        indices,
        start=sampling.start,
        renoise=sampling.renoise,
    )
    extra = {
        "method": config.method,
        "num_inference_steps": len(indices),
        "levels": indices,
        "first_latent": "s_t z" if sampling.start == "noised" else "z",
        "guidance_scale": 1.0,
    }
    save_student(opened, network, folder, scheduler, extra=extra)


def check_data(opened: Opened, data: Data, config: Run) -> None:
    """Raises InputError where the data does not fit the teacher."""
    shape, size = opened.space.shape, data.image_size
    in_pixels = data.train.has_images and opened.space.vae is None and data.mixture is None
    if in_pixels and shape != (data.channels, size, size):
        raise InputError(f"data: images are {data.channels}x{size}x{size}, the teacher's {'x'.join(map(str, shape))}")
    classes = getattr(opened.conditioner, "num_classes", None)
    if classes is not None and data.train.labels is not None and classes < data.num_classes:
        raise InputError(f"data: {data.num_classes} classes, the teacher has {classes}")
    if config.train.batch_size > len(data.train):
        raise InputError(f"train.batch_size = {config.train.batch_size}: larger than the {len(data.train)} samples")


def check(config: Run, data: Data) -> Opened | None:
    """What can be said before anything trains. Gives the teacher where it had to open one, for further checks."""
    args = config.method_args
    uses_features(config, data)  # says what is wrong with evaluation.features
    if config.evaluation.features == "inception" and importlib.util.find_spec("torch_fidelity") is None:
        raise InputError("evaluation.features = 'inception': needs torch-fidelity, pip install 'kd-diffusion[fid]'")
    if args.gan is not None and not data.train.has_images:
        raise InputError("method_args.gan: needs real samples, and the data has prompts alone; give gan: null")
    if config.teacher.pretrained is None:
        return None
    opened = open_teacher(config, {}, data)
    check_data(opened, data, config)
    if args.times.kind == "lognormal" and not isinstance(opened.process, EDM):
        raise InputError(f"method_args.times.kind = 'lognormal': the teacher is {type(opened.process).__name__}")
    scheduler = type(opened.pipe.scheduler).__name__
    if args.steps > 1 and scheduler.startswith("EDM"):
        raise InputError(f"method_args.steps = {args.steps}: allowed: 1, {scheduler} draws no new noise in its steps")
    if args.guidance_scale != 1:
        opened.conditioner.null(1, "cpu")
    return opened


# ---------------------------------------------------------------- evaluation


def evaluate(
    config: Run,
    artefacts: Artefacts,
    *,
    data: Data | None = None,
    teacher: Opened | None = None,
    sampling: Sampling = Sampling(),
    steps: int | None = None,
    student: Callable[[Opened], ev.Generate] | None = None,
) -> dict[str, Any]:
    """Metrics of the saved student and of the teacher at several numbers of steps, on the held-out conditions.

    `student(opened)` replaces the usual sampler of the saved folder; it gets the opened teacher. `data` and `teacher`
    are for callers that have them already.
    """
    data = data or load_data(config.data, config.seed)
    teacher = (teacher or open_teacher(config, artefacts, data)).to(ev.run_device())
    settings, features = config.evaluation, artefacts.get("features")
    measured = measures(config, features, data)
    count = settings.samples if measured else min(settings.samples, settings.batch_size)
    wanted = ev.requests(teacher, data.asked, count)
    steps = steps or config.method_args.steps
    result: dict[str, Any] = {}

    def row(name: str, opened: Opened, function: ev.Generate, nfe: float) -> None:
        pixels, seconds = ev.timed_generate(opened, wanted, function, seed=config.seed, batch_size=settings.batch_size)
        if measured:
            result.update(ev.prefixed(name, ev.measure(data, features, pixels, wanted, seed=config.seed)))
        result.update({f"{name}/nfe": nfe, f"{name}/seconds_per_sample": seconds})

    if student is not None:
        row("student", teacher, student(teacher), steps)
    else:
        own, function = saved_student(config, artefacts, teacher, sampling, steps)
        row("student", own, function, steps)
        result["student/parameters"] = sum(p.numel() for p in own.network.parameters())
    kappa = settings.guidance_scale if settings.guidance_scale is not None else config.method_args.guidance_scale
    for count in settings.teacher_steps:
        forwards = count * (1 if kappa in (0, 1) else 2)
        row(f"teacher_{count}", teacher, ev.teacher_function(teacher, count, kappa), forwards)
    return result


def saved_student(
    config: Run, artefacts: Artefacts, teacher: Opened, sampling: Sampling, steps: int | None = None
) -> tuple[Opened, ev.Generate]:
    """The saved student and its sampler."""
    own = open_student(config, artefacts["student"], teacher)
    steps = steps or config.method_args.steps
    return own, ev.student_function(own, steps, start=sampling.start, floor=sampling.floor, renoise=sampling.renoise)


def open_student(config: Run, folder: Path, teacher: Opened) -> Opened:
    """A saved student behind the teacher's conditioner."""
    own = open_pipeline(folder, field="student", size=config.teacher.size)
    own.conditioner = teacher.conditioner
    return own.to(teacher.device)


def predict(config: Run, artefacts: Artefacts, count: int, *, sampling: Sampling = Sampling()) -> list[dict[str, Any]]:
    """Rows of pictures of the saved student beside its teacher."""
    from kd_diffusion.pictures import comparison

    def student(teacher: Opened) -> ev.Generate:
        return saved_student(config, artefacts, teacher, sampling)[1]

    return comparison(config, artefacts, count, student=student)


@dataclass(frozen=True)
class Recipe:
    """What makes a method of this family: its arguments, its distiller, its networks and how its student steps."""

    arguments: type[ScoreArgs]
    build: Build
    sampling: Sampling = Sampling()
    batch_factor: int = 1
    networks: MakeNetworks = make_networks
    check: Callable[[Run, Data], Any] = check

    def stages(self, config: Run, context: RunContext) -> list[Stage]:
        """teacher, features, student."""
        data = load_data(config.data, config.seed)
        self.check(config, data)
        student = student_stage(
            config,
            data,
            self.build,
            sampling=self.sampling,
            batch_factor=self.batch_factor,
            networks=self.networks,
        )
        return [*prepare(config, data), student]

    def evaluate(self, config: Run, artefacts: Artefacts) -> Mapping[str, Any]:
        return evaluate(config, artefacts, sampling=self.sampling)

    def predict(self, config: Run, artefacts: Artefacts, count: int) -> list[dict[str, Any]]:
        return predict(config, artefacts, count, sampling=self.sampling)


_RECIPES: dict[str, Recipe] = {}


def recipe(key: str) -> tuple[Recipe, Method[Any]]:
    """The recipe of an installed method that `score_method` registered, for methods that run on top of another."""
    method = get(key)
    if key not in _RECIPES:
        raise InputError(f"method '{key}': is no method of score distillation; these are: {', '.join(_RECIPES)}")
    return _RECIPES[key], method


def score_method(
    key: str,
    doc: str,
    arguments: type[A],
    build: Build,
    *,
    sampling: Sampling = Sampling(),
    batch_factor: int = 1,
    networks: MakeNetworks = make_networks,
    check: Callable[[Run, Data], Any] = check,
) -> Method[Any]:
    """A method whose stages are teacher, features, student."""
    own = _RECIPES[key] = Recipe(arguments, build, sampling, batch_factor, networks, check)
    return Method(key, doc, DiffusionRun[arguments], own.stages, own.evaluate, own.predict)  # type: ignore[valid-type]

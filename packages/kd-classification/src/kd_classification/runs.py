"""The run config of image classification and the stages that its methods share.

`classification_method` registers a method that needs the usual two stages: a teacher (loaded, or trained once and
cached) and a student. Methods with other stages build their list from `teacher_stage` and `student_stage`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from pydantic import Field, model_validator
from torch import nn

from kd_classification import __version__
from kd_classification import metrics as m
from kd_classification.data import Data, DataConfig, Images, load_data
from kd_classification.engine.classifier import ClassifierDistiller, Supervised
from kd_classification.models import ModelConfig, adapted, create_model, load_model, save_model
from kd_classification.transforms import make_mixup
from kdcore.config import MethodConfig, MethodRunConfig, TrainConfig
from kdcore.errors import InputError, did_you_mean
from kdcore.method import Method
from kdcore.stages import Artefacts, CachedStage, Procedure, RunContext, Stage
from kdcore.training import TrainSetup, TrainStage

A = TypeVar("A", bound=MethodConfig)


class TeacherConfig(ModelConfig):
    train: TrainConfig | None = Field(None, description="how to train it on the spot; None: it comes with weights")
    cache: str | None = Field(None, description="folder of `kd cache`: its logits replace the teacher in training")

    @model_validator(mode="after")
    def _has_weights(self) -> TeacherConfig:
        if self.train is None and self.checkpoint is None and not self.pretrained:
            raise ValueError("has no weights: give checkpoint, pretrained: true, or train")
        return self


class ClassificationRun(MethodRunConfig[A], Generic[A]):
    """The config of a run: two networks, the data, the method's arguments and the budget."""

    teacher: TeacherConfig
    student: ModelConfig
    data: DataConfig = Field(default_factory=DataConfig)


Run = ClassificationRun[Any]


@dataclass(frozen=True)
class Networks:
    """What a method's `build` gets: the teacher (behind the student's normalisation), a fresh student, the data."""

    teacher: nn.Module
    student: nn.Module
    data: Data


Build = Callable[[Any, Networks], ClassifierDistiller]


# ---------------------------------------------------------------- stages


def teacher_stage(
    config: Run,
    data: Data,
    *,
    name: str = "teacher",
    model: TeacherConfig | None = None,
    fingerprint: Mapping[str, Any] | None = None,
    setup: Callable[[nn.Module], TrainSetup] | None = None,
    save: Callable[[nn.Module, Path], None] | None = None,
    num_classes: int | None = None,
) -> Stage:
    """Gives the artefact `name`, a saved timm folder: from weights, or trained on `data.train` and cached.

    `num_classes`: its outputs where they are not the data's classes, 0 for a backbone without a classifier.
    `setup(network)` and `save(network, folder)` replace supervised training on the labels and what is written at its
    end. A method that changes these, the data or the classes adds what it changed to `fingerprint`.
    """
    teacher = model or config.teacher

    def from_weights(context: RunContext) -> Artefacts:
        network = create_model(teacher, data, field=name, num_classes=num_classes)
        if context.is_main:
            save_model(network, context.folder / name, data)
        context.accelerator.wait_for_everyone()
        return {name: context.folder / name}

    if teacher.train is None:
        return Procedure(name, from_weights)
    train = teacher.train

    def build(context: RunContext) -> TrainSetup:
        # trained as it is used: behind its own size and normalisation
        network = adapted(create_model(teacher, data, field=name, num_classes=num_classes), data, teacher, field=name)
        return setup(network) if setup is not None else supervised_setup(Supervised(network), data, train, config.seed)

    def write(network: nn.Module, folder: Path) -> None:
        save_model(network, folder, data)

    stage = TrainStage(name, train, build, save or write, artefact=name)
    identity = {
        "version": __version__,
        "torch": torch.__version__,
        "model": teacher.model_dump(mode="json", exclude={"cache"}),
        "data": data.config.model_dump(mode="json"),
        "seed": config.seed,
        **(fingerprint or {}),
    }
    return CachedStage(stage, identity)


def supervised_setup(
    distiller: ClassifierDistiller, data: Data, train: TrainConfig, seed: int, *, images: Images | None = None
) -> TrainSetup:
    """The set-up of a training on `images` (by default the training images) with mixup and validation by accuracy."""
    images = data.train if images is None else images
    distiller.mixup = make_mixup(data.config.augment, data.num_classes)
    evaluate = None
    if data.validation is not None:
        held_out = data.validation

        def evaluate(network: nn.Module) -> dict[str, float]:
            return m.classification_metrics(*m.predict(network, held_out))

    repeats, workers = data.config.augment.repeats, train.num_workers
    loader = images.loader(train.batch_size, seed=seed, train=True, num_workers=workers, repeats=repeats)
    return TrainSetup(distiller, loader, evaluate)


def student_stage(
    config: Run,
    data: Data,
    build: Build,
    *,
    name: str = "student",
    train: TrainConfig | None = None,
    images: Images | None = None,
) -> TrainStage:
    """Trains the distiller that `build(config, networks)` makes; gives the artefact `student`, a saved timm folder."""
    budget = train or config.train

    def setup(context: RunContext) -> TrainSetup:
        teacher = load_teacher(config, data, context.artefacts["teacher"])
        student = create_model(config.student, data, field="student")
        distiller = build(config, Networks(teacher, student, data))
        attach_cache(distiller, config, teacher, data)
        return supervised_setup(distiller, data, budget, config.seed, images=images)

    return TrainStage(name, budget, setup, lambda network, folder: save_model(network, folder, data))


def load_teacher(config: Run, data: Data, folder: Path) -> nn.Module:
    """The saved teacher, behind the data's normalisation and size."""
    model = load_model(folder, num_classes=data.num_classes, channels=data.channels, field="teacher")
    return adapted(model, data, config.teacher)


def attach_cache(distiller: ClassifierDistiller, config: Run, teacher: nn.Module, data: Data) -> None:
    """Opens `teacher.cache`, checked against this teacher and this data."""
    if config.teacher.cache is None:
        return
    if data.train.transform is not data.test.transform or data.config.augment.mixup or data.config.augment.cutmix:
        raise InputError("teacher.cache: only without augmentation; data.augment changes the images in every epoch")
    from kdcore.gpu import TeacherCache

    distiller.teacher_cache = TeacherCache.open(
        Path(config.teacher.cache), teacher=teacher, data=data_identity(config, data)
    )


def data_identity(config: Run, data: Data) -> str:
    """What the cached teacher outputs depend on besides the teacher: the training images, in order."""
    from kdcore.stages import digest

    return digest(
        {"data": data.config.model_dump(mode="json"), "seed": config.seed, "labels": data.train.labels.tolist()}
    )


def check(config: Run, data: Data, *, teacher_metrics: Sequence[str] = ()) -> None:
    """Builds both networks, so that what is wrong with them is said before anything trains.

    `teacher_metrics` are what the teacher's validation gives besides accuracy and its like.
    """
    check_monitor(config.teacher.train, data, "teacher.train", [*m.VALIDATION, *teacher_metrics])
    check_monitor(config.train, data, "train", m.VALIDATION)
    with torch.random.fork_rng(devices=[]):
        for field, model in (("teacher", config.teacher), ("student", config.student)):
            network = create_model(model, data, field=field)
            try_forward(adapted(network, data, model, field=field) if field == "teacher" else network, data, field)


def check_monitor(train: TrainConfig | None, data: Data, field: str, metrics: Sequence[str]) -> None:
    """Raises InputError where `monitor` names no metric, or there are no validation images to compute it on."""
    if train is None or train.monitor is None:
        return
    if train.monitor not in metrics:
        raise InputError(f"{field}.monitor = '{train.monitor}': not a metric{did_you_mean(train.monitor, metrics)}")
    if data.validation is None:
        raise InputError(f"{field}.monitor = '{train.monitor}': no image is held out for it; give data.validation")


def try_forward(model: nn.Module, data: Data, field: str) -> None:
    """One blank image through the network: input size and class count fit."""
    blank = torch.zeros(1, data.channels, data.image_size, data.image_size)
    try:
        with torch.no_grad():
            logits = model.eval()(blank)
    except (RuntimeError, AssertionError, ValueError, AttributeError) as error:
        size = f"{data.channels}x{data.image_size}x{data.image_size}"
        raise InputError(f"{field}: the network does not take {size} images ({error})") from None
    if logits.shape != (1, data.num_classes):
        raise InputError(f"{field}: gives {tuple(logits.shape[1:])} outputs, the data has {data.num_classes} classes")


# ---------------------------------------------------------------- evaluation


def evaluate(
    config: Run, artefacts: Artefacts, *, data: Data | None = None, student: nn.Module | None = None
) -> dict[str, Any]:
    """Metrics of the saved student and teacher on the test images, with the student's confusion matrix.

    `student` is the loaded one, where it is more than the timm folder says.
    """
    data = data or load_data(config.data, config.seed)
    student = student or load_model(artefacts["student"], num_classes=data.num_classes, field="student")
    logits, labels = m.predict(student, data.test)
    result: dict[str, Any] = m.prefixed("student", m.classification_metrics(logits, labels))
    result["student/parameters"] = sum(parameter.numel() for parameter in student.parameters())
    if "teacher" in artefacts:
        teacher = load_teacher(config, data, artefacts["teacher"])
        teacher_logits, _ = m.predict(teacher, data.test)
        result.update(m.prefixed("teacher", m.classification_metrics(teacher_logits, labels)))
        result["teacher/parameters"] = sum(parameter.numel() for parameter in teacher.parameters())
        result["agreement"] = m.agreement(logits, teacher_logits)
    return {**result, "confusion_matrix": m.confusion_matrix(logits, labels), "class_names": data.class_names}


def predict(
    config: Run, artefacts: Artefacts, count: int, *, data: Data | None = None, student: nn.Module | None = None
) -> list[dict[str, Any]]:
    """Test images with truth, teacher's and student's answer for the report; half of them disagreements if any."""
    data = data or load_data(config.data, config.seed)
    networks = {"student": student or load_model(artefacts["student"])}
    if "teacher" in artefacts:
        networks["teacher"] = load_teacher(config, data, artefacts["teacher"])
    probabilities = {name: m.predict(network, data.test)[0].softmax(1) for name, network in networks.items()}
    wrong = probabilities["student"].argmax(1) != data.test.labels
    order = torch.argsort(wrong, descending=True, stable=True)
    half = min(count // 2, int(wrong.sum()))
    samples = []
    for index in [*order[:half].tolist(), *order[int(wrong.sum()) :][: count - half].tolist()]:
        answers = {name: _answer(p[index], data.class_names) for name, p in probabilities.items()}
        truth = data.class_names[int(data.test.labels[index])]
        samples.append({"image": picture(data.test, index), "truth": truth, **answers})
    return samples


def _answer(probability: torch.Tensor, class_names: Sequence[str]) -> dict[str, Any]:
    best = int(probability.argmax())
    return {"label": class_names[best], "probability": float(probability[best])}


def picture(images: Images, index: int) -> Any:
    """One image as uint8 (H, W) or (H, W, 3), without its normalisation, for the report."""
    pixels = (images[index][0] * images.std + images.mean).mul(255).round().clamp(0, 255).byte().permute(1, 2, 0)
    return pixels.squeeze(-1).numpy()


def write_cache(config: Run, folder: Path, *, data: Data | None = None) -> dict[str, Any]:
    """`kd cache`: the teacher's logits on the training images, for `teacher.cache`."""
    from kdcore.gpu import TeacherCache

    data = data or load_data(config.data, config.seed)
    if config.teacher.train is not None:
        raise InputError("teacher.train: `kd cache` needs a teacher with weights; give teacher.checkpoint")
    teacher = adapted(create_model(config.teacher, data, field="teacher"), data, config.teacher).eval()
    images = data.train_plain
    with (
        TeacherCache.create(
            folder, kind="full", num_outputs=data.num_classes, teacher=teacher, data=data_identity(config, data)
        ) as writer,
        torch.no_grad(),
    ):
        for batch in images.loader(256):
            writer.add(batch.index, teacher(batch.images))
    return {"samples": len(images), "folder": str(folder)}


# ---------------------------------------------------------------- registration


def classification_method(key: str, doc: str | None, arguments: type[A], build: Build) -> Method[Any]:
    """A method of two stages, teacher and student, with the shared evaluation, report samples and cache."""

    def stages(config: Run, context: RunContext) -> list[Stage]:
        data = load_data(config.data, config.seed)
        check(config, data)
        return [teacher_stage(config, data), student_stage(config, data, build)]

    return Method(key, doc or "", ClassificationRun[arguments], stages, evaluate, predict, write_cache)

"""The run config and stages of methods whose samples come in several modalities: a teacher that always has all of them,
a network for whatever is there.

The method's arguments have a field `fusion`, how encoded modalities are put together.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kd_classification import __version__, runs
from kd_classification.data import DataConfig
from kd_classification.engine.multimodal import (
    ModalityConfig,
    MultiBatch,
    MultiData,
    MultiModalNet,
    combinations,
    load_modalities,
    load_multimodal,
    mean_accuracy,
    predict_masked,
    save_multimodal,
)
from kd_classification.models import ModelConfig
from kd_classification.runs import TeacherConfig
from kdcore.config import MethodConfig, MethodRunConfig
from kdcore.distiller import Distiller, LossTerms
from kdcore.errors import InputError
from kdcore.stages import Artefacts, CachedStage, Procedure, RunContext, Stage, replace_folder
from kdcore.training import TrainSetup, TrainStage

A = TypeVar("A", bound=MethodConfig)


class MultiModalRun(MethodRunConfig[A], Generic[A]):
    """Teacher and student by a timm ResNet's name, data, and two or more modalities of it."""

    teacher: TeacherConfig
    student: ModelConfig
    data: DataConfig = Field(default_factory=DataConfig)
    modalities: list[ModalityConfig] = Field(min_length=2, description="modalities, in the order of the masks")


Run = MultiModalRun[Any]


class AllModalities(Distiller):
    """How the teacher learns: cross-entropy with every modality."""

    def __init__(self, student: MultiModalNet):
        super().__init__()
        self.student = student

    def loss(self, batch: MultiBatch, player: str = "student") -> LossTerms:
        return LossTerms(ce=(1.0, F.cross_entropy(self.student(batch.images), batch.labels)))


# ---------------------------------------------------------------- stages


def create_network(config: Run, model: ModelConfig, data: MultiData, *, field: str) -> MultiModalNet:
    """A fresh network for the data's modalities, or the one of `checkpoint`, a folder of `save_multimodal`."""
    if model.checkpoint is not None:
        network = load_multimodal(Path(model.checkpoint), field=field)
        if network.settings["channels"] != data.channels or network.num_classes != data.data.num_classes:
            raise InputError(f"{field}.checkpoint = {model.checkpoint}: other modalities or classes than the data's")
        return network
    options = {"args": model.args, "fusion": config.method_args.fusion, "pretrained": model.pretrained}
    try:
        return MultiModalNet(model.name, data.channels, data.data.num_classes, **options)
    except InputError as error:
        raise InputError(f"{field}.name: {error}") from None


def save_to(data: MultiData) -> Callable[[nn.Module, Path], None]:
    """What a `TrainStage` saves a network with."""

    def save(network: nn.Module, folder: Path) -> None:
        save_multimodal(network, folder, data.data.class_names)  # type: ignore[arg-type]

    return save


def setup_of(config: Run, distiller: Distiller, data: MultiData, train: Any) -> TrainSetup:
    """Training on all samples, validated by the accuracy averaged over the masks; the teacher's by that with all."""
    evaluate = None
    if (held_out := data.validation) is not None:

        def evaluate(network: nn.Module) -> dict[str, float]:
            assert isinstance(network, MultiModalNet)
            masks = combinations(len(network.modalities))[-1:] if isinstance(distiller, AllModalities) else None
            return {"accuracy": mean_accuracy(network, held_out, masks)}

    loader = data.train.loader(train.batch_size, seed=config.seed, train=True, num_workers=train.num_workers)
    return TrainSetup(distiller, loader, evaluate)


def teacher_stage(config: Run, data: MultiData) -> Stage:
    """The artefact `teacher`: from weights, or trained on all modalities and cached."""
    train, save = config.teacher.train, save_to(data)
    if train is None:

        def write(context: RunContext) -> Artefacts:
            network = create_network(config, config.teacher, data, field="teacher")
            target = context.folder / "teacher"
            if context.is_main:
                replace_folder(target, lambda folder: save(network, folder))
            context.accelerator.wait_for_everyone()
            return {"teacher": target}

        return Procedure("teacher", write)

    def build(context: RunContext) -> TrainSetup:
        network = create_network(config, config.teacher, data, field="teacher")
        return setup_of(config, AllModalities(network), data, train)

    identity = {
        "version": __version__,
        "torch": torch.__version__,
        "modalities": [modality.model_dump(mode="json") for modality in config.modalities],
        "fusion": config.method_args.fusion,
        "model": config.teacher.model_dump(mode="json"),
        "data": config.data.model_dump(mode="json"),
        "seed": config.seed,
    }
    return CachedStage(TrainStage("teacher", train, build, save, artefact="teacher"), identity)


def check(config: Run, data: MultiData) -> None:
    """What can be wrong with networks, data and budgets, before anything trains."""
    augment = config.data.augment
    if augment.mixup or augment.cutmix:
        raise InputError("data.augment.mixup, cutmix: not for this method")
    if augment.repeats > 1:
        raise InputError(f"data.augment.repeats = {augment.repeats}: must be 1 for this method")
    if config.teacher.cache is not None:
        raise InputError("teacher.cache: not for this method, which needs the teacher's feature maps")
    for field, model, train in (
        ("teacher", config.teacher, config.teacher.train),
        ("student", config.student, config.train),
    ):
        runs.check_monitor(train, data.data, "train" if field == "student" else "teacher.train", ["accuracy"])
        if model.input_size or model.mean or model.std:
            raise InputError(f"{field}.input_size, mean, std: not for this method; both networks see the same images")
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            network = create_network(config, model, data, field=field)
            try:
                network.eval()(data.test._batch([0]).images if _in_memory(data) else _blank(data))
            except RuntimeError as error:
                raise InputError(f"{field}: the network does not take these images ({error})") from None


def _in_memory(data: MultiData) -> bool:
    return all(images.transform is None for images in data.test.parts.values())


def _blank(data: MultiData) -> dict[str, Tensor]:
    size = data.data.image_size
    return {name: torch.zeros(1, count, size, size) for name, count in data.channels.items()}


# ---------------------------------------------------------------- the report


def predict(config: Run, artefacts: Artefacts, count: int) -> list[dict[str, Any]]:
    """Test samples by their first modality, with the answers of the student and the teacher given all modalities."""
    data = load_modalities(config.data, config.modalities, config.seed)
    images = next(iter(data.test.parts.values()))
    answers = {}
    for name in ("student", "teacher"):
        network = load_multimodal(artefacts[name], field=name)
        answers[name] = predict_masked(network, data.test, combinations(len(network.modalities))[-1]).softmax(dim=1)
    wrong = answers["student"].argmax(1) != data.test.labels
    order = torch.argsort(wrong, descending=True, stable=True).tolist()
    half = min(count // 2, int(wrong.sum()))
    samples, names = [], data.data.class_names
    for index in [*order[:half], *order[int(wrong.sum()) :][: count - half]]:
        said = {
            name: {"label": names[int(p[index].argmax())], "probability": float(p[index].max())}
            for name, p in answers.items()
        }
        samples.append({"image": runs.picture(images, index), "truth": names[int(data.test.labels[index])], **said})
    return samples

"""The run config, stages and evaluation of methods that pre-train a backbone without labels.

Stages: teacher (given, or a masked autoencoder trained once and cached); student, the pre-training, which leaves an
encoder without a classifier; finetuned, that encoder trained on the labels; probe, a linear classifier on the frozen
encoder where it is trained by steps. `pretrain` swaps the second for a baseline: plain distillation from the fine-tuned
teacher, or nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, cast

import torch
from pydantic import Field
from torch import nn

from kd_classification import metrics as m
from kd_classification import runs
from kd_classification.data import AugmentConfig, Batch, Data, load_data
from kd_classification.engine.classifier import ClassifierDistiller, Supervised
from kd_classification.engine.mae import DecoderConfig, MaskedAutoencoder
from kd_classification.engine.masked_vit import check_vit, initialise_encoder, inner_vit
from kd_classification.engine.probing import LinearProbe, ProbeConfig, frozen_features, probe_metrics
from kd_classification.models import ModelConfig, adapted, create_model, load_model, save_model
from kd_classification.runs import ClassificationRun, TeacherConfig, supervised_setup, teacher_stage
from kdcore.checkpoint import load_weights
from kdcore.config import Config, MethodConfig, TrainConfig
from kdcore.distiller import Distiller, LossTerms, Player
from kdcore.errors import InputError
from kdcore.losses import soft_target_kl
from kdcore.stages import Artefacts, Procedure, RunContext, Stage
from kdcore.training import TrainSetup, TrainStage

A = TypeVar("A", bound=MethodConfig)


class MaskedTeacherConfig(TeacherConfig):
    """A teacher without labels; `train` pre-trains it as a masked autoencoder, with the fields below."""

    decoder: DecoderConfig = Field(default_factory=DecoderConfig, description="its decoder, thrown away")
    mask_ratio: float = Field(0.75, ge=0, lt=1, description="share of hidden patches in its pre-training")
    norm_pix: bool = Field(False, description="whether its pixel targets are normalised patch by patch")


class FinetuneConfig(Config):
    """Supervised training of the pre-trained encoder, whole. The defaults are MAE's recipe where they are no budget."""

    train: TrainConfig = Field(description="budget and optimiser")
    per_class: int | None = Field(None, ge=1, description="labelled images of each class; None: all training images")
    augment: AugmentConfig = Field(default_factory=AugmentConfig, description="augmentation of this stage")
    args: dict[str, Any] = Field(
        default_factory=dict, description="arguments of timm's factory added here: drop_path_rate, global_pool, ..."
    )
    layer_decay: float = Field(1.0, gt=0, le=1, description="factor on the rate from each layer to the one below it")


class PretrainingRun(ClassificationRun[A], Generic[A]):
    """The config of a run that pre-trains `student` on the images of `data`, without labels, and then judges it."""

    pretrain: Literal["method", "kd", "none"] = Field(
        "method", description="baselines: kd learns the fine-tuned teacher's answers, none starts at random"
    )
    kd_temperature: float = Field(4.0, gt=0, description="temperature of pretrain: kd")
    finetune: FinetuneConfig | None = Field(None, description="fine-tuning on the labels; None leaves it out")
    probe: ProbeConfig | None = Field(
        default_factory=lambda: ProbeConfig.model_validate({}), description="frozen features; None leaves it out"
    )


class MaskedRun(PretrainingRun[A], Generic[A]):
    """A run whose teacher is a masked autoencoder."""

    teacher: MaskedTeacherConfig


Run = PretrainingRun[Any]


@dataclass(frozen=True)
class Encoders:
    """What a method's `build` gets: saved teachers by the name of their artefact, a fresh student, the data."""

    teachers: Mapping[str, nn.Module]
    student: nn.Module
    data: Data


Build = Callable[[Any, Encoders], Distiller]


# ---------------------------------------------------------------- networks


def new_encoder(config: ModelConfig, data: Data, *, field: str = "student") -> nn.Module:
    """An encoder without a classifier; at random it starts as MAE's does."""
    network = create_model(config, data, field=field, num_classes=0)
    check_vit(network, field)
    if config.pretrained or config.checkpoint is not None:
        return network
    return initialise_encoder(network)


def load_encoder(folder: Path, data: Data, config: ModelConfig, *, field: str) -> nn.Module:
    """A saved encoder, behind the data's normalisation and size."""
    return adapted(load_model(folder, channels=data.channels, field=field), data, config, field=field)


def load_backbone(network: nn.Module, folder: Path) -> None:
    """Weights of a saved encoder into a classifier of the same architecture; the classifier itself keeps its own.

    With mean pooling timm normalises after it, in `fc_norm`, which then starts anew, as MAE's fine-tuning has it.
    """
    own, saved = network.state_dict(), load_weights(folder / "model.safetensors")
    fresh, ended = ("head.", "fc_norm."), ("head.", "norm.", "fc_norm.")
    taken = {name: value for name, value in saved.items() if name in own and own[name].shape == value.shape}
    for name in {*own, *saved} - set(taken):
        if not name.startswith(fresh if name in own else ended):
            raise InputError(f"finetune.args: '{name}' of the pre-trained encoder does not fit; it must stay the same")
    network.load_state_dict({**own, **taken})


# ---------------------------------------------------------------- stages


def pretraining_loader(data: Data, train: TrainConfig, seed: int) -> Any:
    repeats, workers = data.config.augment.repeats, train.num_workers
    return data.train.loader(train.batch_size, seed=seed, train=True, num_workers=workers, repeats=repeats)


def masked_teacher_stage(config: Run, data: Data, *, name: str = "teacher") -> Stage:
    """The artefact `name`: an encoder with weights, or one pre-trained here as a masked autoencoder.

    Its config is the field of the same name, a `MaskedTeacherConfig`.
    """
    teacher: MaskedTeacherConfig = getattr(config, name)

    def setup(network: nn.Module) -> TrainSetup:
        assert teacher.train is not None
        if teacher.checkpoint is None and not teacher.pretrained:
            initialise_encoder(network)
        autoencoder = MaskedAutoencoder(
            network, mask_ratio=teacher.mask_ratio, norm_pix=teacher.norm_pix, decoder=teacher.decoder
        )
        return TrainSetup(autoencoder, pretraining_loader(data, teacher.train, config.seed))

    fingerprint = {"objective": "mae"}
    return teacher_stage(config, data, name=name, model=teacher, setup=setup, fingerprint=fingerprint, num_classes=0)


def student_stages(config: Run, data: Data, build: Build, teachers: Mapping[str, ModelConfig]) -> list[Stage]:
    """Pre-training, fine-tuning and probe. `teachers`: artefact of an earlier stage -> its config."""
    plan: list[Stage] = []
    if config.pretrain == "none":
        plan.append(Procedure("student", lambda context: _save_random(config, data, context)))
    elif config.pretrain == "kd":
        if not teachers:
            raise InputError("pretrain: kd learns from a fine-tuned teacher; give teacher")
        name = next(iter(teachers))
        plan.append(finetune_stage(config, data, name, teachers[name], f"{name}_finetuned"))
        plan.append(_distilled_stage(config, data, f"{name}_finetuned", teachers[name]))
    else:
        plan.append(_pretraining_stage(config, data, build, teachers))
    if config.finetune is not None:
        plan.append(finetune_stage(config, data, "student", config.student, "finetuned"))
    if config.probe is not None and config.probe.train is not None:
        plan.append(_probe_stage(config, data.augmented(config.probe.augment), config.probe, config.probe.train))
    return plan


def _pretraining_stage(config: Run, data: Data, build: Build, teachers: Mapping[str, ModelConfig]) -> Stage:
    def setup(context: RunContext) -> TrainSetup:
        loaded = {
            name: load_encoder(context.artefacts[name], data, model, field=name) for name, model in teachers.items()
        }
        distiller = build(config, Encoders(loaded, new_encoder(config.student, data), data))
        return TrainSetup(distiller, pretraining_loader(data, config.train, config.seed))

    return TrainStage("student", config.train, setup, lambda network, folder: save_model(network, folder, data))


def _save_random(config: Run, data: Data, context: RunContext) -> Artefacts:
    """An encoder that has seen nothing, as timm initialises it (or with the weights that its config names)."""
    from accelerate.utils import set_seed

    from kdcore.stages import stage_seed

    set_seed(stage_seed(context, "student"))
    folder = context.folder / "student"
    network = create_model(config.student, data, field="student", num_classes=0)
    if context.is_main:
        save_model(network, folder, data)
    context.accelerator.wait_for_everyone()
    return {"student": folder}


class SoftTargets(ClassifierDistiller):
    """The fine-tuned teacher's answers on images without labels: what masked pre-training is compared with."""

    def __init__(self, teacher: nn.Module, student: nn.Module, temperature: float):
        super().__init__(teacher, student)
        self.temperature = temperature

    def loss(self, batch: Batch, player: str = "student") -> LossTerms:
        kd = soft_target_kl(self.student(batch.images), self.teacher_logits(batch), self.temperature)
        return LossTerms(kd=(1.0, kd))


def _distilled_stage(config: Run, data: Data, teacher: str, model: ModelConfig) -> Stage:
    def setup(context: RunContext) -> TrainSetup:
        known = adapted(load_model(context.artefacts[teacher], num_classes=data.num_classes), data, model)
        student = create_model(config.student, data, field="student")
        distiller = SoftTargets(known, student, config.kd_temperature)
        return TrainSetup(distiller, pretraining_loader(data, config.train, config.seed))

    return TrainStage("student", config.train, setup, lambda network, folder: save_model(network, folder, data))


class Finetune(Supervised):
    """Cross-entropy, the rate of each layer `layer_decay` times that of the layer above it."""

    def __init__(self, student: nn.Module, *, layer_decay: float = 1.0, weight_decay: float = 0.0):
        super().__init__(student)
        self.layer_decay, self.weight_decay = layer_decay, weight_decay

    def players(self) -> list[Player]:
        from timm.optim import param_groups_layer_decay

        vit = cast(Any, inner_vit(self.student))
        groups = param_groups_layer_decay(
            vit,
            weight_decay=self.weight_decay,
            no_weight_decay_list=vit.no_weight_decay(),
            layer_decay=self.layer_decay,
        )
        return [Player("student", self, param_groups=groups)]


def finetune_stage(config: Run, pretraining: Data, source: str, model: ModelConfig, name: str) -> Stage:
    """Trains the encoder that the artefact `source` holds, with a fresh classifier; gives the artefact `name`."""
    settings = config.finetune
    if settings is None:
        raise InputError("finetune: pretrain: kd learns from a fine-tuned teacher; give finetune")
    data = labelled_data(config, settings, pretraining)
    runs.check_monitor(settings.train, data, "finetune.train", m.VALIDATION)
    fresh = model.model_copy(update={"args": {**model.args, **settings.args}, "pretrained": False, "checkpoint": None})

    def setup(context: RunContext) -> TrainSetup:
        network = create_model(fresh, data, field="finetune")
        load_backbone(network, context.artefacts[source])
        network = adapted(network, data, model, field=source)
        tuned = Finetune(network, layer_decay=settings.layer_decay, weight_decay=settings.train.optimizer.weight_decay)
        return supervised_setup(tuned, data, settings.train, config.seed)

    return TrainStage(
        name, settings.train, setup, lambda network, folder: save_model(inner_vit(network), folder, data), name
    )


def labelled_data(config: Run, settings: FinetuneConfig, data: Data) -> Data:
    """The data of fine-tuning: the same splits, `finetune.per_class` training images, `finetune.augment`."""
    if settings.per_class in (None, config.data.per_class):
        return data.augmented(settings.augment)
    update = {"per_class": settings.per_class, "augment": settings.augment}
    return load_data(config.data.model_copy(update=update), config.seed)


def _probe_stage(config: Run, data: Data, probe: ProbeConfig, train: TrainConfig) -> Stage:
    def setup(context: RunContext) -> TrainSetup:
        encoder = load_model(context.artefacts["student"], field="student")
        distiller = LinearProbe(
            encoder, data.num_classes, pool=probe.pool, lars=train.optimizer if probe.lars else None
        )
        return TrainSetup(distiller, pretraining_loader(data, train, config.seed))

    return TrainStage("probe", train, setup, _save_head, artefact="probe")


def _save_head(head: nn.Module, folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in head.state_dict().items()}, folder / "head.safetensors")


# ---------------------------------------------------------------- checks


def check(config: Run, data: Data, teachers: Mapping[str, ModelConfig]) -> dict[str, nn.Module]:
    """Builds every encoder, so that what is wrong is said before anything trains; returns them, student first.

    They have random weights, behind the normalisation that they get.
    """
    for field, teacher in teachers.items():
        if isinstance(teacher, TeacherConfig):
            validated = [] if isinstance(teacher, MaskedTeacherConfig) else m.VALIDATION
            runs.check_monitor(teacher.train, data, f"{field}.train", validated)
            if teacher.cache is not None:
                raise InputError(f"{field}.cache: its logits are not what this method learns from; leave it out")
    if data.config.augment.mixup or data.config.augment.cutmix:
        raise InputError("data.augment: mixup and cutmix mix labels, pre-training reads none; give finetune.augment")
    runs.check_monitor(config.train, data, "train", [])
    found = {}
    with torch.random.fork_rng(devices=[]):
        for field, model in {"student": config.student, **teachers}.items():
            plain = model.model_copy(update={"pretrained": False, "checkpoint": None}) if field != "student" else model
            network = adapted(create_model(plain, data, field=field, num_classes=0), data, model, field=field)
            check_vit(network, field)
            found[field] = network
    if inner_vit(found["student"]) is not found["student"]:
        raise InputError("student: mean, std and input_size are for teachers; data has those of the student")
    return found


# ---------------------------------------------------------------- evaluation


def evaluate(config: Run, artefacts: Artefacts, teachers: Mapping[str, ModelConfig], data: Data) -> dict[str, Any]:
    """Accuracy of the frozen features and of the fine-tuned student on the test images.

    student/finetune (also student/accuracy, with its like): the fine-tuned classifier. student/linear_probe and
    student/knn: the frozen encoder; <teacher>/...: the same of each teacher.
    """
    result: dict[str, Any] = {}
    encoder = load_model(artefacts["student"], field="student")
    if config.finetune is not None:
        tuned = load_model(artefacts["finetuned"], num_classes=data.num_classes, field="finetuned")
        logits, labels = m.predict(tuned, data.test)
        result.update(m.prefixed("student", m.classification_metrics(logits, labels)))
        result["student/finetune"] = result["student/accuracy"]
        result["confusion_matrix"], result["class_names"] = m.confusion_matrix(logits, labels), data.class_names
    if config.probe is not None:
        result.update(m.prefixed("student", probe_metrics(encoder, data, config.probe)))
        if config.probe.train is not None:
            result["student/linear_probe"] = _trained_probe(config.probe, artefacts, encoder, data)
        for name, model in teachers.items():
            teacher = load_encoder(artefacts[name], data, model, field=name)
            result.update(m.prefixed(name, probe_metrics(teacher, data, config.probe)))
    result["student/parameters"] = sum(parameter.numel() for parameter in encoder.parameters())
    return result


def _trained_probe(probe: ProbeConfig, artefacts: Artefacts, encoder: nn.Module, data: Data) -> float:
    head = LinearProbe(encoder, data.num_classes, pool=probe.pool).student
    head.load_state_dict(load_weights(artefacts["probe"] / "head.safetensors"))
    with torch.no_grad():
        logits = head.eval()(frozen_features(encoder, data.test, probe.pool))
    return m.classification_metrics(logits, data.test.labels)["accuracy"]


def predict(config: Run, artefacts: Artefacts, count: int) -> list[dict[str, Any]]:
    """Test images with the truth and the fine-tuned student's answer for the report."""
    if "finetuned" not in artefacts:
        return []
    return runs.predict(config, {"student": artefacts["finetuned"]}, count)

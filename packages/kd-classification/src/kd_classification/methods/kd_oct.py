"""KD-OCT: Efficient Knowledge Distillation for Clinical-Grade Retinal OCT Classification (arXiv 2512.09069, 2025).

A clinical recipe: a strong teacher is trained under patient-disjoint cross-validation against class imbalance, then a
small student learns from it on line, the teacher answering on the student's own augmented batch.

    teacher  a_c = N / (C n_c)                                           balanced class weights              (E1)
             L = mean_i a_{y_i} (1 - p_i)^g (-log p_i),  p_i = softmax(z_i)_{y_i},  g = 2                    (E2)
             head and backbone with learning rates of their own, backbone frozen in the first epochs,
             stochastic weight averaging in the last; the average or the best epoch, by validation loss
    student  L = alpha T^2 KL( softmax(z_t / T) || softmax(z_s / T) ) + beta CE(z_s, y)                 (E3 to E5)
             alpha = .7, beta = .3, T = 4; every weight trains

The folds are made once over patients (seed 43), written to the run and shared by teacher and student: a teacher that
has seen the student's test patients would leak them. One run is one fold (`protocol.fold`). The student ships.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from kd_classification import metrics as m
from kd_classification import runs
from kd_classification.data import AugmentConfig, Batch, Data, Images, load_data
from kd_classification.engine.averaging import TestTimeAugmented, recompute_statistics, weight_average
from kd_classification.engine.classifier import ClassifierDistiller
from kd_classification.engine.folds import FoldPlan, ProtocolConfig, make_plan, shared_groups
from kd_classification.models import save_model
from kd_classification.sources import Source
from kdcore.config import MethodConfig, ScheduleConfig
from kdcore.distiller import LossTerms, Player
from kdcore.errors import InputError
from kdcore.losses import soft_target_kl
from kdcore.method import Method
from kdcore.stages import Artefacts, Procedure, RunContext, Stage
from kdcore.training import TrainSetup

FocalForm = Literal["paper", "release"]


class KDOCTConfig(MethodConfig):
    alpha: float = Field(0.7, ge=0, description="weight of the soft targets; 0 leaves the teacher out")
    beta: float = Field(0.3, ge=0, description="weight of the unweighted cross-entropy with the labels")
    temperature: float = Field(4.0, gt=0, description="temperature T of the softened probabilities")
    focal_gamma: float = Field(2.0, ge=0, description="g, focusing exponent of the teacher's loss; 0 is none")
    focal_form: FocalForm = Field("paper", description="class weight outside (paper) or inside (release) the focusing")
    class_weights: bool = Field(True, description="balanced class weights in the teacher's loss")
    backbone_lr_scale: float = Field(0.2, gt=0, description="teacher: backbone's learning rate / head's (2e-5 / 1e-4)")
    freeze_epochs: int = Field(5, ge=0, description="teacher: first epochs in which only the head trains")
    swa_start: int | None = Field(100, ge=0, description="teacher: epoch from which weights are averaged; null: never")
    swa_lr: float = Field(1e-5, gt=0, description="teacher: constant learning rate of both groups from swa_start on")
    teacher_weights: Literal["best", "swa", "auto"] = Field(
        "auto", description="the monitored (else last) epoch, the average, or whichever has the lower validation loss"
    )
    tta: bool = Field(True, description="evaluate the teacher by the mean logits of five views, too")
    tta_angle: float = Field(5.0, ge=0, le=180, description="degrees of the rotated view (code 5, README 15)")

    @model_validator(mode="after")
    def _learns_something(self) -> KDOCTConfig:
        if self.alpha == 0 and self.beta == 0:
            raise ValueError("alpha and beta are both 0: the student has nothing to learn from")
        if self.teacher_weights == "swa" and self.swa_start is None:
            raise ValueError("teacher_weights = swa needs swa_start, the epoch from which weights are averaged")
        return self


class OCTTeacherConfig(runs.TeacherConfig):
    augment: AugmentConfig = Field(default_factory=AugmentConfig, description="augmentation of the teacher's training")


class KDOCTRun(runs.ClassificationRun[KDOCTConfig]):
    """`data.augment` is the student's augmentation, `teacher.augment` the teacher's."""

    teacher: OCTTeacherConfig
    protocol: ProtocolConfig = Field(default_factory=ProtocolConfig)


# ---------------------------------------------------------------- losses


def balanced_weights(counts: Sequence[int] | Tensor) -> Tensor:
    """a_c = N / (C n_c) (E1), float64 (C,), so that sum_c n_c a_c = N. Raises ValueError for an empty class."""
    n = torch.as_tensor(counts, dtype=torch.float64)
    if n.ndim != 1 or len(n) == 0 or bool((n <= 0).any()):
        raise ValueError(f"counts = {n.tolist()}: expected a positive number of images for every class")
    return n.sum() / (len(n) * n)


def focal_loss(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None, gamma: float = 2.0, form: FocalForm = "paper"
) -> Tensor:
    """Class-weighted focal loss, logits (B, C), labels (B,) int64, weights (C,) or None -> scalar, at least float32.

        paper    mean_i a_i (1 - p_i)^g (-log p_i)                                    (E2)
        release  mean_i (1 - q_i)^g c_i,  c_i = a_i (-log p_i),  q_i = exp(-c_i)      (E2')

    In the release's form a rare class (a > 1) looks harder than it is and is focused on more. Both are plain means
    over the batch, and equal where g = 0 or a = 1. Raises ValueError for labels that are not class indices.
    """
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(f"labels {tuple(labels.shape)} {labels.dtype}: the focal loss needs class indices (B,)")
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
    nll = F.nll_loss(log_p, labels, reduction="none")
    weight = torch.ones_like(nll) if weights is None else weights.to(nll)[labels]
    difficulty = nll if form == "paper" else weight * nll
    # 1 - p as expm1, and away from 0, where the power has no gradient for g < 1.
    factor = (-torch.expm1(-difficulty)).clamp_min(torch.finfo(nll.dtype).tiny) ** gamma
    return (factor * weight * nll).mean()


# ---------------------------------------------------------------- teacher


def head_and_backbone(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """A timm network's parameters in two lists: the top-level module that holds the classifier, and all others."""
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None
    for child in model.children():
        if classifier is not None and any(module is classifier for module in child.modules()):
            head = list(child.parameters())
            own = {id(parameter) for parameter in head}
            return head, [parameter for parameter in model.parameters() if id(parameter) not in own]
    raise InputError(f"teacher.name: {type(model).__name__} has no classifier of its own that timm knows")


class FocalTeacher(ClassifierDistiller):
    """The teacher's training: focal loss, head and backbone as two groups, frozen start, averaged end."""

    def __init__(
        self,
        student: nn.Module,
        *,
        weights: Tensor | None = None,
        gamma: float = 2.0,
        form: FocalForm = "paper",
        backbone_lr_scale: float = 0.2,
        freeze_epochs: int = 5,
        swa_start: int | None = None,
        schedule: ScheduleConfig | None = None,
    ):
        super().__init__(None, student)
        self.register_buffer("weights", weights, persistent=False)
        self.gamma, self.form, self.schedule = gamma, form, schedule
        self.backbone_lr_scale, self.freeze_epochs, self.swa_start = backbone_lr_scale, freeze_epochs, swa_start
        self.average = None if swa_start is None else weight_average(student)

    def players(self) -> list[Player]:
        head, backbone = head_and_backbone(self.student)
        groups = [{"params": head}, {"params": backbone, "lr_scale": self.backbone_lr_scale}]
        return [Player("student", self.student, param_groups=groups, schedule=self.schedule)]

    def epoch_start(self) -> None:
        _, backbone = head_and_backbone(self.student)
        for parameter in backbone:
            parameter.requires_grad_(self.progress.epoch >= self.freeze_epochs)

    def epoch_end(self) -> None:
        if self.average is not None and self.swa_start is not None and self.progress.epoch >= self.swa_start:
            self.average.update_parameters(self.student)

    def criterion(self, logits: Tensor, labels: Tensor) -> Tensor:
        return focal_loss(logits, labels, self.weights, self.gamma, self.form)

    def loss(self, batch: Batch, player: str = "student") -> LossTerms:
        return LossTerms(focal=(1.0, self.criterion(self.student(batch.images), batch.labels)))


class TeacherTraining:
    """Sets the teacher's training up, and at its end chooses between the best epoch and the average."""

    def __init__(self, config: KDOCTRun, data: Data):
        self.config, self.data = config, data
        assert config.teacher.train is not None
        self.train = config.teacher.train

    def setup(self, network: nn.Module) -> TrainSetup:
        args, held_out = self.config.method_args, _validation(self.data)
        schedule = self.train.schedule
        if args.swa_start is not None:
            schedule = schedule.model_copy(update={"hold_epoch": float(args.swa_start), "hold_lr": args.swa_lr})
        self.distiller = FocalTeacher(
            network,
            weights=class_weights(self.data) if args.class_weights else None,
            gamma=args.focal_gamma,
            form=args.focal_form,
            backbone_lr_scale=args.backbone_lr_scale,
            freeze_epochs=args.freeze_epochs,
            swa_start=args.swa_start,
            schedule=schedule,
        )
        setup = runs.supervised_setup(self.distiller, self.data, self.train, self.config.seed)

        def evaluate(model: nn.Module) -> dict[str, float]:
            logits, labels = m.predict(model, held_out)
            return {**m.classification_metrics(logits, labels), "loss": self._criterion(logits, labels)}

        return TrainSetup(self.distiller, setup.loader, evaluate)

    def _criterion(self, logits: Tensor, labels: Tensor) -> float:
        device = next(self.distiller.student.parameters()).device
        with torch.no_grad():
            return float(self.distiller.criterion(logits.to(device), labels.to(device)))

    def save(self, network: nn.Module, folder: Path) -> None:
        """Writes the chosen weights, and `selection.json` with what the choice was made by."""
        args, average, held_out = self.config.method_args, self.distiller.average, _validation(self.data)
        count = 0 if average is None else int(average.n_averaged)
        losses = {"best": self._criterion(*m.predict(network, held_out))}
        if average is not None and count > 0:
            recompute_statistics(average.module, self._loader())
            losses["swa"] = self._criterion(*m.predict(average.module, held_out))
        chosen = args.teacher_weights if args.teacher_weights != "auto" else min(losses, key=lambda name: losses[name])
        if chosen == "swa" and average is not None:
            network.load_state_dict(average.module.state_dict())
        save_model(network, folder, self.data)
        selection = {"chosen": chosen, "validation_loss": losses, "averaged_epochs": count}
        (folder / "selection.json").write_text(json.dumps(selection, indent=2))

    def _loader(self) -> Any:
        train, repeats = self.train, self.data.config.augment.repeats
        return self.data.train.loader(
            train.batch_size, seed=self.config.seed, train=True, num_workers=train.num_workers, repeats=repeats
        )


def class_weights(data: Data) -> Tensor:
    """(E1) for the training images. Raises InputError that names a class without any."""
    counts = class_counts(data.train, data.num_classes)
    for name, count in zip(data.class_names, counts.tolist(), strict=True):
        if count == 0:
            raise InputError(f"protocol: class '{name}' has no training image in this fold")
    return balanced_weights(counts).float()


def class_counts(images: Images, classes: int) -> Tensor:
    """How many images of each class there are, (classes,)."""
    return torch.bincount(images.labels, minlength=classes)


def _validation(data: Data) -> Images:
    assert data.validation is not None
    return data.validation


# ---------------------------------------------------------------- student


class KDOCT(ClassifierDistiller):
    """The student's training: the teacher answers on the same augmented images, in eval mode, without gradient."""

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        *,
        alpha: float = 0.7,
        beta: float = 0.3,
        temperature: float = 4.0,
    ):
        super().__init__(teacher, student)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def loss(self, batch: Batch, player: str = "student") -> LossTerms:
        logits = self.student(batch.images)
        terms = LossTerms()
        if self.alpha > 0:
            terms["kd"] = (self.alpha, soft_target_kl(logits, self.teacher_logits(batch), self.temperature))
        terms["ce"] = (self.beta, F.cross_entropy(logits, batch.labels))
        return terms


def build(config: KDOCTRun, networks: runs.Networks) -> KDOCT:
    args = config.method_args
    return KDOCT(networks.teacher, networks.student, alpha=args.alpha, beta=args.beta, temperature=args.temperature)


# ---------------------------------------------------------------- stages and evaluation


def fold_data(config: KDOCTRun, path: Path) -> tuple[Data, FoldPlan]:
    """The data of the run's fold and the plan of all folds: read from `path` where it exists, else made."""
    plans = []

    def parts(source: Source):
        plans.append(FoldPlan.read(path) if path.is_file() else make_plan(source, config.protocol))
        return plans[0].apply(source, config.protocol.fold)

    return load_data(config.data, config.seed, parts=parts), plans[0]


def stages(config: KDOCTRun, context: RunContext) -> list[Stage]:
    _check_arguments(config)
    data, plan = fold_data(config, context.folder / "folds.json")
    runs.check(config, data, teacher_metrics=["loss"])

    def write_folds(context: RunContext) -> Artefacts:
        path = context.folder / "folds.json"
        if context.is_main:
            plan.write(path)
        return {"folds": path}

    teacher_data = data.augmented(config.teacher.augment)
    if config.teacher.train is None:
        teacher = runs.teacher_stage(config, teacher_data)
    else:
        training = TeacherTraining(config, teacher_data)
        args = config.method_args.model_dump(mode="json", exclude={"alpha", "beta", "temperature", "tta", "tta_angle"})
        identity = {"kd_oct": args, "folds": plan.fingerprint, "fold": config.protocol.fold}
        teacher = runs.teacher_stage(
            config, teacher_data, fingerprint=identity, setup=training.setup, save=training.save
        )
        if config.method_args.class_weights:
            class_weights(teacher_data)
    return [Procedure("folds", write_folds), teacher, runs.student_stage(config, data, build)]


def _check_arguments(config: KDOCTRun) -> None:
    args, teacher = config.method_args, config.teacher
    if config.data.validation:
        raise InputError(f"data.validation = {config.data.validation}: protocol.validation holds images out here")
    if teacher.cache is not None:
        raise InputError("teacher.cache: the teacher answers on the student's augmented images; nothing to look up")
    if teacher.augment.mixup or teacher.augment.cutmix:
        raise InputError("teacher.augment.mixup, cutmix: must be 0, the focal loss needs class indices")
    if teacher.train is None:
        return
    if teacher.train.ema is not None:
        raise InputError("teacher.train.ema: must be null, the teacher's weights are averaged by swa_start")
    if args.teacher_weights == "swa":
        # Early stopping or a short budget may end before averaging starts: then there is nothing to choose.
        epochs = teacher.train.epochs
        if teacher.train.patience is not None or epochs is None or (args.swa_start or 0) >= epochs:
            raise InputError(
                f"method_args.teacher_weights = 'swa': needs teacher.train.epochs > swa_start = {args.swa_start} "
                "and no teacher.train.patience; 'auto' takes the average where there is one"
            )


def evaluate(config: KDOCTRun, artefacts: Artefacts) -> dict[str, Any]:
    """The shared metrics; sensitivity, specificity and the rarest class's recall (E9); the teacher under TTA (E8)."""
    data, _ = fold_data(config, artefacts["folds"])
    result = runs.evaluate(config, artefacts, data=data)
    rarest = int(class_counts(data.train, data.num_classes).argmin())
    result.update(m.prefixed("student", clinical_rates(result["confusion_matrix"], rarest)))
    if config.method_args.tta:
        teacher = runs.load_teacher(config, data, artefacts["teacher"])
        black = [-mean / std for mean, std in zip(data.mean, data.std, strict=True)]
        views = TestTimeAugmented(teacher, angle=config.method_args.tta_angle, black=black)
        logits, labels = m.predict(views, data.test)
        result["teacher_tta/accuracy"] = m.classification_metrics(logits, labels)["accuracy"]
        result.update(m.prefixed("teacher_tta", clinical_rates(m.confusion_matrix(logits, labels), rarest)))
    if (artefacts["teacher"] / "selection.json").is_file():
        selection = json.loads((artefacts["teacher"] / "selection.json").read_text())
        result["teacher/is_average"] = float(selection["chosen"] == "swa")
    result["shared_patients"] = shared_groups(data.train.split, _validation(data).split, data.test.split)
    return result


def clinical_rates(confusion: Sequence[Sequence[int]], rarest: int) -> dict[str, float]:
    """Macro sensitivity and specificity (E9) over the classes that occur, and the recall of class `rarest`."""
    sensitivity, specificity = m.rates(confusion)
    return {
        "sensitivity": float(sensitivity.nanmean()),
        "specificity": float(specificity.nanmean()),
        "rarest_recall": float(sensitivity[rarest]),
    }


def predict(config: KDOCTRun, artefacts: Artefacts, count: int) -> list[dict[str, Any]]:
    return runs.predict(config, artefacts, count, data=fold_data(config, artefacts["folds"])[0])


METHOD = Method("kd_oct", __doc__ or "", KDOCTRun, stages, evaluate, predict)

"""DeiT-LT: Distillation Strikes Back for Vision Transformer Training on Long-Tailed Datasets (arXiv 2404.02900, 2024).

A ViT with a class and a distillation token learns a class-imbalanced set from scratch: the class token from the labels,
the distillation token from a small CNN. Two things make the tokens experts of frequent and of rare classes. The CNN,
trained by sharpness-aware minimisation, labels the student's own strongly augmented and mixed images, which are out of
its distribution. And in the last epochs the distillation loss is re-weighted (DRW). With N_y images of class y, z_c and
z_d the logits of the two heads, x~, y~ a mixed image and its soft label:

    L     = (1 - a) L_cls + a L_dist
    L_cls = mean_b CE(z_c, y~)                                  plain cross-entropy once mixing is off
    L_dist = mean_b CE(z_d, yt),  yt = argmax teacher(x~)       the teacher labels the mixed image
    from the DRW epoch on: L_dist = sum_b w_{yt_b} CE_b / sum_b w_{yt_b},   w_y ~ (1 - beta) / (1 - beta^{N_y})
    prediction: argmax (z_c + z_d) / 2                          logits are averaged, not probabilities

The weight is that of the teacher's label. Teacher frozen, in eval mode; both heads of the student ship, in timm's own
distilled ViT, whose eval forward is the average.

The paper's teacher is trained by PaCo, or LDAM-DRW, with SAM; any saved network may be it. The one trained on the spot
minimises cross-entropy, logit-adjusted (arXiv 2007.07314) by default, with SAM: that loss is ours.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kd_classification import metrics as m
from kd_classification import runs
from kd_classification.data import AugmentConfig, Batch, Data, Images, load_data
from kd_classification.engine.classifier import ClassifierDistiller
from kd_classification.engine.sam import sam_loss
from kd_classification.models import create_model, load_model
from kd_classification.runs import ClassificationRun, Networks, TeacherConfig
from kd_classification.transforms import make_mixup
from kdcore.config import MethodConfig
from kdcore.distiller import LossTerms
from kdcore.errors import InputError
from kdcore.method import Method
from kdcore.stages import Artefacts, RunContext, Stage
from kdcore.training import TrainSetup


class DeiTLTConfig(MethodConfig):
    alpha: float = Field(0.5, ge=0, le=1, description="a, weight of the distillation token's loss")
    beta: float = Field(0.9999, ge=0, lt=1, description="beta of the effective number of images")
    drw_epoch: int | None = Field(None, ge=0, description="epoch from which rare classes weigh more; None: never")
    mix_in_drw: bool = Field(False, description="keep mixup and cutmix on from drw_epoch on, as for the large sets")
    reweight_labels: bool = Field(False, description="ablation: re-weight the class token's loss, too")
    teacher_labels: Literal["mixed", "clean", "none"] = Field(
        "mixed",
        description="what the teacher labels: the student's image, or (ablation) the clean one; none: no teacher",
    )
    groups: list[int] | None = Field(
        None, description="classes counted as head, mid and tail; None: about a third each"
    )
    teacher_loss: Literal["logit_adjusted", "ce"] = Field(
        "logit_adjusted", description="loss of the teacher that is trained on the spot"
    )
    teacher_tau: float = Field(1.0, ge=0, description="tau of the logit-adjusted loss")
    teacher_rho: float = Field(0.05, ge=0, description="rho of its sharpness-aware minimisation; 0: none")


class LongTailTeacher(TeacherConfig):
    augment: AugmentConfig = Field(default_factory=AugmentConfig, description="its own, weak training augmentation")


class DeiTLTRun(ClassificationRun[DeiTLTConfig]):
    teacher: LongTailTeacher


# ---------------------------------------------------------------- losses


def effective_weights(counts: Sequence[int] | Tensor, beta: float = 0.9999) -> Tensor:
    """w_y = (1 - beta) / (1 - beta^N_y), scaled to the sum C (arXiv 1901.05555), float64 (C,).

    A class without images gets weight 0, with a warning. Raises InputError when no class has images.

    >>> [round(w, 6) for w in effective_weights([5000, 500, 50]).tolist()]
    [0.034107, 0.275167, 2.690725]
    """
    n = torch.as_tensor(counts, dtype=torch.float64)
    if n.ndim != 1 or not bool((n > 0).any()) or bool((n < 0).any()):
        raise InputError(f"counts = {n.tolist()}: allowed: images of each class, (C,), some of them above 0")
    if bool((n == 0).any()):
        warnings.warn(f"{int((n == 0).sum())} classes have no training image and get weight 0", stacklevel=2)
    # expm1: 1 - beta^N without cancellation; beta = 0 counts every class alike
    number = -torch.expm1(n * math.log(beta)) / (1 - beta) if beta > 0 else (n > 0).double()
    weights = torch.where(n > 0, 1 / number.clamp_min(torch.finfo(n.dtype).tiny), 0.0)
    return weights * len(n) / weights.sum()


def hard_distillation(logits: Tensor, teacher_logits: Tensor, weights: Tensor | None = None) -> Tensor:
    """L_dist of logits (B, C) on the teacher's classes, argmax of (B, C); `weights` (C,) is DRW's weighted mean."""
    weights = None if weights is None else weights.to(logits.device, logits.dtype)
    return F.cross_entropy(logits, teacher_logits.argmax(dim=1), weight=weights)


def logit_adjusted(logits: Tensor, labels: Tensor, counts: Tensor, tau: float = 1.0) -> Tensor:
    """CE(z + tau log(N / sum N), y) (arXiv 2007.07314): what remains of z is balanced. (B, C), (B,), (C,) -> scalar."""
    prior = (counts / counts.sum()).clamp_min(1e-12).log().to(logits)
    return F.cross_entropy(logits + tau * prior, labels)


# ---------------------------------------------------------------- networks


def tokens(student: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """The class and the distillation token (B, D) of a timm distilled ViT, in front of their heads."""
    features = student.forward_features(images)
    return features[:, 0], features[:, 1]


def two_logits(student: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """z_c and z_d (B, C), in training and evaluation alike."""
    cls, dist = tokens(student, images)
    return student.head(student.head_drop(cls)), student.head_dist(student.head_drop(dist))


class LongTailSupervised(ClassifierDistiller):
    """How the CNN learns: (logit-adjusted) cross-entropy, by sharpness-aware minimisation."""

    def __init__(self, student: nn.Module, counts: Tensor, *, tau: float = 1.0, rho: float = 0.05):
        super().__init__(None, student)
        self.tau, self.rho = tau, rho
        self.register_buffer("counts", counts.double(), persistent=False)

    def loss(self, batch: Batch, player: str = "student") -> LossTerms:
        def criterion(logits: Tensor) -> Tensor:
            return logit_adjusted(logits, batch.labels, self.counts, self.tau)

        return LossTerms(ce=(1.0, sam_loss(self.student, batch.images, criterion, self.rho)))


class DeiTLT(ClassifierDistiller):
    """Arguments as in `DeiTLTConfig`. `counts` (C,): training images of each class. `clean_labels` (N,): the teacher's
    class of every training image, for teacher_labels "clean". In a loop of your own set `progress.epoch`."""

    def __init__(
        self,
        teacher: nn.Module | None,
        student: nn.Module,
        counts: Tensor,
        *,
        alpha: float = 0.5,
        beta: float = 0.9999,
        drw_epoch: int | None = None,
        mix_in_drw: bool = False,
        reweight_labels: bool = False,
        teacher_labels: Literal["mixed", "clean", "none"] = "mixed",
        clean_labels: Tensor | None = None,
    ):
        super().__init__(teacher, student)
        if not hasattr(student, "head_dist"):
            raise InputError(
                f"student: {type(student).__name__} has no distillation token; give a timm *distilled* ViT"
            )
        if teacher_labels == "clean" and clean_labels is None:
            raise InputError("clean_labels: needed for teacher_labels = 'clean'")
        self.alpha, self.drw_epoch, self.mix_in_drw = alpha, drw_epoch, mix_in_drw
        self.reweight_labels, self.teacher_labels = reweight_labels, teacher_labels
        self.register_buffer("weights", effective_weights(counts, beta).float(), persistent=False)
        self.register_buffer("clean_labels", clean_labels, persistent=False)

    @property
    def deferred(self) -> bool:
        """Whether re-weighting is on in this epoch."""
        return self.drw_epoch is not None and self.progress.epoch >= self.drw_epoch

    def mixed(self, batch: Batch) -> Batch:
        return batch if self.deferred and not self.mix_in_drw else super().mixed(batch)

    def loss(self, batch: Batch, player: str = "student") -> LossTerms:
        z_c, z_d = two_logits(self.student, batch.images)
        weights = self.weights if self.deferred else None
        on_labels = weights if self.reweight_labels else None
        terms = LossTerms(cls=(1 - self.alpha, F.cross_entropy(z_c, batch.labels, weight=on_labels)))
        if self.alpha > 0:
            terms["dist"] = (self.alpha, self.distillation(z_d, batch, weights))
        return terms

    def distillation(self, logits: Tensor, batch: Batch, weights: Tensor | None) -> Tensor:
        if self.teacher_labels == "none":
            return F.cross_entropy(logits, batch.labels, weight=weights)
        if self.teacher_labels == "clean":
            return F.cross_entropy(logits, self.clean_labels[batch.index.to(logits.device)], weight=weights)
        return hard_distillation(logits, self.teacher_logits(batch), weights)


# ---------------------------------------------------------------- stages


def class_counts(images: Images, classes: int) -> Tensor:
    """Training images of each class, (C,)."""
    return torch.bincount(images.labels, minlength=classes)


def build(config: DeiTLTRun, networks: Networks) -> DeiTLT:
    args, data = config.method_args, networks.data
    settings = args.model_dump(exclude={"groups", "teacher_loss", "teacher_tau", "teacher_rho"})
    clean = None
    if args.teacher_labels == "clean":
        clean = m.predict(networks.teacher, data.train_plain)[0].argmax(dim=1)
    counts = class_counts(data.train, data.num_classes)
    return DeiTLT(networks.teacher, networks.student, counts, clean_labels=clean, **settings)


def stages(config: DeiTLTRun, context: RunContext) -> list[Stage]:
    data = load_data(config.data, config.seed)
    check(config, data)
    args, teacher_data = config.method_args, data.augmented(config.teacher.augment)
    tau = args.teacher_tau if args.teacher_loss == "logit_adjusted" else 0.0

    def setup(network: nn.Module) -> TrainSetup:
        assert config.teacher.train is not None
        counts = class_counts(data.train, data.num_classes)
        distiller = LongTailSupervised(network, counts, tau=tau, rho=args.teacher_rho)
        return runs.supervised_setup(distiller, teacher_data, config.teacher.train, config.seed)

    identity = {"deit_lt": {"tau": tau, "rho": args.teacher_rho}}
    teacher = runs.teacher_stage(config, teacher_data, fingerprint=identity, setup=setup)
    return [teacher, runs.student_stage(config, data, build)]


def check(config: DeiTLTRun, data: Data) -> None:
    """What can be wrong with the config, before anything trains."""
    runs.check(config, data)
    with torch.random.fork_rng(devices=[]):
        student = create_model(config.student, data, field="student")
    if not hasattr(student, "head_dist"):
        raise InputError(
            f"student.name = '{config.student.name}': has no distillation token; allowed: timm's *distilled* ViTs, "
            "deit_base_distilled_patch16_224"
        )
    groups, augment = config.method_args.groups, config.data.augment
    if groups is not None and (len(groups) != 3 or min(groups) < 1 or sum(groups) != data.num_classes):
        raise InputError(
            f"method_args.groups = {groups}: allowed: three numbers of classes that add up to {data.num_classes}"
        )
    if data.num_classes < 3:
        raise InputError(f"data: {data.num_classes} classes; head, mid and tail need at least 3")
    if config.teacher.augment.mixup or config.teacher.augment.cutmix:
        raise InputError("teacher.augment.mixup, cutmix: must be 0, the teacher learns from class indices")
    if (augment.mixup or augment.cutmix) and min(config.train.batch_size, len(data.train)) % 2:
        raise InputError(
            f"train.batch_size = {config.train.batch_size}: must be even with data.augment.mixup or cutmix"
        )
    if config.teacher.cache is not None:
        raise InputError("teacher.cache: the teacher labels the student's augmented images; nothing to look up")
    epochs, drw = config.train.epochs, config.method_args.drw_epoch
    if drw is not None and epochs is not None and drw >= epochs:
        raise InputError(f"method_args.drw_epoch = {drw}: must be below train.epochs = {epochs}, or null")


# ---------------------------------------------------------------- evaluation


def group_accuracy(logits: Tensor, labels: Tensor, groups: Sequence[int]) -> dict[str, float]:
    """accuracy, and the mean recall of the classes in head, mid and tail, for logits (N, C) of classes by size."""
    recall, _ = m.rates(m.confusion_matrix(logits, labels))
    parts = zip(("head", "mid", "tail"), recall.split(list(groups)), strict=True)
    accuracy = float((logits.argmax(1) == labels).double().mean())
    return {"accuracy": accuracy, **{name: float(part.nanmean()) for name, part in parts}}


def class_groups(config: DeiTLTRun, data: Data) -> list[int]:
    third = round(data.num_classes * 0.3)
    return config.method_args.groups or [third, data.num_classes - 2 * third, third]


@torch.no_grad()
def token_metrics(student: nn.Module, images: Images) -> dict[str, float]:
    """How far the tokens are apart: cosine of their embeddings; singular values with 99 % of the energy of DIST's."""
    student = student.eval()
    device = next(student.parameters()).device
    pairs = [tokens(student, batch.images.to(device)) for batch in images.loader(512)]
    cls, dist = (torch.cat(part).double().cpu() for part in zip(*pairs, strict=True))
    energy = torch.linalg.svdvals(dist).square()
    share = energy.cumsum(0) / energy.sum()
    return {
        "token_cosine": float(F.cosine_similarity(cls, dist, dim=1).mean()),
        "dist_rank": float(int((share < 0.99).sum()) + 1),
    }


@torch.no_grad()
def teacher_agreement(config: DeiTLTRun, teacher: nn.Module, data: Data) -> dict[str, float]:
    """Share of training images whose teacher label is the (larger part of the) true one: as the student sees them, and
    clean."""
    mixup = make_mixup(config.data.augment, data.num_classes)
    device, hits, seen = next(teacher.parameters()).device, 0, 0
    batch_size = config.train.batch_size
    for batch in data.train.loader(batch_size, seed=config.seed, train=True):
        images, labels = batch.images, batch.labels
        if mixup is not None:
            images, labels = mixup(images.clone(), labels)
            labels = labels.argmax(dim=1)
        answers = teacher.eval()(images.to(device)).argmax(dim=1).cpu()
        hits, seen = hits + int((answers == labels).sum()), seen + len(answers)
    clean, labels = m.predict(teacher, data.train_plain)
    return {
        "teacher/agrees_on_mixed": hits / max(1, seen),
        "teacher/agrees_on_clean": float((clean.argmax(1) == labels).double().mean()),
    }


def evaluate(config: DeiTLTRun, artefacts: Artefacts) -> dict[str, Any]:
    """The shared metrics; accuracy on head, mid and tail classes of both heads, their average and the teacher; how the
    heads differ; how often the teacher's labels are the true ones."""
    data = load_data(config.data, config.seed)
    result = runs.evaluate(config, artefacts, data=data)
    groups = class_groups(config, data)
    student = load_model(artefacts["student"], field="student")
    teacher = runs.load_teacher(config, data, artefacts["teacher"])
    heads = [_Head(student, index) for index in (0, 1)]
    logits = {"cls": m.predict(heads[0], data.test)[0], "dist": m.predict(heads[1], data.test)[0]}
    logits["student"], labels = m.predict(student, data.test)
    logits["teacher"] = m.predict(teacher, data.test)[0]
    for name, values in logits.items():
        result.update(m.prefixed(name, group_accuracy(values, labels, groups)))
    result["head_disagreement"] = 1 - m.agreement(logits["cls"], logits["dist"])
    result.update(token_metrics(student, data.test))
    result.update(teacher_agreement(config, teacher, data))
    return result


class _Head(nn.Module):
    """One head's logits of a distilled ViT."""

    def __init__(self, student: nn.Module, index: int):
        super().__init__()
        self.student, self.index = student, index

    def forward(self, images: Tensor) -> Tensor:
        return two_logits(self.student, images)[self.index]


METHOD = Method("deit_lt", __doc__ or "", DeiTLTRun, stages, evaluate, runs.predict)

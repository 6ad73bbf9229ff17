"""Beyond Self-Supervision: A Simple Yet Effective Network Distillation Alternative to Improve Backbones
(arXiv 2103.05959, 2021).

SSLD. A backbone is pre-trained by imitating a strong teacher's class probabilities and nothing else. No label is read,
so unlabelled images can be added freely; a labeller picks them by its own confidence. z_s, z_t logits (B, C),
p = softmax(z_s), q = softmax(z_t), temperature 1:

    L = mean_i (KL(q_i || p_i) + KL(p_i || q_i)) / 2 = mean_i sum_k (q_ik - p_ik)(ln q_ik - ln p_ik) / 2        (E1)
    dL/dz_s,i = (1 / 2B) [(p_i - q_i) + p_i ((ln p_i - ln q_i) - KL(p_i || q_i))]                               (E2)

The paper and its code call E1 "JS divergence"; it is half of Jeffreys' divergence, not the Jensen-Shannon divergence
with a mixture, whose value near equality is 4 times smaller. The teacher is frozen, but its batch norm uses the
statistics of the batch (`teacher_bn: train`); its buffers do not move.

Stages: teacher; select: images of the pool that the evaluation also has are dropped, then of each predicted class
c(u) = argmax_k q_k(u) the k images of largest s(u) = max_k q_k(u) are kept; distill on the training images and the
selected ones; finetune on the training images alone, same loss, fresh optimiser, rate x 0.01; fix (optional): the
classifier alone at a larger resolution under the test preprocessing. The student ships.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from pydantic import Field, model_validator
from torch import Tensor, nn

from kd_classification import runs
from kd_classification.data import Batch, Data, Images, load_data
from kd_classification.engine.batch_norm import batch_norms, batch_statistics
from kd_classification.engine.classifier import ClassifierDistiller
from kd_classification.engine.param_groups import stage_param_groups
from kd_classification.engine.pool import Pool, PoolConfig, load_pool, union, unlabelled
from kd_classification.engine.selection import (
    SelectionRule,
    choose,
    find_duplicates,
    read_selection,
    score_images,
    write_selection,
)
from kd_classification.models import ModelConfig, adapted, create_model, load_into, save_model
from kd_classification.runs import ClassificationRun, load_teacher, supervised_setup, teacher_stage
from kdcore.config import Config, MethodConfig, TrainConfig
from kdcore.distiller import LossTerms, Player
from kdcore.errors import InputError
from kdcore.losses import forward_kl, jensen_shannon, symmetric_kl
from kdcore.method import Method
from kdcore.stages import Artefacts, Procedure, RunContext, Stage
from kdcore.training import TrainSetup, TrainStage

LossName = Literal["symmetric", "forward", "soft_ce", "js"]

# ---------------------------------------------------------------- configuration


class ShortStage(Config):
    """A stage after distillation: what it changes of `train`."""

    epochs: int | None = Field(30, ge=1, description="passes over the training images")
    steps: int | None = Field(None, ge=1, description="optimiser steps; takes precedence over epochs")
    batch_size: int | None = Field(None, ge=1, description="samples per step; None is train.batch_size")
    lr_scale: float = Field(0.01, gt=0, description="factor on train.optimizer.lr")

    @model_validator(mode="after")
    def _has_a_budget(self) -> ShortStage:
        if self.epochs is None and self.steps is None:
            raise ValueError("needs a budget: give epochs or steps")
        return self

    def budget(self, train: TrainConfig) -> TrainConfig:
        """`train` with this stage's length, batch size and rate; optimiser, schedule and mechanics are the same."""
        optimizer = train.optimizer.model_copy(update={"lr": train.optimizer.lr * self.lr_scale})
        changed = {"epochs": self.epochs, "steps": self.steps, "optimizer": optimizer}
        return train.model_copy(update={**changed, "batch_size": self.batch_size or train.batch_size})


class FixStage(ShortStage):
    image_size: int = Field(320, ge=4, description="side of the images that classifier and evaluation get, pixels")


class SSLDConfig(MethodConfig):
    loss: LossName = Field("symmetric", description="symmetric is E1; forward KL(q||p), soft_ce and js are ablations")
    teacher_bn: Literal["train", "eval"] = Field("train", description="teacher's batch norm: batch or running values")
    supervised: float = Field(
        0.0, ge=0, le=1, description="weight of cross-entropy, only without a pool; the loss gets the rest"
    )
    pool: PoolConfig | None = Field(None, description="unlabelled images to choose from; None: training images alone")
    selection: SelectionRule = Field(
        "top_k", description="which images of the pool: of each class the most confident, as many at random, or all"
    )
    k: int = Field(4000, ge=1, description="images kept of each predicted class")  # inferred from 4 M; not confirmed
    labeller: ModelConfig | None = Field(None, description="network that scores the pool; None is the teacher")
    finetune: ShortStage | None = Field(ShortStage(), description="training images alone; None leaves it out")
    lr_scales: list[float] = Field([], description="fine-tuning: rate factors of the student's stages, stem first")
    fix: FixStage | None = Field(None, description="classifier alone at a larger resolution; None leaves it out")
    teacher_per_class: int | None = Field(
        None, ge=1, description="training images of each class for a teacher trained on the spot; None: as the student"
    )


Run = ClassificationRun[SSLDConfig]

# ---------------------------------------------------------------- losses


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, name: LossName = "symmetric") -> Tensor:
    """E1 or one of the divergences it is compared with (E3), at temperature 1; (B, C), (B, C) -> scalar batch mean.

    symmetric: E1. forward: KL(q || p). soft_ce: -sum q ln p, the same gradient as forward. js: Jensen-Shannon with
    m = (p + q) / 2. All through log-softmax without an eps; half precision is computed in float32.
    Raises ValueError when shapes differ or for an unknown name.
    """
    if name == "symmetric":
        return symmetric_kl(student_logits, teacher_logits)
    if name == "forward":
        return forward_kl(student_logits, teacher_logits)
    if name == "js":
        return jensen_shannon(student_logits, teacher_logits)
    if name == "soft_ce":
        return soft_cross_entropy(student_logits, teacher_logits)
    raise ValueError(f"name is {name!r}; allowed: 'symmetric', 'forward', 'soft_ce', 'js'")


def soft_cross_entropy(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """-mean_i sum_k q_ik ln p_ik (E3): KL(q || p) plus the teacher's entropy; (B, C), (B, C) -> scalar.

    >>> z, t = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.6931472, 0.0]])
    >>> round(soft_cross_entropy(z, t).item(), 5)
    1.30144
    """
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    q = teacher_logits.softmax(dim=1, dtype=dtype)
    return -(q * student_logits.log_softmax(dim=1, dtype=dtype)).sum(dim=1).mean()


# ---------------------------------------------------------------- the method


class SSLD(ClassifierDistiller):
    """Teacher and student on the same images; labels are not read unless `supervised` > 0.

    `lr_scales`: rate factors of the student's stages (E8). `classifier_only`: the rest of the student is frozen, in
    eval mode (stage fix).
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        *,
        loss: LossName = "symmetric",
        teacher_bn: Literal["train", "eval"] = "train",
        supervised: float = 0.0,
        lr_scales: Sequence[float] = (),
        classifier_only: bool = False,
    ):
        super().__init__(teacher, student)
        self.loss_name: LossName = loss
        self.teacher_bn, self.supervised = teacher_bn, supervised
        self.lr_scales, self.classifier_only = list(lr_scales), classifier_only
        self._uses_batch = teacher_bn == "train" and bool(batch_norms(teacher))
        if classifier_only:
            student.requires_grad_(False)
            student.get_classifier().requires_grad_(True)

    def players(self) -> list[Player]:
        groups = stage_param_groups(self.student, self.lr_scales) if self.lr_scales else None
        return [Player("student", self, param_groups=groups)]

    def train(self, mode: bool = True):
        super().train(mode)
        if self.classifier_only:
            self.student.eval()
        return self

    def mixed(self, batch: Batch) -> Batch:
        if self.supervised > 0 or self.mixup is None:
            return super().mixed(batch)
        blank = torch.zeros(len(batch.images), dtype=torch.int64, device=batch.images.device)
        return super().mixed(batch._replace(labels=blank))._replace(labels=batch.labels)

    @torch.no_grad()
    def teacher_logits(self, batch: Batch) -> Tensor:
        """z_t (B, C). With `teacher_bn: train` each image's logits depend on the batch (E4); one image is refused."""
        if not self._uses_batch:
            return super().teacher_logits(batch)
        if len(batch.images) < 2:
            raise InputError(
                "teacher_bn = 'train': a batch of 1 image has no batch statistics; "
                "give a train.batch_size of at least 2 per process, or teacher_bn = 'eval'"
            )
        assert self.teacher is not None
        with batch_statistics(self.teacher):
            return self.teacher(batch.images)

    def loss(self, batch: Batch, player: str = "student") -> LossTerms:
        logits, terms = self.student(batch.images), LossTerms()
        if self.supervised > 0:
            terms["ce"] = (self.supervised, F.cross_entropy(logits, batch.labels))
        if self.supervised < 1:
            distillation = distillation_loss(logits, self.teacher_logits(batch), self.loss_name)
            terms[self.loss_name] = (1 - self.supervised, distillation)
        return terms


# ---------------------------------------------------------------- stages


def stages(config: Run, context: RunContext) -> list[Stage]:
    """teacher, select (with a pool), distill, finetune, fix (where asked for)."""
    args, data = config.method_args, load_data(config.data, config.seed)
    runs.check(config, data)
    _check_arguments(config, context)
    if args.labeller is not None:
        with torch.random.fork_rng(devices=[]):
            runs.try_forward(_labeller(config, data, context), data, "method_args.labeller")
    teacher_data = data
    if args.teacher_per_class is not None:
        teacher_data = load_data(config.data.model_copy(update={"per_class": args.teacher_per_class}), config.seed)
    plan: list[Stage] = [teacher_stage(config, teacher_data)]
    pool = None
    if args.pool is not None:
        used = (data.train_plain, teacher_data.train_plain)
        pool = load_pool(args.pool, data, seed=config.seed, used=used)
        plan.append(Procedure("select", _selecting(config, data, pool)))
    own = data.train if args.supervised > 0 else unlabelled(data.train.split, data.train)

    def distilled_on(context: RunContext) -> Images:
        if pool is None:
            return own
        chosen = read_selection(context.artefacts["selection"], size=len(pool.images))
        return union(own, pool.images.split.subset(chosen.index))

    trainings = [_Training("distill", config.train, data, distilled_on)]
    if args.finetune is not None:
        budget = args.finetune.budget(config.train)
        trainings.append(_Training("finetune", budget, data, lambda _: own, lr_scales=args.lr_scales))
    if args.fix is not None:
        large = load_data(config.data.model_copy(update={"image_size": args.fix.image_size}), config.seed)
        images = large.train_plain if args.supervised > 0 else unlabelled(large.train.split, large.test)
        budget = args.fix.budget(config.train)
        trainings.append(_Training("fix", budget, large, lambda _: images, classifier_only=True))
    names = [training.name for training in trainings[:-1]] + ["student"]
    for training, artefact, start in zip(trainings, names, [None, *names]):
        plan.append(training.stage(config, artefact, start))
    return plan


@dataclasses.dataclass(frozen=True)
class _Training:
    """One of the training stages: its budget and images, and what of the student it trains."""

    name: str
    budget: TrainConfig
    data: Data
    images: Callable[[RunContext], Images]
    lr_scales: Sequence[float] = ()
    classifier_only: bool = False

    def stage(self, config: Run, artefact: str, start: str | None) -> TrainStage:
        """Trains a fresh student, or the one that the stage with the artefact `start` left."""
        args = config.method_args

        def build(context: RunContext) -> TrainSetup:
            teacher = load_teacher(config, self.data, context.artefacts["teacher"])
            student = create_model(config.student, self.data, field="student")
            if start is not None:
                load_into(student, context.artefacts[start] / "model.safetensors")
            distiller = SSLD(
                teacher,
                student,
                loss=args.loss,
                teacher_bn=args.teacher_bn,
                supervised=args.supervised,
                lr_scales=self.lr_scales,
                classifier_only=self.classifier_only,
            )
            return supervised_setup(distiller, self.data, self.budget, config.seed, images=self.images(context))

        return TrainStage(
            self.name, self.budget, build, lambda network, folder: save_model(network, folder, self.data), artefact
        )


def _check_arguments(config: Run, context: RunContext) -> None:
    args = config.method_args
    if config.teacher.cache is not None:
        raise InputError(
            "teacher.cache: not for ssld; its training images and teacher outputs change from stage to stage"
        )
    if args.supervised > 0 and args.pool is not None:
        raise InputError(
            f"method_args.supervised = {args.supervised}: a pool has no labels; give method_args.pool: null"
        )
    if args.teacher_per_class is not None:
        if config.teacher.train is None:
            raise InputError("method_args.teacher_per_class: only for a teacher that is trained on the spot")
        if config.data.per_class is None or args.teacher_per_class < config.data.per_class:
            raise InputError(
                f"method_args.teacher_per_class = {args.teacher_per_class}: must be at least data.per_class = "
                f"{config.data.per_class}, the student's share of the same images"
            )
    if args.labeller is not None and args.labeller.checkpoint is None and not args.labeller.pretrained:
        raise InputError("method_args.labeller: has no weights; give checkpoint or pretrained: true")
    for field, stage in (("train", config.train), ("finetune", args.finetune), ("fix", args.fix)):
        size = stage.batch_size if stage is not None and stage.batch_size is not None else config.train.batch_size
        if args.teacher_bn == "train" and args.supervised < 1 and size // context.accelerator.num_processes < 2:
            raise InputError(
                f"{field}.batch_size = {size}: teacher_bn = 'train' needs at least 2 images on each of the "
                f"{context.accelerator.num_processes} processes; or give method_args.teacher_bn: eval"
            )


def _selecting(config: Run, data: Data, pool: Pool) -> Callable[[RunContext], Artefacts]:
    """Stage `select`: duplicates out, labeller over the pool (split over the processes), top-k per class; a CSV."""
    args, settings = config.method_args, config.method_args.pool
    assert settings is not None

    def select(context: RunContext) -> Artefacts:
        accelerator = context.accelerator
        share = torch.arange(len(pool.images))[accelerator.process_index :: accelerator.num_processes]
        part, workers = pool.images.subset(share), config.train.num_workers
        held_out = [images for images in (data.test, data.validation) if images is not None]
        found = find_duplicates(part, held_out, settings.duplicates, distance=settings.distance, num_workers=workers)
        fresh = torch.nonzero(~found).flatten()
        scores, classes = score_images(
            _labeller(config, data, context),
            part.subset(fresh),
            batch_size=config.train.batch_size,
            num_workers=workers,
            device=accelerator.device,
        )
        parts = gather_object([(share[fresh], scores, classes)])
        path = context.folder / "selection.csv"
        if context.is_main:
            index, scores, classes = (torch.cat(column) for column in zip(*parts))
            order = index.argsort()
            chosen = choose(index[order], scores[order], classes[order], args.k, rule=args.selection, seed=config.seed)
            if pool.out_of_domain is not None:
                chosen = dataclasses.replace(chosen, out_of_domain=pool.out_of_domain[chosen.index])
            write_selection(path, chosen, pool.names(chosen.index))
            counts = {"pool": len(pool.images), "duplicates": len(pool.images) - len(index)}
            context.log(kind="select", stage="select", **counts, selected=len(chosen.index))
            context.say(f"select: {len(chosen.index)} of {counts['pool']} images ({counts['duplicates']} duplicates)")
        accelerator.wait_for_everyone()
        return {"selection": path}

    return select


def _labeller(config: Run, data: Data, context: RunContext) -> nn.Module:
    model = config.method_args.labeller
    if model is None:
        return load_teacher(config, data, context.artefacts["teacher"])
    return adapted(create_model(model, data, field="method_args.labeller"), data, model, field="method_args.labeller")


# ---------------------------------------------------------------- evaluation


def _evaluation_config(config: Run) -> Run:
    """Stage fix leaves a student for larger images: it is evaluated on them."""
    if config.method_args.fix is None:
        return config
    return config.model_copy(
        update={"data": config.data.model_copy(update={"image_size": config.method_args.fix.image_size})}
    )


def evaluate(config: Run, artefacts: Artefacts) -> dict[str, Any]:
    """The shared metrics; with a pool, `selected` images and, where it is known, the `out_of_domain_share` of them."""
    result = runs.evaluate(_evaluation_config(config), artefacts)
    if "selection" in artefacts:
        chosen = read_selection(artefacts["selection"])
        result["selected"] = len(chosen.index)
        if chosen.out_of_domain is not None:
            result["out_of_domain_share"] = float(chosen.out_of_domain.double().mean())
    return result


def predict(config: Run, artefacts: Artefacts, count: int) -> list[dict[str, Any]]:
    return runs.predict(_evaluation_config(config), artefacts, count)


METHOD = Method("ssld", __doc__ or "", Run, stages, evaluate, predict)

"""Mitigating Negative Flips via Margin Preserving Training (arXiv 2511.08322, 2025).

A classifier in production (`old`, K_o classes) is replaced by one of K > K_o classes. Retraining loses test images
that the old model had right: negative flips. The replacement is trained with its new-class logits raised by b, so that
without b, at inference, the new classes keep their distance from the old ones; two frozen references, the old model
and an independently trained K-class model (`teacher`), give back the accuracy on new classes that this costs.

    z~_k = z_k + b 1[k >= K_o]                                                          (E1)
    L_D  = mean_i -log softmax(z~_i)_{y_i}                                              (E2)
    w_i(r) = alpha + beta 1[argmax r_i = y_i]                                           (E3)
    KL:  FD(z, r) = mean_i w_i(r) KL( softmax(r_i / tau) || softmax(z_i / tau) )        (E4)  no tau^2
    LM:  FD(z, r) = mean_i w_i(r) 1/2 mean_k (z_ik - r_ik)^2                            (E5)
    L = L_D + c FD(z_{:, <K_o}, r_old) + c FD(z, r_teacher)      c = 1 (KL, E6) or eta (LM, E7)

Both distillation terms see z without b. Old classes are ids 0..K_o-1. Old and teacher are frozen, in eval mode; the
student starts from scratch. The student ships alone, and predicts argmax z without b (E8).

The same terms give the methods it is compared with (arms of the small config): PCT is the old branch alone with b = 0,
PCT-naive its `labels` form mean_i w_i CE_i, ELODI 0.6 LM(old) + 0.4 LM(mean of several references) after a warm-up.
b is chosen on held-out images (`data.validation`): the smallest negative flip rate at an acceptable accuracy on new
classes, over arms with b in {0, 1, 2, 4}.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kd_classification import metrics as m
from kd_classification import runs
from kd_classification.data import Batch, Data, Images, class_index, load_data
from kd_classification.engine.classifier import ClassifierDistiller
from kd_classification.models import adapted, create_model, load_model, save_model
from kdcore import flips
from kdcore.config import MethodConfig
from kdcore.distiller import LossTerms, freeze
from kdcore.errors import InputError
from kdcore.losses import focal_distillation, focal_weights
from kdcore.method import Method
from kdcore.stages import Artefacts, RunContext, Stage
from kdcore.training import TrainSetup, TrainStage

Form = Literal["kl", "lm", "labels"]


class MarginPreservingConfig(MethodConfig):
    bias: float = Field(4.0, ge=0, description="b, added to the new-class logits of the cross-entropy in training")
    form: Form = Field("kl", description="distillation: kl (E4), lm (E5), or labels, the cross-entropy of PCT-naive")
    alpha: float = Field(1.0, ge=0, description="focal weight of every sample")
    beta: float = Field(5.0, ge=0, description="focal weight added where the reference is right")
    tau: float = Field(5.0, gt=0, description="temperature of form kl; there is no tau^2 factor")
    eta: float = Field(0.4, ge=0, description="factor on both terms of form lm")
    old_weight: float = Field(1.0, ge=0, description="weight of the old model's term; 0 leaves it out")
    reference_weight: float = Field(1.0, ge=0, description="weight of the reference's term; 0 leaves it out")
    warmup_epochs: int = Field(0, ge=0, description="first epochs, in which nothing is distilled (ELODI)")
    references: int = Field(1, ge=1, description="independently trained references whose logits are averaged (ELODI)")


class MarginPreservingRun(runs.ClassificationRun[MarginPreservingConfig]):
    """`teacher` is the reference: the K-class model that would have replaced the old one."""

    old: runs.TeacherConfig = Field(description="the model in production; it knows the old classes only")
    old_classes: Annotated[int, Field(ge=1)] | list[Annotated[str, Field(coerce_numbers_to_str=True)]] = Field(
        description="how many of the first classes are old, or their names in the order of the old model's outputs"
    )


# ---------------------------------------------------------------- losses


def margin_calibrated(logits: Tensor, num_old: int, bias: float) -> Tensor:
    """z~ (E1): (B, K) logits with `bias` added to the columns from `num_old` on, as a new tensor."""
    new = torch.arange(logits.shape[-1], device=logits.device) >= num_old
    return logits + bias * new.to(logits.dtype)


def margin_calibrated_cross_entropy(logits: Tensor, labels: Tensor, num_old: int, bias: float) -> Tensor:
    """L_D (E2) of logits (B, K), without the bias, and labels (B,): a scalar. bias = 0 is the cross-entropy."""
    return F.cross_entropy(margin_calibrated(logits, num_old, bias), labels)


def focal_term(
    logits: Tensor,
    reference: Tensor,
    labels: Tensor,
    form: Form = "kl",
    *,
    alpha: float = 1.0,
    beta: float = 5.0,
    tau: float = 5.0,
) -> Tensor:
    """FD(z, r) (E4, E5): logits (B, K), a reference's logits (B, K_r) of the first K_r <= K classes, labels (B,).

    kl and lm compare those K_r classes: sliced first, then softmax. labels is mean_i w_i CE(z_i, y_i) over all K
    (PCT-naive: alpha 0, beta 1). Raises ValueError on shapes that do not fit or another form.
    """
    if form not in get_args(Form):
        raise InputError(f"form = {form!r}: allowed are {', '.join(map(repr, get_args(Form)))}")
    if form == "labels":
        weights = focal_weights(reference, labels, alpha, beta)
        return (weights * F.cross_entropy(logits, labels, reduction="none")).mean()
    return focal_distillation(
        logits[:, : reference.shape[1]],
        reference,
        labels,
        alpha=alpha,
        beta=beta,
        temperature=tau,
        form="kl" if form == "kl" else "logits",
    )


# ---------------------------------------------------------------- the method


class MarginPreserving(ClassifierDistiller):
    """`old` gives (B, num_old) logits, `reference` and `student` (B, K) with the old classes first."""

    def __init__(
        self,
        old: nn.Module,
        reference: nn.Module,
        student: nn.Module,
        *,
        num_old: int,
        bias: float = 4.0,
        form: Form = "kl",
        alpha: float = 1.0,
        beta: float = 5.0,
        tau: float = 5.0,
        eta: float = 0.4,
        old_weight: float = 1.0,
        reference_weight: float = 1.0,
        warmup_epochs: int = 0,
    ):
        super().__init__(reference, student)
        self.old = freeze(old)
        self.num_old, self.bias, self.warmup_epochs = num_old, bias, warmup_epochs
        self.form: Form = form
        self.focal = {"alpha": alpha, "beta": beta, "tau": tau}
        scale = eta if form == "lm" else 1.0
        self.old_weight, self.reference_weight = scale * old_weight, scale * reference_weight

    @torch.no_grad()
    def old_logits(self, batch: Batch) -> Tensor:
        """The old model's logits (B, num_old), without gradient. InputError when it has other outputs."""
        logits = self.old(batch.images)
        if logits.shape[1] != self.num_old:
            raise InputError(f"num_old = {self.num_old}: the old model gives {logits.shape[1]} logits")
        return logits

    def loss(self, batch: Batch, player: str = "student") -> LossTerms:
        z, y = self.student(batch.images), batch.labels
        terms = LossTerms(ce=(1.0, margin_calibrated_cross_entropy(z, y, self.num_old, self.bias)))
        if self.progress.epoch < self.warmup_epochs:
            return terms
        if self.old_weight > 0:
            terms["old"] = (self.old_weight, focal_term(z, self.old_logits(batch), y, self.form, **self.focal))
        if self.reference_weight > 0:
            reference = self.teacher_logits(batch)
            terms["reference"] = (self.reference_weight, focal_term(z, reference, y, self.form, **self.focal))
        return terms


class MeanLogits(nn.Module):
    """The mean of several classifiers' logits."""

    def __init__(self, members: Sequence[nn.Module]):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([member(images) for member in self.members]).mean(0)


# ---------------------------------------------------------------- old and new classes


def split_classes(data: Data, old_classes: int | Sequence[str]) -> tuple[Data, Data]:
    """(all classes, ids changed so that the old ones come first; the images of the old classes alone)."""
    names = data.class_names
    if isinstance(old_classes, int):
        old = list(range(min(old_classes, len(names))))
    else:
        old = [class_index(name, names, "old_classes") for name in old_classes]
    if len(set(old)) != len(old):
        raise InputError(f"old_classes = {old_classes}: a class is named twice")
    if not 0 < len(old) < len(names):
        raise InputError(f"old_classes = {old_classes}: allowed are 1 to {len(names) - 1} of the {len(names)} classes")
    order = [*old, *(k for k in range(len(names)) if k not in set(old))]
    ids = torch.argsort(torch.tensor(order))  # the source's id -> its id here
    full = _each(data, lambda images: images.relabelled(ids[images.labels]), [names[k] for k in order])
    known = _each(full, lambda images: images.subset(_of_old(images, len(old))), full.class_names[: len(old)])
    for part, images in (("training", known.train), ("test", known.test)):
        if len(images) == 0:
            raise InputError(f"old_classes = {old_classes}: the {part} part has no image of these classes")
    return full, known


def _of_old(images: Images, num_old: int) -> Tensor:
    return torch.nonzero(images.labels < num_old).squeeze(1)


def _each(data: Data, change: Callable[[Images], Images], class_names: list[str]) -> Data:
    validation = None if data.validation is None else change(data.validation)
    return replace(
        data, train=change(data.train), test=change(data.test), validation=validation, class_names=class_names
    )


def prepared(config: MarginPreservingRun) -> tuple[Data, Data]:
    """`split_classes` of the run's data."""
    return split_classes(load_data(config.data, config.seed), config.old_classes)


# ---------------------------------------------------------------- stages


def stages(config: MarginPreservingRun, context: RunContext) -> list[Stage]:
    """The old model, the reference (or several), then the student."""
    data, known = prepared(config)
    check(config, data, known)
    order = None if isinstance(config.old_classes, int) else {"class_order": data.class_names}
    return [
        runs.teacher_stage(config, known, name="old", model=config.old, fingerprint={"kept": known.class_names}),
        *(runs.teacher_stage(config, data, name=name, fingerprint=order) for name in reference_names(config)),
        student_stage(config, data, known),
    ]


def reference_names(config: MarginPreservingRun) -> list[str]:
    """teacher, teacher2, teacher3 ...: a stage each, which differ in their random start."""
    return ["teacher", *(f"teacher{k}" for k in range(2, config.method_args.references + 1))]


def student_stage(config: MarginPreservingRun, data: Data, known: Data) -> TrainStage:
    def setup(context: RunContext) -> TrainSetup:
        old = load_old(config, known, context.artefacts["old"])
        references = [runs.load_teacher(config, data, context.artefacts[name]) for name in reference_names(config)]
        teacher = references[0] if len(references) == 1 else MeanLogits(references)
        student = create_model(config.student, data, field="student")
        arguments = config.method_args.model_dump(exclude={"references"})
        distiller = MarginPreserving(old, teacher, student, num_old=known.num_classes, **arguments)
        runs.attach_cache(distiller, config, teacher, data)
        return runs.supervised_setup(distiller, data, config.train, config.seed)

    return TrainStage("student", config.train, setup, lambda network, folder: save_model(network, folder, data))


def load_old(config: MarginPreservingRun, known: Data, folder: Path) -> nn.Module:
    """The saved old model, behind the data's normalisation and size."""
    model = load_model(folder, num_classes=known.num_classes, channels=known.channels, field="old")
    return adapted(model, known, config.old, field="old")


def check(config: MarginPreservingRun, data: Data, known: Data) -> None:
    """What is wrong with the config is said before anything trains."""
    augment = config.data.augment
    if augment.mixup or augment.cutmix:
        raise InputError("data.augment: mixup and cutmix must be 0; the focal weight needs one label for an image")
    if config.old.cache is not None:
        raise InputError("old.cache: not supported; teacher.cache is")
    if config.method_args.references > 1 and config.teacher.train is None:
        raise InputError(
            f"method_args.references = {config.method_args.references}: needs teacher.train, to train several"
        )
    runs.check(config, data)
    with torch.random.fork_rng(devices=[]):
        old = create_model(config.old, known, field="old")
        runs.try_forward(adapted(old, known, config.old, field="old"), known, "old")
    for field, model, wanted in (("old", config.old, known), ("teacher", config.teacher, data)):
        check_class_order(model.checkpoint, wanted.class_names, field)


def check_class_order(checkpoint: str | None, class_names: Sequence[str], field: str) -> None:
    """Two models are compared id by id: a saved folder that names its classes must name these, in this order."""
    if checkpoint is None or not Path(checkpoint).is_dir():
        return
    saved: Any = load_model(Path(checkpoint), field=field)
    for k, (found, wanted) in enumerate(zip(saved.pretrained_cfg.get("label_names") or [], class_names, strict=False)):
        if found != wanted:
            raise InputError(
                f"{field}.checkpoint = {checkpoint}: its class {k} is '{found}', the run's is '{wanted}'; "
                "name the old classes in the order of the old model in old_classes"
            )


# ---------------------------------------------------------------- evaluation


def flip_metrics(old_logits: Tensor, logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Flips from an old model (N, K_o) to a new one (N, K), labels (N,), on the images of the old classes (E9, E10).

    Also the new model's accuracy on old and on new classes, and on old-class images the mean of (best old logit -
    best new logit), the margin that b is there to raise. A split without new-class images has no accuracy_new.
    """
    num_old = old_logits.shape[1]
    known = labels < num_old
    versions = old_logits[known].argmax(1), logits[known].argmax(1), labels[known]
    result = {
        "negative_flip_rate": flips.negative_flip_rate(*versions),
        "relative_negative_flip_rate": flips.relative_negative_flip_rate(*versions),
        "positive_flip_rate": flips.positive_flip_rate(*versions),
        "accuracy_old": 1 - flips.error_rate(versions[1], versions[2]),
        "margin": float((logits[known, :num_old].amax(1) - logits[known, num_old:].amax(1)).double().mean()),
    }
    if not known.all():
        result["accuracy_new"] = 1 - flips.error_rate(logits[~known].argmax(1), labels[~known])
    return result


def evaluate(config: MarginPreservingRun, artefacts: Artefacts) -> dict[str, Any]:
    """The shared metrics, `flip_metrics` of the student, and under teacher/ those of shipping the reference instead.

    With `data.validation`, the student's are also given on the held-out images, under validation/, to choose b by.
    """
    data, known = prepared(config)
    result = runs.evaluate(config, artefacts, data=data)
    old = load_old(config, known, artefacts["old"])
    student = load_model(artefacts["student"], num_classes=data.num_classes, field="student")
    teacher = runs.load_teacher(config, data, artefacts["teacher"])

    before, labels = m.predict(old, data.test)
    result.update(flip_metrics(before, *m.predict(student, data.test)))
    result.update(m.prefixed("teacher", flip_metrics(before, *m.predict(teacher, data.test))))
    if data.validation is not None:
        held_out = flip_metrics(m.predict(old, data.validation)[0], *m.predict(student, data.validation))
        result.update(m.prefixed("validation", held_out))
    of_old = labels < known.num_classes
    result["old/accuracy"] = m.classification_metrics(before[of_old], labels[of_old])["accuracy"]
    return result


def predict(config: MarginPreservingRun, artefacts: Artefacts, count: int) -> list[dict[str, Any]]:
    """Test images with the reference's and the student's answers, for the report."""
    return runs.predict(config, artefacts, count, data=prepared(config)[0])


def write_cache(config: MarginPreservingRun, folder: Path) -> dict[str, Any]:
    """`kd cache`: the reference's logits on the training images."""
    return runs.write_cache(config, folder, data=prepared(config)[0])


METHOD = Method("margin_preserving", __doc__ or "", MarginPreservingRun, stages, evaluate, predict, write_cache)

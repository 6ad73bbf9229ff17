"""Improving Knowledge Distillation via Regularizing Feature Norm and Direction (arXiv 2305.17007, 2023).

On top of a logit distillation the student's penultimate feature is pulled to the direction of its class's mean teacher
feature, and to a norm no smaller than the teacher's on that image. With KD, DKD or DIST the sum is called KD++, DKD++,
DIST++.

    c_k = mean of f^t(x) over the training images x of class k,   e_k = c_k / ||c_k||
    ND  = mean_i 1 - <s_i, e_{y_i}> / max(||s_i||, ||t_i||),      s_i = P(f^s_i),  t_i = f^t_i
    L   = g_c CE(z^s, y) + u g_k L_KD(z^s, z^t) + g_n ND,         u = min(1, epoch / warm-up), epochs from 0

While ||s|| < ||t|| the gradient is the constant -e_y / ||t||, which makes s grow along e_y; from there on it is
tangential and only turns s. P is the identity for equal widths, else BatchNorm, Dropout, Linear, trained along and
dropped. Under mixup the centre is mixed like the labels. Teacher frozen, in eval mode; the student ships.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kd_classification import runs
from kd_classification.data import Batch, Data, Images, load_data
from kd_classification.engine.classifier import ClassifierDistiller
from kd_classification.models import feature_width, load_model, penultimate
from kd_classification.runs import ClassificationRun, Networks, Run
from kdcore.checkpoint import load_weights
from kdcore.config import MethodConfig, parse
from kdcore.distiller import LossTerms
from kdcore.errors import InputError
from kdcore.gpu import module_fingerprint
from kdcore.losses import cosine_distance, dist, dkd, soft_target_kl
from kdcore.method import Method
from kdcore.stages import Artefacts, Procedure, RunContext, Stage

Distillation = Literal["kd", "dkd", "dist", "hard", "none"]
Form = Literal["nd", "cosine", "norm", "none"]
Smoothing = Literal["classes", "batch"]


class NDConfig(MethodConfig):
    """The defaults are those of ResNet-56 -> ResNet-20 on CIFAR-100."""

    ce_weight: float = Field(1.0, ge=0, description="g_c, weight of the cross-entropy on the labels")
    distillation: Distillation = Field(
        "kd", description="L_KD: kd (KD++), dkd (DKD++), dist (DIST++), hard (cross-entropy on the teacher's class)"
    )
    distillation_weight: float = Field(1.0, ge=0, description="g_k, weight of L_KD; 1 for dkd, which has its own two")
    temperature: float | None = Field(None, gt=0, description="temperature of L_KD; None is 4, and 1 for dist")
    dkd_alpha: float = Field(2.5, ge=0, description="dkd: weight of the target-class part")
    dkd_beta: float = Field(4.0, ge=0, description="dkd: weight of the other classes' part")
    dist_beta: float = Field(1.0, ge=0, description="dist: weight of the correlation over classes")
    dist_gamma: float = Field(1.0, ge=0, description="dist: weight of the correlation over samples")
    warmup_epochs: float = Field(20.0, ge=0, description="epochs until L_KD has its full weight; the first has none")
    nd_weight: float = Field(2.0, ge=0, description="g_n, weight of the feature term")
    form: Form = Field(
        "nd", description="feature term: nd, or an ablation: cosine (direction only), norm (norm only), none"
    )
    augmented_centers: bool = Field(
        False, description="class means over augmented training images, one pass, as the release does"
    )
    mixed_smoothing: Smoothing = Field(
        "classes", description="mixed labels: smoothing spreads over all class means, or (release) those of the batch"
    )

    @property
    def uses_features(self) -> bool:
        return self.nd_weight > 0 and self.form != "none"

    @property
    def uses_logits(self) -> bool:
        return self.distillation_weight > 0 and self.distillation != "none"

    @model_validator(mode="after")
    def _minimises_something(self) -> NDConfig:
        from_the_start = self.uses_logits and self.warmup_epochs == 0
        if self.ce_weight == 0 and not self.uses_features and not from_the_start:
            raise ValueError("has nothing to minimise in the first epoch: ce_weight is 0, and so are the other terms")
        return self


# ---------------------------------------------------------------- losses


def nd_loss(
    student: Tensor, teacher: Tensor, centers: Tensor, *, reduction: Literal["batchmean", "none"] = "batchmean"
) -> Tensor:
    """ND of arXiv 2305.17007: 1 - <s, e> / max(||s||, ||t||) with e = c / ||c||, in [0, 2]; L_ND is its mean.

    Shapes (B, D) each, `centers` one row an example (`centers_for`) -> scalar, or (B,) with reduction="none". The max
    keeps its gradient through ||s||, at a tie too. Teacher and centres get no gradient. Half precision is computed in
    float32. A row whose larger norm is 0 has loss 1 and no gradient. Raises InputError when shapes differ.

    For a detector's box head: features (R, D) of the same R proposals in both networks, and the class means (with
    background as a class) gathered by the proposals' labels.

    >>> s, t = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[6.0, 8.0], [0.0, 0.5]])
    >>> nd_loss(s, t, torch.tensor([[1.0, 0.0], [1.0, 1.0]]), reduction="none")
    tensor([0.7000, 0.2929])
    """
    student, teacher, centers = _rows(student=student, teacher=teacher.detach(), centers=centers.detach())
    own, other = (torch.linalg.vector_norm(x, dim=1) for x in (student, teacher))
    larger = torch.where(own >= other, own, other)  # torch.maximum would halve the gradient at a tie
    alive = larger > 0
    along = (student * F.normalize(centers, dim=1)).sum(dim=1)
    rows = 1 - torch.where(alive, along / torch.where(alive, larger, 1.0), 0.0)
    return rows.mean() if reduction == "batchmean" else rows


def norm_deficit(student: Tensor, teacher: Tensor) -> Tensor:
    """The norm part of ND alone: mean_i max(0, 1 - ||s_i|| / ||t_i||), that is ND where e is s's own direction.

    Shapes (B, D), (B, D) -> scalar; a teacher row of norm 0 asks for nothing. Raises InputError when shapes differ.
    """
    student, teacher = _rows(student=student, teacher=teacher.detach())
    own, other = (torch.linalg.vector_norm(x, dim=1) for x in (student, teacher))
    alive = other > 0
    return torch.where(alive, F.relu(1 - own / torch.where(alive, other, 1.0)), 0.0).mean()


def centers_for(labels: Tensor, centers: Tensor, *, smoothing: float = 0.0, over: Smoothing = "classes") -> Tensor:
    """Each example's centre: centers[y] for labels (B,), the mixture for probabilities (B, K) -> (B, D).

    Probabilities of mixup or cutmix mix the centres as they mix the labels, label smoothing included. `over="batch"`
    is the release's smoothing: the share `smoothing` / K goes to the centre of every image in the batch instead of to
    every class. It needs the `smoothing` that the probabilities hold. Raises InputError on labels that do not fit.

    >>> centers_for(torch.tensor([1, 0]), torch.eye(2))
    tensor([[0., 1.],
            [1., 0.]])
    >>> centers_for(torch.tensor([[0.25, 0.75]]), torch.tensor([[4.0], [8.0]]))
    tensor([[7.]])
    """
    classes = len(centers)
    if labels.ndim == 1 and not labels.is_floating_point():
        return centers[labels]
    if labels.ndim != 2 or labels.shape[1] != classes:
        raise InputError(
            f"labels: given {labels.dtype} {tuple(labels.shape)}; allowed: integers (B,), or probabilities "
            f"(B, {classes}) over the classes of `centers`"
        )
    labels = labels.to(centers.dtype)
    if over == "batch" and smoothing > 0:
        # Without the smoothing a row is lam 1[y] + (1 - lam) 1[y'], and y' runs over the batch as y does:
        # the rows add up to the class counts of the batch.
        hard = labels - smoothing / classes
        labels = hard + smoothing / classes * hard.sum(dim=0) / (1 - smoothing)
    with torch.autocast(labels.device.type, enabled=False):
        return labels @ centers


def _rows(**tensors: Tensor) -> list[Tensor]:
    """The tensors, of one (B, D), in one precision of at least float32."""
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    if len(set(shapes.values())) != 1 or len(shapes["student"]) != 2 or 0 in shapes["student"]:
        raise InputError(f"features: given {shapes}; allowed: one shape (B, D) for all")
    dtype = torch.promote_types(tensors["student"].dtype, torch.float32)
    return [x.to(dtype) for x in tensors.values()]


# ---------------------------------------------------------------- class means


def class_means(
    batches: Iterable[tuple[Tensor, Tensor]],
    class_names: Sequence[str],
    *,
    reduce: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """c_k, (K, D) float64 on the CPU, of batches of teacher features (B, D) and labels (B,); any batch size.

    `reduce` adds a float64 tensor up over the processes that share the images. Raises InputError that names a class
    without images, or one whose mean is zero and gives no direction.

    >>> batches = [(torch.tensor([[1.0], [2.0]]), torch.tensor([0, 1])), (torch.tensor([[5.0]]), torch.tensor([0]))]
    >>> class_means(batches, ["cat", "dog"]).flatten()
    tensor([3., 2.], dtype=torch.float64)
    """
    classes = len(class_names)
    sums, counts = torch.zeros(classes, 0, dtype=torch.float64), torch.zeros(classes, dtype=torch.float64)
    for features, labels in batches:
        features, labels = features.detach().to("cpu", torch.float64), labels.cpu()
        if not sums.shape[1]:
            sums = features.new_zeros(classes, features.shape[1])
        sums.index_add_(0, labels, features)
        counts += torch.bincount(labels, minlength=classes)
    sums, counts = reduce(sums), reduce(counts)
    for name, count, norm in zip(class_names, counts.tolist(), sums.norm(dim=1).tolist(), strict=True):
        if count == 0:
            raise InputError(f"data: class '{name}' has no training images, so it has no mean feature")
        if norm == 0:
            raise InputError(f"teacher: its mean feature of class '{name}' is zero and gives no direction")
    return sums / counts[:, None]


# ---------------------------------------------------------------- method


class ND(ClassifierDistiller):
    """KD++, DKD++ or DIST++ of a frozen teacher. `centers` (K, D): its class means, from `class_means`.

    `arguments` are the fields of `NDConfig`. `smoothing` is the label smoothing that mixed labels hold, which
    mixed_smoothing="batch" takes out again. In a loop of your own set `progress.epoch`: the warm-up reads it.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        centers: Tensor,
        *,
        smoothing: float = 0.0,
        **arguments: Any,
    ):
        super().__init__(teacher, student)
        self.config, self.smoothing = parse(NDConfig, arguments, source="ND"), smoothing
        width, own = feature_width(teacher), feature_width(student)
        if centers.ndim != 2 or centers.shape[1] != width:
            raise InputError(f"centers: given {tuple(centers.shape)}; allowed: (K, {width}), the teacher's features")
        self.register_buffer("centers", centers.detach().clone(), persistent=False)
        self.projector = None
        if own != width and self.config.uses_features:
            self.projector = nn.Sequential(nn.BatchNorm1d(own), nn.Dropout(0.5), nn.Linear(own, width))
            nn.init.zeros_(self.projector[2].bias)

    @property
    def warmup(self) -> float:
        """u = min(1, epoch / warm-up), exactly 0 in the first epoch; 1 without a warm-up."""
        epochs = self.config.warmup_epochs
        return min(1.0, self.progress.epoch / epochs) if epochs > 0 else 1.0

    def loss(self, batch: Batch, player: str = "student") -> LossTerms:
        features, logits = penultimate(self.student, batch.images)
        terms = LossTerms(ce=(self.config.ce_weight, F.cross_entropy(logits, batch.labels)))
        if not (self.config.uses_features or self.config.uses_logits):
            return terms
        assert self.teacher is not None
        with torch.no_grad():
            teacher_features, teacher_logits = penultimate(self.teacher, batch.images)
        if self.config.uses_logits:
            weight = self.warmup * self.config.distillation_weight
            terms[self.config.distillation] = (weight, self.distillation(logits, teacher_logits, batch.labels))
        if self.config.uses_features:
            projected = features if self.projector is None else self.projector(features)
            term = self.feature_term(projected, teacher_features, batch.labels)
            terms[self.config.form] = (self.config.nd_weight, term)
        return terms

    def distillation(self, logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """L_KD of (B, K) logits, a scalar."""
        c = self.config
        temperature = c.temperature or (1.0 if c.distillation == "dist" else 4.0)
        if c.distillation == "dkd":
            if labels.is_floating_point():
                raise InputError("method_args.distillation = 'dkd': it needs one class per image; not with mixup")
            return dkd(logits, teacher_logits, labels, alpha=c.dkd_alpha, beta=c.dkd_beta, temperature=temperature)
        if c.distillation == "dist":
            return dist(logits, teacher_logits, beta=c.dist_beta, gamma=c.dist_gamma, temperature=temperature)
        if c.distillation == "hard":
            return F.cross_entropy(logits, teacher_logits.argmax(dim=1))
        return soft_target_kl(logits, teacher_logits, temperature)

    def feature_term(self, features: Tensor, teacher_features: Tensor, labels: Tensor) -> Tensor:
        """ND, or its ablation, of (B, D) features in the teacher's width, a scalar."""
        if self.config.form == "norm":
            return norm_deficit(features, teacher_features)
        centers = centers_for(labels, self.centers, smoothing=self.smoothing, over=self.config.mixed_smoothing)
        if self.config.form == "cosine":
            return cosine_distance(features, centers.to(features.dtype))
        return nd_loss(features, teacher_features, centers)


# ---------------------------------------------------------------- stages and evaluation


def centers_stage(config: Run, data: Data) -> Stage:
    """Gives the artefact `centers`: the class means (K, D) in safetensors, with the teacher's fingerprint."""

    def run(context: RunContext) -> Artefacts:
        teacher = runs.load_teacher(config, data, context.artefacts["teacher"])
        augmented = config.method_args.augmented_centers
        images = data.train if augmented else data.train_plain
        means = teacher_means(teacher, images, data.class_names, context, num_workers=config.train.num_workers)
        path = context.folder / "centers.safetensors"
        if context.is_main:
            metadata = {"teacher": module_fingerprint(teacher), "augmented": str(augmented).lower()}
            save_file({"centers": means.float().contiguous()}, path, metadata=metadata)
        context.accelerator.wait_for_everyone()
        return {"centers": path}

    return Procedure("centers", run)


@torch.no_grad()
def teacher_means(
    teacher: nn.Module, images: Images, class_names: Sequence[str], context: RunContext, *, num_workers: int
) -> Tensor:
    """`class_means` of the teacher's penultimate features; every process takes its share of the images."""
    accelerator = context.accelerator
    device, processes = accelerator.device, accelerator.num_processes
    teacher = teacher.to(device).eval()
    if processes > 1:
        images = images.subset(torch.arange(accelerator.process_index, len(images), processes))
    loader = images.loader(256, seed=context.seed, num_workers=num_workers)
    features = ((penultimate(teacher, batch.images.to(device))[0], batch.labels) for batch in loader)

    def reduce(x: Tensor) -> Tensor:
        return accelerator.reduce(x.to(device), "sum").cpu() if processes > 1 else x

    return class_means(features, class_names, reduce=reduce)


def load_centers(path: Path, teacher: nn.Module) -> Tensor:
    """Saved class means (K, D). Raises InputError on a broken file, or one that another teacher made."""
    centers = load_weights(path).get("centers")
    if centers is None:
        raise InputError(f"weights {path}: it has no tensor 'centers'")
    with safe_open(path, "pt") as file:
        made_by = (file.metadata() or {}).get("teacher")
    if made_by != module_fingerprint(teacher):
        raise InputError(f"weights {path}: these class means belong to another teacher ({made_by}); compute them again")
    return centers


def build(config: Run, networks: Networks, centers: Path) -> ND:
    return ND(
        networks.teacher,
        networks.student,
        load_centers(centers, networks.teacher),
        smoothing=networks.data.config.augment.smoothing,
        **config.method_args.model_dump(),
    )


def stages(config: Run, context: RunContext) -> list[Stage]:
    data = load_data(config.data, config.seed)
    check(config, data)
    return [
        runs.teacher_stage(config, data),
        centers_stage(config, data),
        runs.student_stage(config, data, lambda run, networks: build(run, networks, context.artefacts["centers"])),
    ]


def check(config: Run, data: Data) -> None:
    """What can be wrong with the config, before anything trains."""
    runs.check(config, data)
    if config.teacher.cache is not None:
        raise InputError("teacher.cache: it holds logits only, and this method also needs the teacher's features")
    augment = config.data.augment
    if config.method_args.distillation == "dkd" and (augment.mixup or augment.cutmix):
        raise InputError("method_args.distillation = 'dkd': not with data.augment.mixup or cutmix, which mix labels")
    missing = set(range(data.num_classes)) - set(data.train.labels.tolist())
    if missing:
        raise InputError(f"data: class '{data.class_names[min(missing)]}' has no training images, so no mean feature")


@torch.no_grad()
def feature_statistics(model: nn.Module, images: Images, centers: Tensor) -> dict[str, float]:
    """feature_norm: mean ||f||. feature_cosine: mean cos(f, c_y), where the widths are equal."""
    model = model.eval()
    device = next(model.parameters()).device
    features = torch.cat([penultimate(model, batch.images.to(device))[0].cpu() for batch in images.loader(512)])
    result = {"feature_norm": float(features.norm(dim=1).mean())}
    if features.shape[1] == centers.shape[1]:
        result["feature_cosine"] = float(F.cosine_similarity(features, centers[images.labels], dim=1).mean())
    return result


def evaluate(config: Run, artefacts: Artefacts) -> dict[str, Any]:
    """The shared metrics, and norm and direction of the features on the test images."""
    data = load_data(config.data, config.seed)
    teacher = runs.load_teacher(config, data, artefacts["teacher"])
    centers = load_centers(artefacts["centers"], teacher)
    student = load_model(artefacts["student"], num_classes=data.num_classes, field="student")
    of_teacher = feature_statistics(teacher, data.test, centers)
    return {
        **runs.evaluate(config, artefacts, data=data),
        **feature_statistics(student, data.test, centers),
        **{f"teacher_{name}": value for name, value in of_teacher.items()},
    }


METHOD = Method("nd_loss", __doc__ or "", ClassificationRun[NDConfig], stages, evaluate, runs.predict)

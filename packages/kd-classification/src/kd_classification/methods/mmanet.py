"""MMANet: Margin-aware Distillation and Modality-aware Regularization for Incomplete Multimodal Learning
(arXiv 2304.08028, 2023).

One network for every subset of M modalities. It is trained with modalities dropped at random, each sample by a mask of
its own drawn from the 2^M - 1 combinations, and helped by two terms. MAD: its relations between the samples of a batch
follow those of a frozen teacher that always has all modalities, and samples near the teacher's decision boundary count
more. MAR: after a while the weak combination is found, and an auxiliary trunk on the fused features gets an extra loss
on it. F: flattened last feature maps (B, D); p', F': the teacher's; rows of G are normalised to R:

    L_MAD = sum_i w_i sum_j (R_ij - R'_ij)^2,   G = F F^T,   w_i = H(p'_i) / sum_l H(p'_l)
    L_MAR = 1/B sum_i 1[m_i in W] CE(z_aux_i, y_i)                                    the sum over matches, over B
    L     = CE(z, y)                                  up to epoch e0
          = CE(z, y) + a L_MAD + b L_MAR              from then on

Mining, after the epochs 2 .. e0 - 1: for every combination c without one modality the frequencies of the predicted
labels on held-out images, hist_c, and D_c += KL( softmax(hist_c) || softmax(hist_full) ). At e0 the weak set W is
argmax_c D_c with all its subsets. Teacher frozen, in eval mode; the auxiliary trunk is dropped; the network ships.
The release for classification weights columns instead of rows (`relation: column`), mines on the test images, and its
L_MAR broadcasts samples against matches: the loss of all samples, times the number of matches (`regularise: product`).
That for segmentation divides by the matches (`regularise: matches`).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kd_classification import metrics as m
from kd_classification import modalities
from kd_classification.engine import multimodal as mm
from kd_classification.engine.multimodal import MultiBatch, MultiData, MultiImages, MultiModalNet, combinations
from kdcore.config import MethodConfig
from kdcore.distiller import Distiller, LossTerms, freeze
from kdcore.errors import InputError
from kdcore.method import Method
from kdcore.stages import Artefacts, RunContext, Stage
from kdcore.training import TrainSetup, TrainStage

Relation = Literal["row", "column", "uniform"]
Regularise = Literal["batch", "matches", "product"]


class MMANetConfig(MethodConfig):
    mad_weight: float = Field(30.0, ge=0, description="a, weight of the margin-aware distillation")
    mar_weight: float = Field(0.5, ge=0, description="b, weight of the modality-aware regularisation")
    relation: Relation = Field(
        "row", description="whom the uncertainties weight: rows, (release) columns, or uniform: similarity-preserving"
    )
    regularise: Regularise = Field(
        "batch",
        description="what the loss of weak samples is divided by: the batch, (segmentation release) their number; "
        "product (classification release): the mean loss of all samples, times the number of weak ones",
    )
    warmup_epochs: int = Field(5, ge=0, description="e0, the last epoch with the labels alone, counted from 0")
    mining_start: int = Field(2, ge=0, description="first epoch after which the weak combination is looked for")
    fusion: Literal["concat", "add"] = Field("concat", description="how encoded modalities are put together")


MMANetRun = modalities.MultiModalRun[MMANetConfig]


# ---------------------------------------------------------------- losses


def relations(features: Tensor) -> Tensor:
    """R (B, B): the rows of F F^T divided by their norms; features (B, ...) flattened, half precision in float32."""
    f = features.flatten(1)
    f = f.to(torch.promote_types(f.dtype, torch.float32))
    with torch.autocast(f.device.type, enabled=False):
        return F.normalize(f @ f.T, dim=1, eps=1e-12)


def uncertainty_weights(teacher_logits: Tensor) -> Tensor:
    """w_i = H(p'_i) / sum_l H(p'_l), (B,) of the teacher's logits (B, K); uniform where it is certain of all.

    >>> [round(w, 6) for w in uncertainty_weights(torch.tensor([[4.0, 0], [0, 0], [1, 0]])).tolist()]
    [0.065982, 0.507635, 0.426383]
    """
    log_p = teacher_logits.detach().log_softmax(dim=1)
    entropy = -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(dim=1)
    total = entropy.sum()
    return torch.where(total > 0, entropy / torch.where(total > 0, total, 1.0), 1 / len(entropy))


def margin_aware(
    student: Tensor, teacher: Tensor, weights: Tensor | None = None, *, relation: Relation = "row"
) -> Tensor:
    """L_MAD of features (B, ...) of student and teacher, weights (B,) adding up to 1; relation "uniform", or no
    weights, is the similarity-preserving ablation, w = 1/B. R is not symmetric: rows and columns differ.

    Invariant to a rotation and to one scale of either side. Raises InputError when the batches differ.
    """
    if len(student) != len(teacher):
        raise InputError(f"student and teacher: {len(student)} and {len(teacher)} samples; allowed: the same batch")
    gap = (relations(student) - relations(teacher).detach()).square()
    if weights is None or relation == "uniform":
        return gap.sum(dim=1).mean()
    weights = weights.to(gap.dtype)
    return (gap * (weights[:, None] if relation == "row" else weights[None, :])).sum()


def masked_cross_entropy(logits: Tensor, labels: Tensor, counted: Tensor, regularise: Regularise = "batch") -> Tensor:
    """L_MAR: 1/B sum over the samples of bool (B,) `counted`; `matches` divides by their number, 0 where there is none;
    `product` is 1/B sum over all samples, times that number."""
    rows = F.cross_entropy(logits, labels, reduction="none")
    weak = counted.to(rows.dtype)
    if regularise == "product":
        return rows.mean() * weak.sum()
    return (rows * weak).sum() / (len(rows) if regularise == "batch" else weak.sum().clamp_min(1))


def histogram_distance(histogram: Tensor, full: Tensor) -> Tensor:
    """KL( softmax(hist_c) || softmax(hist_full) ) of label frequencies (K,), (K,).

    >>> round(histogram_distance(torch.tensor([0.8, 0.2]), torch.tensor([0.5, 0.5])).item(), 6)
    0.043053
    """
    log_p, log_q = histogram.log_softmax(dim=0), full.log_softmax(dim=0)
    return (log_p.exp() * (log_p - log_q)).sum()


def weak_combinations(distances: Tensor, tested: Tensor) -> Tensor:
    """W as bool (2^M - 1,) over `combinations`: the tested (T, M) one of the largest distance (T,), and its subsets."""
    weakest = tested[int(distances.argmax())]
    return ~(combinations(tested.shape[1]) & ~weakest).any(dim=1)


# ---------------------------------------------------------------- the distiller


class MMANet(Distiller):
    """Arguments as in `MMANetConfig`. `held_out`: images that the weak combination is mined on, needed for
    mar_weight > 0. In a loop of your own set `progress.epoch` and call `epoch_end`."""

    def __init__(
        self,
        teacher: MultiModalNet | None,
        student: MultiModalNet,
        *,
        held_out: MultiImages | None = None,
        mad_weight: float = 30.0,
        mar_weight: float = 0.5,
        relation: Relation = "row",
        regularise: Regularise = "batch",
        warmup_epochs: int = 5,
        mining_start: int = 2,
    ):
        super().__init__()
        if mad_weight > 0 and teacher is None:
            raise InputError(f"mad_weight = {mad_weight}: needs a teacher")
        if mar_weight > 0 and held_out is None:
            raise InputError(f"mar_weight = {mar_weight}: needs held_out images to find the weak combination on")
        self.student, self.held_out = student, held_out
        self.teacher = None if teacher is None else freeze(teacher)
        self.mad_weight, self.mar_weight = mad_weight, mar_weight
        self.relation, self.regularise = relation, regularise
        self.warmup_epochs, self.mining_start = warmup_epochs, mining_start
        self.auxiliary = student.new_trunk() if mar_weight > 0 else None
        count = len(student.modalities)
        every = combinations(count)
        self.tested = every[every.sum(dim=1) == count - 1]  # what lacks one modality
        self.register_buffer("distances", torch.zeros(len(self.tested)))
        self.register_buffer("weak", torch.zeros(len(every), dtype=torch.bool))

    @property
    def helping(self) -> bool:
        """Whether MAD and MAR count in this epoch."""
        return self.progress.epoch > self.warmup_epochs

    def loss(self, batch: MultiBatch, player: str = "student") -> LossTerms:
        masks = mm.draw_masks(len(batch.labels), len(self.student.modalities), batch.labels.device)
        return self.masked_loss(batch, masks)

    def masked_loss(self, batch: MultiBatch, masks: Tensor) -> LossTerms:
        """The terms for given masks (B, M)."""
        own = self.student.outputs(batch.images, masks)
        terms = LossTerms(ce=(1.0, F.cross_entropy(own.logits, batch.labels)))
        if self.mad_weight > 0 and self.helping:
            assert self.teacher is not None
            with torch.no_grad():
                other = self.teacher.outputs(batch.images)
            weights = uncertainty_weights(other.logits)
            terms["mad"] = (self.mad_weight, margin_aware(own.maps, other.maps, weights, relation=self.relation))
        if self.auxiliary is not None:
            # before e0 with weight 0, so that every parameter takes part from the first step on
            logits, counted = self.auxiliary(own.fused)[1], self.weak[mm.codes_of(masks)]
            term = masked_cross_entropy(logits, batch.labels, counted, self.regularise)
            terms["mar"] = (self.mar_weight if self.helping else 0.0, term)
        return terms

    def epoch_end(self) -> None:
        epoch = self.progress.epoch
        if self.auxiliary is None or self.held_out is None or epoch > self.warmup_epochs:
            return
        if self.mining_start <= epoch < self.warmup_epochs or self.mining_start >= self.warmup_epochs == epoch:
            self.distances += self.mined().to(self.distances.device)
        if epoch == self.warmup_epochs:
            self.weak.copy_(weak_combinations(self.distances, self.tested))

    def mined(self) -> Tensor:
        """D_c of every tested combination (T,) for the weights as they are."""
        assert self.held_out is not None
        full = torch.ones(len(self.student.modalities), dtype=torch.bool)
        histograms = [self.histogram(mask) for mask in (*self.tested, full)]
        return torch.stack([histogram_distance(histogram, histograms[-1]) for histogram in histograms[:-1]]).float()

    def histogram(self, mask: Tensor) -> Tensor:
        """Frequencies (K,) of the predicted labels on the held-out images."""
        answers = mm.predict_masked(self.student, self.held_out, mask).argmax(dim=1)  # type: ignore[arg-type]
        return torch.bincount(answers, minlength=self.student.num_classes).double() / len(answers)


# ---------------------------------------------------------------- stages


def stages(config: MMANetRun, context: RunContext) -> list[Stage]:
    data = mm.load_modalities(config.data, config.modalities, config.seed)
    check(config, data)

    def build(context: RunContext) -> TrainSetup:
        args = config.method_args.model_dump(exclude={"fusion"})
        teacher = mm.load_multimodal(context.artefacts["teacher"], field="teacher")
        student = modalities.create_network(config, config.student, data, field="student")
        distiller = MMANet(teacher, student, held_out=data.validation, **args)
        return modalities.setup_of(config, distiller, data, config.train)

    student = TrainStage("student", config.train, build, modalities.save_to(data))
    return [modalities.teacher_stage(config, data), student]


def check(config: MMANetRun, data: MultiData) -> None:
    """What can be wrong with the config, before anything trains."""
    args, epochs = config.method_args, config.train.epochs
    if args.mar_weight > 0 and data.validation is None:
        raise InputError("data.validation: must be above 0, the weak combination is mined on held-out images")
    if (args.mad_weight or args.mar_weight) and epochs is not None and epochs <= args.warmup_epochs + 1:
        raise InputError(f"method_args.warmup_epochs = {args.warmup_epochs}: leaves nothing of train.epochs = {epochs}")
    modalities.check(config, data)


# ---------------------------------------------------------------- evaluation


def evaluate(config: MMANetRun, artefacts: Artefacts) -> dict[str, Any]:
    """Accuracy of every combination and their mean (student/accuracy), with all modalities the shared metrics; the gap
    between the relations of student and teacher; which combination mining would find, and how good it is."""
    data = mm.load_modalities(config.data, config.modalities, config.seed)
    student, teacher = (mm.load_multimodal(artefacts[name], field=name) for name in ("student", "teacher"))
    masks, labels = combinations(len(student.modalities)), data.test.labels
    logits = [mm.predict_masked(student, data.test, mask) for mask in masks]
    found = [m.classification_metrics(z, labels) for z in logits]
    result: dict[str, Any] = {
        f"student/{name}": sum(one[name] for one in found) / len(found) for name in ("accuracy", "balanced_accuracy")
    }
    for mask, one in zip(masks, found, strict=True):
        result[f"accuracy/{mm.mask_name(mask)}"] = one["accuracy"]
    result.update(m.prefixed("full", found[-1]))
    full = mm.predict_masked(teacher, data.test, masks[-1])
    result.update(m.prefixed("teacher", m.classification_metrics(full, labels)))
    result["relation_gap"] = relation_gap(student, teacher, data.test, masks)
    result["student/parameters"] = sum(parameter.numel() for parameter in student.parameters())
    if data.validation is not None:
        miner = MMANet(None, student, held_out=data.validation, mad_weight=0.0)
        weakest = miner.tested[int(miner.mined().argmax())]
        ranked = sorted(result[f"accuracy/{mm.mask_name(mask)}"] for mask in miner.tested)
        result["weakest_rank"] = float(ranked.index(result[f"accuracy/{mm.mask_name(weakest)}"]))
    return {
        **result,
        "confusion_matrix": m.confusion_matrix(logits[-1], labels),
        "class_names": data.data.class_names,
    }


@torch.no_grad()
def relation_gap(student: MultiModalNet, teacher: MultiModalNet, images: MultiImages, masks: Tensor) -> float:
    """mean_i sum_j (R_ij - R'_ij)^2 in batches of 64 test images, averaged over batches and masks."""
    gaps = []
    for batch in images.loader(64):
        other = teacher.eval().outputs(batch.images).maps
        gaps += [margin_aware(student.eval().outputs(batch.images, mask).maps, other) for mask in masks]
    return float(torch.stack(gaps).mean())


METHOD = Method("mmanet", __doc__ or "", MMANetRun, stages, evaluate, modalities.predict)

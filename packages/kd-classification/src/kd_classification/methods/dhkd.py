"""Dual-Head Knowledge Distillation (arXiv 2411.08937, 2024).

Softmax forgets the absolute level of the logits. A loss on the logits themselves keeps it, but on the classifier that
also learns the labels the two gradients contradict each other, while the backbone profits from both. So each loss gets
its own head on the shared backbone, and the auxiliary head is dropped after training. With s the auxiliary logits,
t the teacher's, z the main logits, T the temperature, B samples and C classes:

    L     = gamma CE(z, y) + alpha L_n(s, t)                                                                        (1)
    L_n   = T^2/B sum_ik KL( 1/2 || sigmoid((s_ik - t_ik)/T) ) = T^2/B sum_ik log cosh( (s_ik - t_ik) / 2T )        (2)
    L_p   = T^2/B sum_ik KL( sigmoid(t_ik/T) || sigmoid(s_ik/T) )                                                   (3)
    v_2  <- v_2 - min(0, <v_1, v_2>) / ||v_1||^2 v_1                                                                (4)

(2) is BinaryKL-Norm, the paper's loss: a robust regression of the logits, quadratic near 0, with slope T / 2B far away.
(3) is plain BinaryKL. KL is between Bernoulli distributions and summed over classes, so alpha's meaning grows with C.
(4) is gradient alignment: v_1 and v_2 are the gradients of the two weighted terms over all parameters; v_2 loses what
opposes v_1, then v_1 + v_2 is the update. The numbers of the equations are this file's.

Teacher frozen, in eval mode. Backbone, main head and auxiliary head train together; backbone and main head ship: the
auxiliary head lives outside the student, which stays a stock timm model.

In a loop of your own, `DHKD(...).loss(batch).total()` is (1). Equation (4) needs the terms' gradients one by one:

    parameters = [p for p in distiller.parameters() if p.requires_grad]
    rule = distiller.gradient_rule("student")                    # None when alignment is off
    gradients = per_term_gradients(distiller.loss(batch), parameters)                          # of kdcore.gradients
    for parameter, gradient in zip(parameters, rule(gradients)):
        parameter.grad = gradient
    optimizer.step()

`distill_epochs` reads `distiller.progress.epoch` (from 0), which such a loop sets itself.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from kd_classification.data import Batch
from kd_classification.engine.classifier import ClassifierDistiller
from kd_classification.models import feature_width, penultimate
from kd_classification.runs import Networks, Run, classification_method
from kdcore.config import MethodConfig
from kdcore.distiller import GradientRule, LossTerms
from kdcore.errors import InputError
from kdcore.gradients import project_conflict

Head = Literal["nonlinear", "linear", "none"]
LossForm = Literal["norm", "plain"]


class DHKDConfig(MethodConfig):
    """The defaults are the CIFAR-100 setting; ImageNet has alpha 0.1, a linear head, no alignment and 49 epochs."""

    alpha: float = Field(1.0, ge=0, description="weight of the logit loss, which is a sum over classes")
    gamma: float = Field(1.0, ge=0, description="weight of the cross-entropy on the labels")
    temperature: float = Field(2.0, gt=0, description="temperature T of the logit loss")
    loss_form: LossForm = Field("norm", description="logit loss: BinaryKL-Norm (eq. 2) or plain BinaryKL (eq. 3)")
    auxiliary_head: Head = Field("nonlinear", description="who learns the teacher's logits; none: the main head, too")
    hidden_width: int = Field(200, ge=1, description="width of the nonlinear auxiliary head")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout of the nonlinear auxiliary head")
    gradient_alignment: bool = Field(True, description="project the logit loss's gradient (eq. 4)")
    distill_epochs: int | None = Field(None, ge=0, description="epochs with the logit loss, then labels alone")

    @model_validator(mode="after")
    def _main_head_learns(self) -> DHKDConfig:
        if self.gamma == 0 and (self.auxiliary_head != "none" or self.alpha == 0):
            raise ValueError("gamma = 0 leaves the main head untrained: give gamma > 0, or auxiliary_head: none")
        return self


# ---------------------------------------------------------------- losses


def binary_kl_norm(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0) -> Tensor:
    """BinaryKL-Norm, eq. (2): T^2 times the sum over classes of log cosh((s - t) / 2T), mean over the batch.

    Its gradient in s is T/2B tanh((s - t) / 2T). The closed form has no sigmoid to saturate: it is finite, with full
    slope, for any distance. Zero only at s = t, so unlike softmax KL it sees a constant added to all logits.

    Shapes (B, C), (B, C) -> scalar, in float32 or better. InputError on other shapes or T <= 0.

    >>> round(binary_kl_norm(torch.tensor([[1.0, -1.0, 2.0]]), torch.tensor([[0.0, 1.0, 2.0]]), 2.0).item(), 6)
    0.604177
    """
    s, t = _checked(student_logits, teacher_logits, temperature)
    a = ((s - t) / (2 * temperature)).abs()
    log_cosh = a + torch.log1p(torch.exp(-2 * a)) - math.log(2)
    return temperature**2 * log_cosh.sum() / len(s)


def binary_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0) -> Tensor:
    """Plain BinaryKL, eq. (3): T^2 times the sum over classes of KL(sigmoid(t/T) || sigmoid(s/T)), mean over the batch.

    Its gradient in s is T/B (sigmoid(s/T) - sigmoid(t/T)). Depends on the level of the logits, not on s - t alone.

    Shapes (B, C), (B, C) -> scalar, in float32 or better. InputError on other shapes or T <= 0.

    >>> round(binary_kl(torch.tensor([[1.0, -1.0, 2.0]]), torch.tensor([[0.0, 1.0, 2.0]]), 2.0).item(), 6)
    0.613557
    """
    s, t = _checked(student_logits, teacher_logits, temperature)
    q = torch.sigmoid(t / temperature)
    cross_entropy = F.binary_cross_entropy_with_logits(s / temperature, q, reduction="sum")
    entropy = F.binary_cross_entropy_with_logits(t / temperature, q, reduction="sum")
    return temperature**2 * (cross_entropy - entropy) / len(s)


def aligned_sum(gradients: dict[str, list[Tensor]]) -> list[Tensor]:
    """Eq. (4) and the sum: the gradients of `ce`, plus those of `logit` without their component against `ce`.

    Both are of the weighted terms and flattened over all parameters, the main head's included. Where the two oppose
    each other, the projection also amplifies the cross-entropy's gradient, by 1 - <v_1, v_2> / ||v_1||^2: in the main
    head that is all it does. The auxiliary head's gradient is untouched, since v_1 is 0 there.
    """
    ce = gradients["ce"]
    return [a + b for a, b in zip(ce, project_conflict(ce, gradients["logit"]), strict=True)]


def _checked(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    shapes = f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape or student_logits.numel() == 0:
        raise InputError(f"student_logits and teacher_logits: shapes {shapes}; allowed: one shape (B, C), not empty")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise InputError(f"temperature = {temperature}: must be a finite number above 0")
    dtype = torch.promote_types(student_logits.dtype, torch.float32)  # half precision is computed in float32
    return student_logits.to(dtype), teacher_logits.to(dtype)


# ---------------------------------------------------------------- the method


def make_auxiliary_head(kind: Head, width: int, classes: int, *, hidden: int = 200, dropout: float = 0.1) -> nn.Module:
    """Pooled features (B, width) -> logits (B, classes); the order of the nonlinear head's layers is the release's."""
    if kind == "linear":
        return nn.Linear(width, classes)
    if kind == "nonlinear":
        return nn.Sequential(
            nn.Linear(width, hidden), nn.Dropout(dropout), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, classes)
        )
    raise InputError(f"auxiliary_head = {kind!r}: allowed for a head of its own: 'nonlinear', 'linear'")


class DHKD(ClassifierDistiller):
    """Arguments as in `DHKDConfig`. The student is a timm model, or has its forward_features and forward_head."""

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        *,
        alpha: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 2.0,
        loss_form: LossForm = "norm",
        auxiliary_head: Head = "nonlinear",
        hidden_width: int = 200,
        dropout: float = 0.1,
        gradient_alignment: bool = True,
        distill_epochs: int | None = None,
    ):
        super().__init__(teacher, student)
        if loss_form not in ("norm", "plain"):
            raise InputError(f"loss_form = {loss_form!r}: allowed: 'norm', 'plain'")
        self.alpha, self.gamma, self.temperature = alpha, gamma, temperature
        self.logit_loss = binary_kl_norm if loss_form == "norm" else binary_kl
        self.gradient_alignment, self.distill_epochs = gradient_alignment, distill_epochs
        self.auxiliary_head: nn.Module | None = None
        if auxiliary_head != "none":
            self.auxiliary_head = make_auxiliary_head(
                auxiliary_head, feature_width(student), int(student.num_classes), hidden=hidden_width, dropout=dropout
            )

    @property
    def distilling(self) -> bool:
        """Whether the logit loss counts in this epoch."""
        return self.alpha > 0 and (self.distill_epochs is None or self.progress.epoch < self.distill_epochs)

    def loss(self, batch: Batch, player: str = "student") -> LossTerms:
        features, logits = penultimate(self.student, batch.images)
        terms = LossTerms(ce=(self.gamma, F.cross_entropy(logits, batch.labels)))
        if self.distilling:
            s = logits if self.auxiliary_head is None else self.auxiliary_head(features)
            terms["logit"] = (self.alpha, self.logit_loss(s, self.teacher_logits(batch), self.temperature))
        return terms

    def gradient_rule(self, player: str) -> GradientRule | None:
        return aligned_sum if self.gradient_alignment and self.distilling else None


def build(config: Run, networks: Networks) -> DHKD:
    return DHKD(networks.teacher, networks.student, **config.method_args.model_dump())


METHOD = classification_method("dhkd", __doc__, DHKDConfig, build)

"""Distillation of an encoder: latent losses of its layers, soft and hard losses of its classes.

    L      = latent L_lat + soft L_soft + hard L_hard
    L_soft = -T^2 mean_b sum_c softmax(z_T / T)_c log softmax(z_S / T)_c
    L_hard = mean_b -log softmax(z_S)_y

with L_lat of `kd_llm.engine.encoder` and logits z (Jiao et al., TinyBERT, arXiv 1909.10351, eqs. 10, 11). With one
output, which is regression, L_soft and L_hard are squared errors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_llm.engine.classification import ClassificationObjective
from kd_llm.engine.encoder import LatentLoss, at_least_float
from kd_llm.engine.objective import Batch, StudentCall
from kd_llm.engine.rows import model_inputs
from kdcore.distiller import LossTerms


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """L_soft row by row: logits (B, C) twice -> (B,). Its least value is T^2 times the entropy of the teacher.

    >>> soft_cross_entropy(torch.zeros(1, 2), torch.tensor([[0.0, 1.0986123]])).item()
    0.6931471824645996
    """
    p = (teacher.detach() / temperature).softmax(1)
    return -(temperature**2) * (p * (student / temperature).log_softmax(1)).sum(1)


class EncoderObjective(ClassificationObjective):
    """See the module. `losses` are those of latent, soft and hard that count.

    teacher: a model with layers to compare; its logits are for `soft` alone. latent: L_lat with its maps, or None where
    it has no weight. Labels are read for `hard` alone. Means are over the examples of the optimiser step; a micro-batch
    counts in L_lat by its examples.
    """

    name = "encoder"

    def __init__(
        self,
        teacher: nn.Module,
        latent: LatentLoss | None,
        *,
        losses: Sequence[str] = ("latent",),
        latent_weight: float = 1.0,
        soft_weight: float = 1.0,
        hard_weight: float = 1.0,
        temperature: float = 1.0,
    ):
        task = "soft" in losses or "hard" in losses
        super().__init__(teacher, temperature=temperature, soft_weight=soft_weight, hard_weight=hard_weight or 1.0)
        self.hard_weight, self.task, self.latent_weight = hard_weight, task, latent_weight
        self.compares = latent is not None
        if latent is not None:
            self.auxiliary["latent"] = latent

    def prepare(self, student: nn.Module) -> None:
        if self.task and self.soft_weight:
            super().prepare(student)
            return
        self.source[0].to(next(student.parameters()).device)

    def count(self, batch: Batch) -> Tensor:
        return torch.as_tensor(len(batch["input_ids"]), device=batch["input_ids"].device)

    def loss(self, call: StudentCall, batch: Batch, items: Tensor | int | None) -> LossTerms:
        teacher: Any = self.source[0]
        terms, share = LossTerms(), self.share(batch, items)
        latent: Any = self.auxiliary["latent"] if self.compares else None
        if latent is None:
            z = call.outputs(batch).logits
            z_t = self.teacher_logits(batch) if self.soft_weight else None
        else:
            of_student, of_teacher = latent.taps(call.model, teacher)
            with of_student, of_teacher:
                z = call.outputs(batch).logits
                with torch.no_grad():
                    z_t = getattr(teacher(**model_inputs(teacher, batch)), "logits", None)
                for name, value in latent(of_student, of_teacher, batch["attention_mask"]).items():
                    terms[name] = (self.latent_weight, value * share)
        if self.task and self.soft_weight:
            assert z_t is not None
            terms["soft"] = (self.soft_weight, self._soft(at_least_float(z), at_least_float(z_t)) * share)
        if self.task and self.hard_weight:
            terms["hard"] = (self.hard_weight, self._hard(at_least_float(z), batch["labels"]) * share)
        return terms

    @torch.no_grad()
    def mean_latent(self, student: nn.Module, batches: Iterable[Batch]) -> float:
        """Mean of L_lat over the examples of batches, for a student in evaluation mode."""
        device = next(student.parameters()).device
        self.to(device)
        self.source[0].to(device)
        total, count = 0.0, 0
        for batch in batches:
            batch = {key: tensor.to(device) for key, tensor in batch.items()}
            terms = self.loss(StudentCall(student, False, student.forward), batch, None)
            total += sum(float(terms[k][1]) for k in terms if k not in ("soft", "hard")) * len(batch["input_ids"])
            count += len(batch["input_ids"])
        return total / count

    def _soft(self, z: Tensor, z_t: Tensor) -> Tensor:
        return F.mse_loss(z, z_t) if z.shape[1] == 1 else soft_cross_entropy(z, z_t, self.temperature).mean()

    def _hard(self, z: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(z.squeeze(1), labels.to(z.dtype)) if z.shape[1] == 1 else F.cross_entropy(z, labels)

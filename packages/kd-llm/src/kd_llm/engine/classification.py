"""Objectives of sequence classifiers: cross-entropy on the classes, and soft targets of a teacher.

    L = mean_b [ soft_weight tau^2 KL(p_b^tau || q_b^tau) + hard_weight (-ln q_b(y_b)) ]

with p, q the teacher's and the student's class probabilities (Hinton et al. 2015, arXiv 1503.02531, section 2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_llm.engine.objective import Batch, Objective, StudentCall
from kd_llm.engine.rows import model_inputs
from kdcore.distiller import LossTerms, freeze
from kdcore.errors import InputError
from kdcore.losses.divergences import forward_kl


class ClassificationObjective(Objective):
    """See the module. Without a teacher it is supervised training. `kd_weight` (B,) weighs examples."""

    name = "classification"

    def __init__(
        self,
        teacher: nn.Module | None = None,
        *,
        temperature: float = 1.0,
        soft_weight: float | None = None,
        hard_weight: float | None = None,
    ):
        super().__init__()
        self.soft_weight = float(teacher is not None) if soft_weight is None else soft_weight
        self.hard_weight = float(teacher is None) if hard_weight is None else hard_weight
        if teacher is None and self.soft_weight:
            raise InputError("soft_weight: there is no teacher; give one, or soft_weight 0")
        if self.soft_weight == 0 and self.hard_weight == 0:
            raise InputError("soft_weight, hard_weight: given 0 and 0, allowed: at least one above 0")
        self.temperature = temperature
        self.source = [] if teacher is None else [freeze(teacher)]  # a list: no submodule, its weights are not saved

    def prepare(self, student: nn.Module) -> None:
        super().prepare(student)
        for teacher in self.source:
            teacher.to(next(student.parameters()).device)
            ours, theirs = (int(model.config.num_labels) for model in (student, teacher))  # type: ignore[union-attr,arg-type]
            if ours != theirs:
                raise InputError(f"teacher: tells {theirs} classes apart, the student {ours}")

    def count(self, batch: Batch) -> Tensor:
        """Examples of the batch."""
        return torch.as_tensor(len(batch["labels"]), device=batch["labels"].device)

    def teacher_logits(self, batch: Batch) -> Tensor:
        """(B, C), without gradient."""
        teacher: Any = self.source[0]
        with torch.no_grad():
            return teacher(**model_inputs(teacher, batch)).logits

    def loss(self, call: StudentCall, batch: Batch, items: Tensor | int | None) -> LossTerms:
        return self.class_terms(call.outputs(batch).logits, batch, items)

    def class_terms(self, logits: Tensor, batch: Batch, items: Tensor | int | None) -> LossTerms:
        """The terms of logits (B, C) that exist; for objectives that add terms of their own."""
        weights = torch.ones(len(logits), device=logits.device) / (len(logits) if items is None else items)
        if "kd_weight" in batch:
            weights = weights * batch["kd_weight"]
        terms = LossTerms()
        if self.soft_weight:
            values = forward_kl(logits.float(), self.teacher_logits(batch).float(), self.temperature, reduction="none")
            terms["soft"] = (self.soft_weight, (weights * values).sum())
        if self.hard_weight:
            values = F.cross_entropy(logits.float(), batch["labels"], reduction="none")
            terms["hard"] = (self.hard_weight, (weights * values).sum())
        return terms

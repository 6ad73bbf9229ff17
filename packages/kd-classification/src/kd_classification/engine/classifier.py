"""ClassifierDistiller: a frozen teacher and a student on the same batch, with mixup and cached teacher logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_classification.data import Batch
from kdcore.distiller import Distiller, LossTerms, freeze


class ClassifierDistiller(Distiller):
    """Base of the methods that teach a classifier by a frozen one.

    `mixup` (timm's Mixup) mixes each training batch before the loss sees it: both networks get the mixed images.
    `teacher_cache` (kdcore.gpu.TeacherCache) replaces the teacher's forward pass, keyed by the batch's index.
    """

    def __init__(self, teacher: nn.Module | None, student: nn.Module):
        super().__init__()
        self.student = student
        self.teacher = None if teacher is None else freeze(teacher)
        self.mixup: Any = None
        self.teacher_cache: Any = None

    def forward(self, batch: Batch, player: str = "student") -> dict[str, tuple[float, Tensor]]:
        return super().forward(self.mixed(batch), player)

    def mixed(self, batch: Batch) -> Batch:
        """The batch after mixup, its labels (B, K) probabilities; unchanged in eval mode or without mixup."""
        if self.mixup is None or not self.training:
            return batch
        images, labels = self.mixup(batch.images.clone(), batch.labels)
        return Batch(images, labels, batch.index)

    @torch.no_grad()
    def teacher_logits(self, batch: Batch) -> Tensor:
        """The teacher's logits (B, K), without gradient; from the cache where there is one."""
        if self.teacher_cache is not None:
            return self.teacher_cache[batch.index].to(batch.images.device)
        assert self.teacher is not None
        return self.teacher(batch.images)


class Supervised(ClassifierDistiller):
    """Cross-entropy on the labels: how `small` configs make their teachers."""

    def __init__(self, student: nn.Module):
        super().__init__(None, student)

    def loss(self, batch: Batch, player: str = "student") -> LossTerms:
        return LossTerms(ce=(1.0, F.cross_entropy(self.student(batch.images), batch.labels)))

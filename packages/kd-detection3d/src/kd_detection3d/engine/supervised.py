"""Supervised: a detector's own losses as a distiller, for teachers that are trained on the spot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from kd_detection3d.engine.batch import DetectionBatch, prepared, task_terms
from kdcore.distiller import Distiller, LossTerms


class Supervised(Distiller):
    """The student's own losses; no teacher."""

    def __init__(self, student: nn.Module, teachers: Mapping[str, Any] | None = None):
        super().__init__()
        self.student = student

    def loss(self, batch: DetectionBatch, player: str = "student") -> LossTerms:
        losses = self.student.loss(*prepared(self.student, batch, training=self.training))
        return LossTerms({name: (1.0, value) for name, value in task_terms(losses).items()})

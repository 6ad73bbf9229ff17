"""Distilling the Knowledge in a Neural Network (arXiv 1503.02531, 2015).

The student matches the teacher's class probabilities, softened by a temperature T, beside the labels:

    L = (1 - alpha) CE(z_s, y) + alpha T^2 KL( softmax(z_t / T) || softmax(z_s / T) )

T^2 keeps the soft gradient's size when T changes (section 2). alpha = 0 is plain supervised training, alpha = 1 uses
no label. Teacher frozen, in eval mode; everything of the student trains; the student ships.
"""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import Field
from torch import nn

from kd_classification.data import Batch
from kd_classification.engine.classifier import ClassifierDistiller
from kd_classification.runs import Networks, Run, classification_method
from kdcore.config import MethodConfig
from kdcore.distiller import LossTerms
from kdcore.losses import soft_target_kl


class KDConfig(MethodConfig):
    alpha: float = Field(0.9, ge=0, le=1, description="weight of the soft targets; the labels get 1 - alpha")
    temperature: float = Field(4.0, gt=0, description="temperature T of the softened probabilities")


class KD(ClassifierDistiller):
    def __init__(self, teacher: nn.Module, student: nn.Module, *, alpha: float = 0.9, temperature: float = 4.0):
        super().__init__(teacher, student)
        self.alpha, self.temperature = alpha, temperature

    def loss(self, batch: Batch, player: str = "student") -> LossTerms:
        logits = self.student(batch.images)
        terms = LossTerms(ce=(1 - self.alpha, F.cross_entropy(logits, batch.labels)))
        if self.alpha > 0:
            terms["kd"] = (self.alpha, soft_target_kl(logits, self.teacher_logits(batch), self.temperature))
        return terms


def build(config: Run, networks: Networks) -> KD:
    return KD(networks.teacher, networks.student, **config.method_args.model_dump())


METHOD = classification_method("kd", __doc__, KDConfig, build)

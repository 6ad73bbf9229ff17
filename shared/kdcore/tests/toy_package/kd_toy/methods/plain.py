"""Plain Training (Journal of Nothing, 1999).

L = CE(z_s, y)
"""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import Field
from torch import nn

from kd_toy.runs import ToyRun, evaluate, stages
from kdcore.config import MethodConfig
from kdcore.distiller import Distiller, LossTerms
from kdcore.method import Method


class PlainConfig(MethodConfig):
    smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing")


class PlainRun(ToyRun):
    method_args: PlainConfig = Field(default_factory=PlainConfig)


class Plain(Distiller):
    def __init__(self, student: nn.Module, smoothing: float = 0.0):
        super().__init__()
        self.student, self.smoothing = student, smoothing

    def loss(self, batch, player: str = "student") -> LossTerms:
        x, y = batch
        return LossTerms(ce=(1.0, F.cross_entropy(self.student(x), y, label_smoothing=self.smoothing)))


METHOD = Method(
    "plain",
    __doc__ or "",
    PlainRun,
    lambda config, context: stages(config, lambda _, student: Plain(student, config.method_args.smoothing)),
    evaluate,
)

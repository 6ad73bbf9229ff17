"""Toy Distillation (arXiv 0000.00000, 2000).

L = (1 - alpha) CE(z_s, y) + alpha KL(softmax(z_t) || softmax(z_s))
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from kd_toy.runs import ToyRun, evaluate, network, points, stages
from kdcore.config import MethodConfig
from kdcore.distiller import Distiller, LossTerms, freeze
from kdcore.losses import soft_target_kl
from kdcore.method import Method


class ToyConfig(MethodConfig):
    alpha: float = Field(0.5, ge=0, le=1, description="weight of the soft targets")
    nan_at: int | None = Field(None, ge=0, description="step at which the soft-target loss is NaN")
    interrupt_at: int | None = Field(None, ge=0, description="step at which the keyboard interrupts")
    crash_at: int | None = Field(None, ge=0, description="step at which something unforeseen happens")


class ToyKDRun(ToyRun):
    method_args: ToyConfig = Field(default_factory=ToyConfig)


class ToyKD(Distiller):
    """A student beside its frozen teacher."""

    def __init__(self, teacher: nn.Module, student: nn.Module, config: ToyConfig | None = None):
        super().__init__()
        self.teacher, self.student, self.config = freeze(teacher), student, config or ToyConfig()

    def loss(self, batch, player: str = "student") -> LossTerms:
        x, y = batch
        step, config = self.progress.step, self.config
        if step == config.interrupt_at:
            raise KeyboardInterrupt
        if step == config.crash_at:
            raise RuntimeError("the cable is\nunplugged")
        logits = self.student(x)
        with torch.no_grad():
            target = self.teacher(x)
        kd = soft_target_kl(logits, target, 1.0)
        if step == config.nan_at:
            kd = kd * float("nan")
        return LossTerms(ce=(1 - config.alpha, F.cross_entropy(logits, y)), kd=(config.alpha, kd))


def cache(config: ToyKDRun, folder: Path) -> dict[str, int]:
    folder.mkdir(parents=True)
    torch.manual_seed(config.seed)
    torch.save(network(config.teacher.width)(points(config)[0]), folder / "logits.pt")
    return {"samples": config.size}


METHOD = Method(
    "toy",
    __doc__ or "",
    ToyKDRun,
    lambda config, context: stages(config, lambda teacher, student: ToyKD(teacher, student, config.method_args)),
    evaluate,
    cache=cache,
)

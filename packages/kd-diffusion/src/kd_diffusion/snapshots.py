"""Snapshots: what the student draws from the same noise at several points of the training."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kd_diffusion import evaluation as ev
from kd_diffusion.data import Data
from kd_diffusion.engine.conditions import Condition
from kd_diffusion.engine.distillation import ScoreDistiller
from kd_diffusion.engine.rollout import Start, rollout
from kd_diffusion.integrations.pipelines import Opened
from kdcore.stages import RunContext

COUNT = 8
SEED = 20_001  # of the noise that every picture of a run starts from


def bucket_names(count: int) -> list[str]:
    """The parts of the table of times, least noise first.

    >>> bucket_names(2)
    ['0-50 %', '50-100 %']
    """
    return [f"{100 * k // count}-{100 * (k + 1) // count} %" for k in range(count)]


class Snapshots:
    """The `evaluate` of a TrainSetup: writes `snapshots/<stage>-<step>.npy`, (8, C, H, W) pixels in [-1, 1], and logs
    the generator's gradient by noise level. Gives no metric: those need many samples."""

    def __init__(
        self, context: RunContext, stage: str, opened: Opened, data: Data, distiller: ScoreDistiller, start: Start
    ):
        self.context, self.stage, self.opened = context, stage, opened
        self.distiller, self.start, self.data = distiller, start, data
        part = data.held_out if len(data.held_out) else data.train
        self.wanted = ev.requests(opened, part, COUNT)

    def __call__(self, deployed: nn.Module) -> dict[str, float]:
        step = self.distiller.progress.step
        levels = self.distiller.meter.take()
        if self.context.is_main:
            pixels = ev.generate(self.opened, self.wanted, self._function(deployed), seed=SEED, batch_size=COUNT)
            folder = self.context.folder / "snapshots"
            folder.mkdir(exist_ok=True)
            np.save(folder / f"{self.stage}-{step:07d}.npy", pixels.numpy(), allow_pickle=False)
        if any(value is not None for value in levels):  # none right after a resume
            name, x = "gradient norm by noise level", bucket_names(len(levels))
            self.context.log(kind="profile", name=name, stage=self.stage, step=step, x=x, values=levels)
        return {}

    def _function(self, deployed: nn.Module) -> ev.Generate:
        denoiser = self.opened.denoiser_for(deployed)

        def function(condition: Condition, draw: Any) -> Tensor:
            shape = (draw.count, *self.opened.space.shape)
            return rollout(
                denoiser,
                self.opened.process,
                self.distiller.indices,
                condition,
                lambda: draw.normal(shape),
                start=self.start,
                renoise=self.distiller.renoise,
            )

        with torch.no_grad():
            return function

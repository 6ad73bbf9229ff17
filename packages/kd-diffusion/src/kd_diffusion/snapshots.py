"""Snapshots: what the student draws from the same noise at several points of the training."""

from __future__ import annotations

import numpy as np
from torch import nn

from kd_diffusion import evaluation as ev
from kd_diffusion.data import Data
from kd_diffusion.engine.distillation import ScoreDistiller
from kd_diffusion.engine.rollout import Start
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
        self.wanted = ev.requests(opened, data.asked, COUNT)

    def __call__(self, deployed: nn.Module) -> dict[str, float]:
        step = self.distiller.progress.step
        levels = self.distiller.meter.take()
        if self.context.is_main:
            pixels = ev.generate(self.opened, self.wanted, self.sampler(deployed), seed=SEED, batch_size=COUNT)
            folder = self.context.folder / "snapshots"
            folder.mkdir(exist_ok=True)
            np.save(folder / f"{self.stage}-{step:07d}.npy", pixels.numpy(), allow_pickle=False)
        if any(value is not None for value in levels):  # none right after a resume
            name, x = "gradient norm by noise level", bucket_names(len(levels))
            self.context.log(kind="profile", name=name, stage=self.stage, step=step, x=x, values=levels)
        return {}

    def sampler(self, deployed: nn.Module) -> ev.Generate:
        """The student as it is now, in its own steps."""
        options = {"start": self.start, "renoise": self.distiller.renoise}
        return ev.stepping(self.opened.denoiser_for(deployed), self.opened, self.distiller.indices, **options)

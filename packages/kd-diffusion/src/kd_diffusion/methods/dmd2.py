"""DMD2: Improved Distribution Matching Distillation for Fast Image Synthesis (arXiv 2405.14867, 2024).

A generator of one or a few steps is pushed by the difference of two denoisers at its own re-noised samples: the frozen
teacher (real score) and a diffusion model that learns online what the generator makes (fake score). Against DMD there
is no regression on noise-image pairs; instead the fake score gets R updates for one of the generator (two time-scale
update rule), and a discriminator on its bottleneck compares with real images.

    x = G(x_tau, tau, c);   x_t = a_t x + s_t e
    g = (mu_f(x_t) - mu_r(x_t)) / mean |x - mu_r(x_t)|                 mu_r guided by kappa
    L_G = 0.5 mean (x - sg[x - g])^2 + lambda_G mean softplus(-D(x_t'))                       (eq. 2 and 4)
    L_f = mean lambda_t (prediction - target)^2 + lambda_D (mean softplus(D(x_t')) + mean softplus(-D(y_t')))

Several steps: the input of the trained step is what the generator itself makes of noise in the steps before it
(backward simulation, section 4.5), noised to that step's level; which step is drawn, once for the whole batch.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field

from kd_diffusion.engine.adversarial import GANConfig
from kd_diffusion.engine.distillation import Networks, Sample, ScoreArgs, ScoreDistiller
from kd_diffusion.engine.process import add_noise
from kd_diffusion.runs import Run, score_method


class DMD2Config(ScoreArgs):
    guidance_scale: float = Field(1.0, description="kappa of the teacher; 1.75 for SD 1.5, 8 for SDXL")
    fake_updates: int = Field(5, ge=1, description="R; 5 on ImageNet and SDXL, 10 for SD 1.5")
    gan: GANConfig | None = Field(
        default_factory=lambda: GANConfig.model_validate({"weight_generator": 3e-3, "weight_discriminator": 1e-2}),
        description="3e-3 and 1e-2 on ImageNet, 1e-3 on SD 1.5, 5e-3 on SDXL; null: distribution matching alone",
    )
    input: Literal["simulated", "noised_data"] = Field(
        "simulated", description="input of the steps after the first: the generator's own samples, or real ones"
    )


class DMD2(ScoreDistiller):
    """The engine's defaults are this paper: normalised gradient, R fake updates on the samples of the same iteration,
    a discriminator with noise of its own. Batches are dicts with `x` or `pixels`, and labels or token ids."""

    args: DMD2Config

    def sample(self, batch: dict[str, Any], player: str, *, grad: bool) -> Sample:
        if self.args.input == "simulated" or len(self.indices) == 1:
            return super().sample(batch, player, grad=grad)
        draw, condition, real = self.sample_draw(player), self.condition(batch), self.real(batch)
        step = draw.one_integer(len(self.indices))
        t = self.process.at(torch.full((len(real),), self.indices[step], device=self.device))
        noise = draw.normal(real.shape)
        with torch.set_grad_enabled(grad):
            x_t = add_noise(self.process, real, noise, t) if step else self.first_input(noise, t)
            return Sample(self.generator(x_t, t, condition), condition, step)


def build(config: Run, networks: Networks) -> DMD2:
    return DMD2(networks, config.method_args, seed=config.seed, ema=config.train.ema)


METHOD = score_method("dmd2", __doc__ or "", DMD2Config, build)

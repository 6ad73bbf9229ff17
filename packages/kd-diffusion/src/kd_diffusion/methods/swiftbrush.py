"""SwiftBrush: One-Step Text-to-Image Diffusion Model with Variational Score Distillation (arXiv 2312.05239, 2023).

A text-to-image teacher becomes a one-step generator from prompts alone, without any image. It is variational score
distillation with a network in the place of a 3-D scene: the generator's sample is noised again, and the difference of
two noise predictions is its gradient. One is the frozen teacher's; the other one's is that of the same weights with
LoRA adapters, trained meanwhile to denoise what the generator makes.

    x = (z - s_T e_G(z, T, y)) / a_T,  z ~ N(0, I);   x_t = a_t x + s_t e
    e^k = e(x_t, t, 0) + kappa (e(x_t, t, y) - e(x_t, t, 0))               for teacher and adapted teacher alike
    L_G = 0.5 mean (x - sg[x - g])^2,   g = s_t^2 (e_T^k - e_L^k) = a_t s_t (mu_L - mu_T)                     (eq. 7)
    L_L = mean a_t^2 (e_L(x_t', t', y') - e')^2,   x' = sg[x]                                                 (eq. 8)

y' is the prompt, or for the whole batch at once, with probability 0.1, the empty one. The adapted teacher starts as
the teacher, so that the first gradient is zero; L_G is no measure of progress. The step from T uses the scheduler's own
last level (abar = 0.00466 for SD 2.1, where the published code has 0.0047), so that the saved pipeline samples as the
training did.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from kd_diffusion.data import Data
from kd_diffusion.engine.conditions import Condition
from kd_diffusion.engine.distillation import Networks, Sample, ScoreArgs, ScoreDistiller
from kd_diffusion.engine.draws import Turn
from kd_diffusion.engine.lora import LoRAConfig, shared_views
from kd_diffusion.engine.process import add_noise, to_epsilon
from kd_diffusion.engine.score import noise_weight, weighted_error
from kd_diffusion.engine.timesteps import sample_times
from kd_diffusion.integrations.pipelines import Opened
from kd_diffusion.runs import Run, make_networks, score_method
from kdcore.config import EMAConfig
from kdcore.distiller import LossTerms, Player, freeze
from kdcore.stages import Artefacts


class SwiftBrushConfig(ScoreArgs):
    guidance_scale: float = Field(4.5, description="kappa of the teacher")
    fake_guidance_scale: float | None = Field(  # type: ignore[assignment]
        None, description="kappa of the fake score in the generator's loss; None: the teacher's, as in the paper's code"
    )
    fake_updates: int = Field(1, ge=1, description="updates of the fake score for one of the generator")
    fake: Literal["lora", "copy", "noise"] = Field(
        "lora",
        description="the fake score: adapters on the teacher, a full copy, or none: the true noise (SDS)",
    )
    lora: LoRAConfig = Field(
        default_factory=lambda: LoRAConfig.model_validate({"rank": 64, "alpha": 108, "targets": ["to_q", "to_v"]}),
        description="adapters of fake: lora",
    )
    drop_prompt: float = Field(0.1, ge=0, le=1, description="probability of a batch of empty prompts for the fake")


class SwiftBrush(ScoreDistiller):
    """Generator and fake score by turns, the fake on the same samples. Batches need `input_ids` or `class_labels`
    alone."""

    args: SwiftBrushConfig

    def __init__(self, networks: Networks, args: SwiftBrushConfig, *, seed: int = 0, ema: EMAConfig | None = None):
        if args.fake == "noise":
            freeze(networks.teacher)
            networks.fake = networks.teacher
        super().__init__(networks, args, seed=seed, ema=ema)

    def players(self) -> list[Player]:
        return [player for player in super().players() if player.name == "generator" or self.args.fake != "noise"]

    # ------------------------------------------------------------ the generator

    def weight(self, x: Tensor, mu_real: Tensor, t: Tensor) -> Tensor:
        return noise_weight(self.process, t, x)

    def guidance(self, count: int) -> tuple[float | Tensor, float | Tensor]:
        """kappa of the teacher and of the fake score, each a number or (count,)."""
        fake = self.args.fake_guidance_scale
        return self.args.guidance_scale, self.args.guidance_scale if fake is None else fake

    @torch.no_grad()
    def direction(self, x: Tensor, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        kappa_real, kappa_fake = self.guidance(len(x))
        mu_real = self.real_score.guided(x_t, t, condition, self.turned_from(len(x), kappa_real), kappa_real)
        if self.args.fake == "noise":
            mu_fake = x  # where e_L is the noise itself
        else:
            null = self.turned_from(len(x), kappa_fake, fake=True)
            mu_fake = self.fake.guided(x_t, t, condition, null, kappa_fake)
        return self.weight(x, mu_real, t) * (mu_fake - mu_real)

    def turned_from(self, count: int, kappa: float | Tensor, *, fake: bool = False) -> Condition:
        """What the guidance of the teacher, or of the fake score, leads away from: the empty prompt."""
        return self.null(count, kappa)

    # ------------------------------------------------------------ the fake score

    def fake_terms(self, sample: Sample, batch: dict[str, Any], draw: Turn) -> LossTerms:
        x, condition = sample.x, sample.condition
        t = sample_times(self.args.fake_times, self.process, draw, len(x))
        e = draw.normal(x.shape)
        if draw.one_uniform() < self.args.drop_prompt:
            condition = self.conditioner.null(len(x), self.device)
        return LossTerms(denoising=(1.0, self.denoising_loss(x, e, t, condition)))

    def denoising_loss(self, x: Tensor, e: Tensor, t: Tensor, condition: Condition) -> Tensor:
        x_t = add_noise(self.process, x, e, t)
        e_fake = to_epsilon(self.process, self.fake(x_t, t, condition), x_t, t)
        return weighted_error(e_fake, e, self.process.levels(t)[0].square())


def networks_of(config: Run, opened: Opened, artefacts: Artefacts, data: Data) -> Networks:
    """Teacher, fake and generator; the adapted teacher shares the teacher's weights."""
    networks = make_networks(config, opened, artefacts, data)
    if config.method_args.fake == "lora":
        networks.teacher, networks.fake = shared_views(
            opened.denoiser, config.method_args.lora, field="method_args.lora"
        )
    return networks


def build(config: Run, networks: Networks) -> SwiftBrush:
    return SwiftBrush(networks, config.method_args, seed=config.seed, ema=config.train.ema)


METHOD = score_method("swiftbrush", __doc__ or "", SwiftBrushConfig, build, networks=networks_of)

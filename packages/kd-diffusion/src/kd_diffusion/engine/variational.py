"""Variational score distillation: the fake score is adapters on the teacher's own weights, and no image is needed.

g = a_t s_t (mu_L - mu_T) = s_t^2 (e_T - e_L), both guided with the same kappa          arXiv 2312.05239, eq. 7
L_L = mean a_t^2 (e_L - e)^2, at times with the empty prompt for the whole batch                          eq. 8
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kd_diffusion.engine.conditions import Condition
from kd_diffusion.engine.distillation import Networks, ScoreArgs, ScoreDistiller
from kd_diffusion.engine.draws import Turn
from kd_diffusion.engine.lora import LoRAConfig
from kd_diffusion.engine.process import add_noise, to_epsilon
from kd_diffusion.engine.score import noise_weight, weighted_error
from kdcore.config import EMAConfig
from kdcore.distiller import Player, freeze


class VariationalArgs(ScoreArgs):
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

    @model_validator(mode="after")
    def _trains_its_discriminator(self) -> VariationalArgs:
        if self.fake == "noise" and self.gan is not None and self.gan.optimizer is None:
            raise ValueError("has fake: noise, which does not train, and a gan without an optimizer of its own")
        return self


class VariationalDistiller(ScoreDistiller):
    """Generator and fake score by turns, the fake on the same samples. Batches need `input_ids` or `class_labels`
    alone."""

    args: VariationalArgs

    def __init__(self, networks: Networks, args: VariationalArgs, *, seed: int = 0, ema: EMAConfig | None = None):
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

    def denoising_condition(self, condition: Condition, draw: Turn) -> Condition:
        """The empty prompt for the whole batch at times."""
        count = len(next(iter(condition.values()), ()))
        return self.conditioner.null(count, self.device) if draw.one_uniform() < self.args.drop_prompt else condition

    def denoising_loss(self, x: Tensor, e: Tensor, t: Tensor, condition: Condition) -> Tensor:
        x_t = add_noise(self.process, x, e, t)
        e_fake = to_epsilon(self.process, self.fake(x_t, t, condition), x_t, t)
        return weighted_error(e_fake, e, self.process.levels(t)[0].square())

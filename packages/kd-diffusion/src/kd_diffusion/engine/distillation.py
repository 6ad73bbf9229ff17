"""ScoreDistiller: generator, teacher, fake score and discriminator, and the turns they take.

A method of this family overrides what its paper changes: `direction` (the gradient g at x), `generator_terms`,
`fake_terms`, or the order of the turns. Everything here is in diffusion space: pixels in [-1, 1] or scaled latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kd_diffusion.engine import timesteps
from kd_diffusion.engine.adversarial import Discriminator, GANConfig
from kd_diffusion.engine.conditions import Condition
from kd_diffusion.engine.denoiser import Denoiser
from kd_diffusion.engine.draws import Draws, Turn
from kd_diffusion.engine.meter import NoiseLevelMeter
from kd_diffusion.engine.process import EDM, add_noise, target
from kd_diffusion.engine.recompute import enable_checkpointing
from kd_diffusion.engine.rollout import Renoise, Start, rollout, start_noise
from kd_diffusion.engine.score import dmd_weight, edm_weight, inject, weighted_error
from kd_diffusion.engine.timesteps import TimesConfig, sample_times
from kdcore.config import EMAConfig, MethodConfig, OptimizerConfig
from kdcore.distiller import Distiller, LossTerms, Player, freeze
from kdcore.errors import InputError
from kdcore.losses import non_saturating_discriminator, non_saturating_generator


class ScoreArgs(MethodConfig):
    """Arguments that the score-distillation methods share; a method's own config narrows the defaults."""

    steps: int = Field(1, ge=1, description="steps of the generator")
    start_index: int | None = Field(None, ge=0, description="table index of the first step; None: the last one")
    guidance_scale: float = Field(1.0, description="kappa of the teacher; 1 is no guidance")
    fake_guidance_scale: float = Field(1.0, description="kappa of the fake score in the generator's loss")
    fake_updates: int = Field(5, ge=1, description="R: updates of the fake score for one of the generator")
    fake_optimizer: OptimizerConfig | None = Field(None, description="of fake score and discriminator; None: as train")
    gan: GANConfig | None = Field(None, description="adversarial terms against real samples; None: none")
    times: TimesConfig = Field(
        default_factory=lambda: TimesConfig.model_validate({}), description="times of the generator's loss"
    )
    fake_times: TimesConfig = Field(
        default_factory=lambda: TimesConfig.model_validate({"low": 0, "high": 999}),
        description="times of the fake score's loss",
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")


@dataclass
class Networks:
    """What a ScoreDistiller is built from. `conditioner` and `space` as `integrations.pipelines.Opened` has them."""

    teacher: Denoiser
    fake: Denoiser
    generator: Denoiser
    conditioner: Any
    space: Any


@dataclass
class Sample:
    """Samples of the generator: x (B, ...) with a graph or without, what they were asked for, and the step taken."""

    x: Tensor
    condition: Condition
    step: int

    def detached(self) -> Sample:
        return Sample(self.x.detach(), self.condition, self.step)


class ScoreDistiller(Distiller):
    """Two players: `generator` on every R-th iteration, then `fake` (with the discriminator) on every iteration.

    With `reuse_samples` the fake learns from the samples of the generator's own turn where there was one.
    """

    order: tuple[Literal["generator", "fake"], ...] = ("generator", "fake")
    reuse_samples = True
    start: Start = "unit"
    renoise: Renoise = "noise"
    floor_levels = False

    def __init__(self, networks: Networks, args: ScoreArgs, *, seed: int = 0, ema: EMAConfig | None = None):
        super().__init__()
        self.args, self.ema = args, ema
        self.process = networks.teacher.process
        shared = networks.fake.network is networks.teacher.network
        # Registered once: a teacher that shares the fake's weights is a view without parameters of its own.
        self._teacher = (networks.teacher,)
        if not shared:
            self.teacher = freeze(networks.teacher)
        self.fake, self.generator = networks.fake, networks.generator
        self.student = networks.generator.network
        self.conditioner, self.space = networks.conditioner, networks.space
        if isinstance(self.conditioner, nn.Module):
            freeze(self.conditioner)
        if isinstance(self.space, nn.Module):
            freeze(self.space)
        self.discriminator = self._make_discriminator()
        self.indices = self.levels()
        self.draws = Draws(seed)
        self.meter = NoiseLevelMeter()
        self._kept: dict[str, list[Sample]] = {}
        self._kept_at = -1
        if args.gradient_checkpointing:
            trunk = self.discriminator.trunk if self.discriminator is not None else None
            for denoiser in (self.fake, self.generator, networks.teacher, trunk):
                if denoiser is not None:
                    enable_checkpointing(denoiser.network)

    def levels(self) -> list[float]:
        """Table indices of the generator's steps."""
        return timesteps.levels(self.process, self.args.steps, self.args.start_index, floor=self.floor_levels)

    def _make_discriminator(self) -> Discriminator | None:
        if self.args.gan is None:
            return None
        return Discriminator(
            self.args.gan.host,
            self.fake,
            self.real_score,
            shape=self.space.shape,
            condition=self.conditioner.blank(1),
        )

    @property
    def real_score(self) -> Denoiser:
        """The teacher, mu_r."""
        return self._teacher[0]

    # ------------------------------------------------------------ turns

    def players(self) -> list[Player]:
        args, discriminator = self.args, self.discriminator
        learners = nn.ModuleList([self.fake])
        if discriminator is not None and not self.discriminator_plays:
            learners.append(discriminator)
        players = {
            "generator": Player("generator", self.student, every=args.fake_updates, ema=self.ema),
            "fake": Player("fake", learners, optimizer=args.fake_optimizer),
        }
        found = [players[name] for name in self.order]
        if self.discriminator_plays:
            assert discriminator is not None
            assert args.gan is not None
            found.append(Player("discriminator", discriminator, optimizer=args.gan.optimizer))
        return found

    @property
    def discriminator_plays(self) -> bool:
        """Whether the discriminator has an optimiser of its own instead of the fake score's."""
        return self.args.gan is not None and self.args.gan.optimizer is not None

    def loss(self, batch: dict[str, Any], player: str = "generator") -> LossTerms:
        batch = self.turn_batch(batch, player)
        draw = self.draws.turn(player, self.progress.step, self.device)
        if player == "generator":
            self.fake.eval()  # it may have dropout; its own turn trains it
            sample = self.sample(batch, player, grad=True)
            if self.reuse_samples:
                self._keep(sample, "fake")
            return self.generator_terms(sample, batch, draw)
        if player == "discriminator":
            return LossTerms(discriminator=(1.0, self.discriminator_loss(self._taken(batch, player), batch, draw)))
        self.fake.train(self.training)
        sample = self._taken(batch, player)
        if self.discriminator_plays:
            self._keep(sample, "discriminator")
        return self.fake_terms(sample, batch, draw)

    def turn_batch(self, batch: dict[str, Any], player: str) -> dict[str, Any]:
        """The part of the loader's batch that a turn uses."""
        return batch

    @property
    def device(self) -> torch.device:
        return next(self.student.parameters()).device

    def sample(self, batch: dict[str, Any], player: str, *, grad: bool) -> Sample:
        """The generator's samples for the batch's conditions; which of its steps is drawn, one for all."""
        draw = self.sample_draw(player)
        condition = self.sample_condition(batch, player)
        stop = self.stop_step(draw)
        shape = (batch_size(batch), *self.space.shape)
        x = rollout(
            self.generator,
            self.process,
            self.indices,
            condition,
            lambda: draw.normal(shape),
            stop=stop,
            grad=grad,
            start=self.start,
            renoise=self.renoise,
        )
        return Sample(x, condition, stop)

    def stop_step(self, draw: Turn) -> int:
        """The step whose output the losses see, 0-based."""
        return draw.one_integer(len(self.indices)) if len(self.indices) > 1 else 0

    def sample_condition(self, batch: dict[str, Any], player: str) -> Condition:
        """What the samples of a player's turn are asked for."""
        return self.condition(batch)

    def sample_draw(self, player: str) -> Turn:
        """The random numbers that a player's samples are made of."""
        return self.draws.turn(f"sample {player}", self.progress.step, self.device)

    def first_input(self, noise: Tensor, t: Tensor) -> Tensor:
        """What the generator's first step sees."""
        return start_noise(self.process, noise, t, self.start)

    def _keep(self, sample: Sample, player: str) -> None:
        """Sets samples aside for a player that acts later in the same iteration."""
        if self._kept_at != self.progress.step:
            self._kept, self._kept_at = {}, self.progress.step
        self._kept.setdefault(player, []).append(sample.detached())

    def _taken(self, batch: dict[str, Any], player: str) -> Sample:
        """The samples that were set aside for the player's micro-batch, or fresh ones."""
        kept = self._kept.get(player) if self._kept_at == self.progress.step else None
        return kept.pop(0) if kept else self.sample(batch, player, grad=False)

    @torch.no_grad()
    def condition(self, batch: dict[str, Any]) -> Condition:
        return self.conditioner.embed(batch)

    def null(self, count: int, kappa: float | Tensor) -> Condition:
        """What stands for no condition, `count` times; {} where the scale kappa = 1 does not ask for it."""
        return {} if not isinstance(kappa, Tensor) and kappa == 1 else self.conditioner.null(count, self.device)

    @torch.no_grad()
    def real(self, batch: dict[str, Any]) -> Tensor:
        """The batch's real samples in diffusion space. Raises InputError where the data has none."""
        if "x" in batch:
            return batch["x"]
        if "pixels" in batch:
            return self.space.encode(batch["pixels"], self.draws.turn("encode", self.progress.step, self.device).normal)
        raise InputError("method_args.gan: needs real samples, and the data has prompts alone; give gan: null")

    # ------------------------------------------------------------ the generator

    def generator_terms(self, sample: Sample, batch: dict[str, Any], draw: Turn) -> LossTerms:
        """Distribution matching, and the adversarial term where there is a discriminator."""
        x, condition = sample.x, sample.condition
        t = sample_times(self.args.times, self.process, draw, len(x))
        x_t = add_noise(self.process, x.detach(), draw.normal(x.shape), t)
        g = self.direction(x.detach(), x_t, t, condition)
        self.meter.add(self.process, t, g)
        terms = LossTerms(matching=(1.0, inject(x, g)))
        if self.args.gan is not None:
            logits = self.noised_logits(x, condition, draw)
            terms["adversarial"] = (self.args.gan.weight_generator, non_saturating_generator(logits))
        return terms

    @torch.no_grad()
    def direction(self, x: Tensor, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """g = W (mu_f - mu_r) at x_t, (B, ...); no graph."""
        mu_real, mu_fake = self.real_prediction(x_t, t, condition), self.fake_prediction(x_t, t, condition)
        return self.weight(x, mu_real, t) * (mu_fake - mu_real)

    def weight(self, x: Tensor, mu_real: Tensor, t: Tensor) -> Tensor:
        """W (B, 1, .., 1)."""
        return dmd_weight(x, mu_real)

    def real_prediction(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        kappa = self.args.guidance_scale
        return self.real_score.guided(x_t, t, condition, self.null(len(x_t), kappa), kappa)

    def fake_prediction(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        kappa = self.args.fake_guidance_scale
        return self.fake.guided(x_t, t, condition, self.null(len(x_t), kappa), kappa)

    # ------------------------------------------------------------ the fake score and the discriminator

    def fake_terms(self, sample: Sample, batch: dict[str, Any], draw: Turn) -> LossTerms:
        """Denoising of the generator's samples, and the discriminator's loss."""
        x, gan = sample.x, self.args.gan
        t = sample_times(self.args.fake_times, self.process, draw, len(x))
        e = draw.normal(x.shape)
        condition = self.denoising_condition(sample.condition, draw)
        terms = LossTerms(denoising=(1.0, self.denoising_loss(x, e, t, condition)))
        if gan is not None and not self.discriminator_plays:
            terms["discriminator"] = (gan.weight_discriminator, self.discriminator_loss(sample, batch, draw))
        return terms

    def denoising_condition(self, condition: Condition, draw: Turn) -> Condition:
        """What the fake score is told about the samples that it denoises."""
        return condition

    def denoising_loss(self, x: Tensor, e: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """mean lambda_t (prediction - target)^2: on x with lambda = s^-2 + sigma_data^-2 for EDM, else on the network's
        own output with lambda = 1."""
        x_t = add_noise(self.process, x, e, t)
        if isinstance(self.process, EDM):
            return weighted_error(self.fake(x_t, t, condition), x, edm_weight(t, self.process.sigma_data))
        goal = target(self.process, self.fake.prediction_type, x, e, t)
        return weighted_error(self.fake.output(x_t, t, condition), goal)

    def discriminator_loss(self, sample: Sample, batch: dict[str, Any], draw: Turn) -> Tensor:
        """softplus(D(fake_t)) + softplus(-D(real_t)), each with its own t and noise unless `same_noise`."""
        real, real_condition = self.real(batch), self.condition(batch)
        again = draw.fork() if self.args.gan is not None and self.args.gan.same_noise else draw
        fake_logits = self.noised_logits(sample.x, sample.condition, draw)
        real_logits = self.noised_logits(real, real_condition, again)
        return non_saturating_discriminator(real_logits, fake_logits)

    def noised_logits(self, y: Tensor, condition: Condition, draw: Turn) -> Tensor:
        """D(a y + s e, t, c) at fresh t, uniform over the table, and fresh e."""
        assert self.discriminator is not None
        t = sample_times(self.args.fake_times, self.process, draw, len(y))
        return self.discriminator(add_noise(self.process, y, draw.normal(y.shape), t), t, condition)


def batch_size(batch: dict[str, Any]) -> int:
    """Samples in a batch of the loader."""
    return len(next(iter(batch.values())))

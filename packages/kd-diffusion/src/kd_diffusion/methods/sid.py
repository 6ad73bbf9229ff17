"""Few-Step Diffusion via Score identity Distillation (arXiv 2505.12674, 2025).

A generator is pushed by the model-based Fisher divergence between its re-noised samples and the teacher, written with
score identities. Teacher and fake score are functions of the sample here: the gradient flows through both. One network
takes N steps; a random step's output is matched, so that the uniform mixture of all steps' outputs is, with one fake
score that does not know the step. Every number of steps up to N is then usable.

    x = G(x_tau, tau, c);   x_t = a_t x + s_t e;   d = mu_r(x_t) - mu_f(x_t)
    L_G = sum d ((mu_r - x) - alpha d) / sg[mean |x - mu_r|]                    per sample, graph through x, mu_r, mu_f
    L_f = sum lambda_t (prediction - target)^2                                  x without its graph
    D   = mean over channels of the fake score's mid-block, a logit per location          (arXiv 2410.14919)

Guidance mu(null) + kappa (mu(c) - mu(null)) has a scale for the fake score's training (kappa_1), for the fake score in
L_G (kappa_2 = kappa_3) and for the teacher (kappa_4):

    LSG        all equal, 1.5 to 4.5: long and strong guidance, without data            (arXiv 2406.01561)
    Zero-CFG   kappa_4 = 1, the others 0: teacher conditional, fake score unconditional
    Anti-CFG   kappa_4 = 1, kappa_2 below 0

The first input is s_t z, the noised zero image. A saved student of one step, or on EDM of any number, needs nothing
but `num_inference_steps`; one of several steps on a table needs `timesteps=` the levels of its kd.json and `latents=`
s_t z, for no stock scheduler that draws new noise in each step scales its first latent.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kd_diffusion import evaluation as ev
from kd_diffusion.data import load_data
from kd_diffusion.engine.adversarial import GANConfig, Host
from kd_diffusion.engine.conditions import Condition, where
from kd_diffusion.engine.distillation import Networks, Sample, ScoreArgs, ScoreDistiller
from kd_diffusion.engine.draws import Turn
from kd_diffusion.engine.process import EDM, add_noise, target
from kd_diffusion.engine.score import dmd_weight, edm_weight, min_snr_plus_one, sid_loss, sid_normaliser
from kd_diffusion.engine.timesteps import TimesConfig, levels, sample_times
from kd_diffusion.integrations.pipelines import Opened
from kd_diffusion.runs import Run, Sampling, evaluate, measures, open_student, open_teacher, score_method
from kdcore.config import EMAConfig
from kdcore.distiller import LossTerms, Player
from kdcore.losses import non_saturating_discriminator, non_saturating_generator
from kdcore.stages import Artefacts

DROP_PROMPT = 0.1  # share of the fake score's samples without a condition, under guidance
TABLE = {"low": 20, "high": 979}


class SiDGAN(GANConfig):
    host: Host = Field("channel_mean", description="whose features the discriminator reads")
    weight_generator: float = Field(
        1e-3, ge=0, description="on the generator's term, which counts the elements of a sample; 1e-4 on EDM"
    )
    weight_discriminator: float = Field(1.0, ge=0, description="on the discriminator's loss")
    same_noise: bool = Field(True, description="real and fake samples are noised with one t and one e")
    after: int = Field(0, ge=0, description="training samples before the generator's term joins; 200000 on EDM")


class SiDConfig(ScoreArgs):
    start_index: int | None = Field(625, ge=0, description="t_init: table index of the first step, but for EDM")
    start_sigma: float = Field(2.5, gt=0, description="sigma of the first step on EDM")
    alpha: float = Field(1.0, description="1 for text to image, 1.2 on EDM")
    guidance_scale: float = Field(2.0, description="kappa_4, of the teacher in the generator's loss")
    fake_guidance_scale: float | None = Field(  # type: ignore[assignment]
        None, description="kappa_2 = kappa_3, of the fake score in the generator's loss; None: as guidance_scale"
    )
    training_guidance_scale: float | None = Field(
        None, description="kappa_1, of the fake score in its own loss; None: as fake_guidance_scale, 1 if that is < 0"
    )
    matched: Literal["mixture", "last"] = Field("mixture", description="outputs that are matched: of all steps or one")
    fake_updates: int = Field(1, ge=1, description="updates of the fake score for one of the generator")
    generator_after: int = Field(
        0, ge=0, description="training samples before the generator's first step; 100000 on EDM with gan"
    )
    gan: SiDGAN | None = Field(None, description="adversarial terms against real samples; null: none, data-free")
    times: TimesConfig = Field(
        default_factory=lambda: TimesConfig.model_validate(TABLE), description="times of the generator's loss"
    )
    fake_times: TimesConfig = Field(
        default_factory=lambda: TimesConfig.model_validate(TABLE), description="times of the fake score's loss"
    )

    def kappas(self) -> tuple[float, float, float]:
        """(kappa_1, kappa_2 = kappa_3, kappa_4)."""
        fake = self.guidance_scale if self.fake_guidance_scale is None else self.fake_guidance_scale
        training = self.training_guidance_scale
        return (1.0 if fake < 0 else fake) if training is None else training, fake, self.guidance_scale


class SiD(ScoreDistiller):
    """Fake score, then generator, each on samples of its own: of a batch the even items are the fake score's, the odd
    ones the generator's. Batches need `class_labels` or `input_ids`, and `x` or `pixels` for `gan`.

    `samples_per_step` is what one iteration counts for in `generator_after` and `gan.after`; `fp16` leaves non-finite
    gradients to the loss scaler and clips the generator's by value.
    """

    order = ("fake", "generator")
    reuse_samples = False
    start = "noised"
    floor_levels = True
    args: SiDConfig

    def __init__(
        self,
        networks: Networks,
        args: SiDConfig,
        *,
        seed: int = 0,
        ema: EMAConfig | None = None,
        samples_per_step: int = 1,
        fp16: bool = False,
    ):
        super().__init__(networks, args, seed=seed, ema=ema)
        self.samples_per_step, self.fp16 = samples_per_step, fp16
        self.kappa_training, self.kappa_fake, kappa_real = args.kappas()
        if not self.kappa_training == self.kappa_fake == kappa_real == 1 and not isinstance(
            self.conditioner, nn.Module
        ):
            self.null(1, 0.0)  # says now that a network was trained without a class of none
        if not fp16:
            for parameter in (*self.student.parameters(), *self.fake.parameters()):
                if parameter.requires_grad:
                    parameter.register_hook(finite_gradient)

    def levels(self) -> list[float]:
        if not isinstance(self.process, EDM):
            return super().levels()
        sigma = torch.tensor(self.args.start_sigma, dtype=torch.float64)
        return levels(self.process, self.args.steps, float(self.process.index_of(sigma)))

    # ------------------------------------------------------------ turns

    def players(self) -> list[Player]:
        players = super().players()
        for player in players:
            if player.name == "generator":
                player.start = math.ceil(self.args.generator_after / self.samples_per_step)
                player.clip_value = 1.0 if self.fp16 else None
            elif self.args.gan is not None:
                player.clip_value = 1.0
        return players

    def turn_batch(self, batch: dict[str, Any], player: str) -> dict[str, Any]:
        first = 1 if player == "generator" else 0
        return {name: value[first::2] for name, value in batch.items()}

    def stop_step(self, draw: Turn) -> int:
        return super().stop_step(draw) if self.args.matched == "mixture" else len(self.indices) - 1

    def sample_condition(self, batch: dict[str, Any], player: str) -> Condition:
        """Under guidance the fake score has to know the unconditional samples too."""
        condition = self.condition(batch)
        if player == "generator" or self.kappa_training == self.kappa_fake == 1 or not condition:
            return condition
        count = len(next(iter(condition.values())))
        draw = self.draws.turn("drop prompt", self.progress.step, self.device)
        return where(draw.uniform(count) < DROP_PROMPT, self.null(count, 0.0), condition)

    # ------------------------------------------------------------ the generator

    def generator_terms(self, sample: Sample, batch: dict[str, Any], draw: Turn) -> LossTerms:
        x, condition = sample.x, sample.condition
        if x.requires_grad:
            x.register_hook(finite_gradient)  # what a sample that is left out sends back must not reach the others
        t = sample_times(self.args.times, self.process, draw, len(x))
        x_t = add_noise(self.process, x, draw.normal(x.shape), t)
        mu_real, mu_fake = self.real_prediction(x_t, t, condition), self.fake_prediction(x_t, t, condition)
        kept = finite_rows(x, mu_real, mu_fake)
        clean, mu_real, mu_fake = x[kept], mu_real[kept], mu_fake[kept]
        self.meter.add(self.process, t[kept], dmd_weight(clean, mu_real) * (mu_fake - mu_real))
        share = len(clean) / len(x)
        loss = share * sid_loss(clean, mu_real, mu_fake, self.args.alpha) if share else clean.sum()
        terms = LossTerms(matching=(1.0, loss))
        gan = self.args.gan
        if gan is not None and share and self.progress.step * self.samples_per_step >= gan.after:
            assert self.discriminator is not None
            logits = self.discriminator(x_t, t, condition)[kept]
            terms["adversarial"] = (gan.weight_generator, share * adversarial_loss(clean, mu_real, logits))
        return terms

    def fake_prediction(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.fake.guided(x_t, t, condition, self.null(len(x_t), self.kappa_fake), self.kappa_fake)

    # ------------------------------------------------------------ the fake score and the discriminator

    def denoising_loss(self, x: Tensor, e: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Sum over a sample of lambda_t (prediction - target)^2, mean over the batch: on x for EDM, else on the
        network's own output with lambda = 1, or snr / (snr + 1) for v."""
        x_t, kappa = add_noise(self.process, x, e, t), self.kappa_training
        null = self.null(len(x), kappa)
        if isinstance(self.process, EDM):
            error = self.fake.guided(x_t, t, condition, null, kappa) - x
            weight = edm_weight(t, self.process.sigma_data)
        else:
            kind = self.fake.prediction_type
            error = self.fake.guided_output(x_t, t, condition, null, kappa) - target(self.process, kind, x, e, t)
            weight = min_snr_plus_one(self.process, t) if kind == "v_prediction" else torch.ones_like(t)
        kept = finite_rows(error)
        return (error[kept].square().flatten(1).sum(1) * weight[kept].to(x.dtype)).sum() / len(x)

    def discriminator_loss(self, sample: Sample, batch: dict[str, Any], draw: Turn) -> Tensor:
        """Half the binary cross-entropy of fake and real samples, weighted as the fake score's loss is."""
        gan, real = self.args.gan, self.real(batch)
        assert gan is not None
        assert self.discriminator is not None
        t = sample_times(self.args.fake_times, self.process, draw, len(real))
        again = draw.fork() if gan.same_noise else draw
        fake_t = add_noise(self.process, sample.x, draw.normal(real.shape), t)
        real_t = add_noise(self.process, real, again.normal(real.shape), t)
        fake_logits = self.discriminator(fake_t, t, sample.condition)
        real_logits = self.discriminator(real_t, t, sample.condition)
        kept = finite_rows(fake_logits, real_logits)
        if not kept.any():
            return fake_logits[kept].sum()
        weight = edm_weight(t, self.process.sigma_data)[kept].mean() if isinstance(self.process, EDM) else 1.0
        return 0.5 * weight * non_saturating_discriminator(real_logits[kept], fake_logits[kept])


def adversarial_loss(x: Tensor, mu_real: Tensor, logits: Tensor) -> Tensor:
    """D mean_B(1 / mean_D |x - mu_r|) mean softplus(-logits), logits (B, H) cut to [-10, 10]; D the elements of a
    sample, so that it weighs against a sum over them (arXiv 2410.14919's code)."""
    scale = x[0].numel() * (1 / sid_normaliser(x, mu_real)).mean()
    return scale * non_saturating_generator(logits.clamp(-10, 10)).mean()


def finite_rows(*tensors: Tensor) -> Tensor:
    """Which samples are finite in all of the tensors (B, ...); bool (B,)."""
    return torch.stack([tensor.detach().isfinite().flatten(1).all(1) for tensor in tensors]).all(0)


def finite_gradient(gradient: Tensor) -> Tensor:
    """NaN becomes 0, infinity 1e5."""
    return torch.nan_to_num(gradient, nan=0.0, posinf=1e5, neginf=-1e5)


# ---------------------------------------------------------------- the method

SAMPLING = Sampling(start="noised", floor=True)


def build(config: Run, networks: Networks) -> SiD:
    train = config.train
    return SiD(
        networks,
        config.method_args,
        seed=config.seed,
        ema=train.ema,
        samples_per_step=train.batch_size * train.accumulation,
        fp16=train.precision == "fp16",
    )


def evaluated(config: Run, artefacts: Artefacts) -> Mapping[str, Any]:
    """The usual metrics, and those of what the student has after each step before its last: `student_after_<k>`."""
    data = load_data(config.data, config.seed)
    result = evaluate(config, artefacts, data=data, sampling=SAMPLING)
    features, settings = artefacts.get("features"), config.evaluation
    if config.method_args.steps == 1 or not measures(config, features, data):
        return result
    teacher = open_teacher(config, artefacts, data).to(ev.run_device())
    student = open_student(config, artefacts["student"], teacher)
    wanted = ev.requests(teacher, data.asked, settings.samples)
    for step in range(1, config.method_args.steps):
        function = stopped(student, config.method_args.steps, step)
        pixels = ev.generate(student, wanted, function, seed=config.seed, batch_size=settings.batch_size)
        metrics = ev.measure(data, features, pixels, wanted, seed=config.seed)
        result |= ev.prefixed(f"student_after_{step}", metrics)
    return result


def stopped(student: Opened, steps: int, after: int) -> ev.Generate:
    """The output after some of a student's steps."""
    indices = levels(student.process, steps, floor=SAMPLING.floor)
    return ev.stepping(student.denoiser, student, indices, stop=after - 1, start=SAMPLING.start)


METHOD = dataclasses.replace(
    score_method("sid", __doc__ or "", SiDConfig, build, sampling=SAMPLING, batch_factor=2), evaluate=evaluated
)

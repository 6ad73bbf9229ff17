"""One-step Diffusion Models with f-Divergence Distribution Matching (arXiv 2502.15681, 2025).

The gradient of DMD2 is that of the reverse KL divergence, which seeks modes. For every f-divergence between the noised
teacher p_t and student q_t it is the same difference of scores times a scalar of the density ratio r (theorem 1):

    grad D_f(p_t || q_t) = - E_{q_t}[ h(r) (score_p - score_q) dx_t/dtheta ],   h(r) = r^2 f''(r),   r = p_t / q_t

so f-distill is DMD2 and one weight per sample. The ratio is read off the discriminator that DMD2 trains anyway, at the
very x_t of the score difference; it compares the student with data, which stand for the teacher:

    l = mean over heads of D(x_t, t, c);   r = clip(exp(l), 0.1, 20), normalised within bins of t
    g = h(r) / mean h(r) * (mu_f(x_t) - mu_r(x_t)) / mean |x - mu_r(x_t)|
    L_G = 0.5 mean (x - sg[x - g])^2 + lambda_G mean softplus(-D(x_t))

    f        rkl  kl  js         sf (softened rkl)  sh (Hellinger)  jf (Jeffreys)  neyman
    h(r)     1    r   r/(1 + r)  1/(1 + r)          sqrt(r)         1 + r          1/r
up to constant factors, which mean h removes. Less mode-seeking divergences (kl, js) have an h that grows with r: they
listen to the samples where the student is too rare. Their gradient varies more (`effective_share` in the log).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kd_diffusion import runs
from kd_diffusion.data import Data
from kd_diffusion.engine.adversarial import GANConfig, with_middle
from kd_diffusion.engine.conditions import Condition
from kd_diffusion.engine.denoiser import Denoiser, guide
from kd_diffusion.engine.distillation import Networks, Sample, ScoreArgs, ScoreDistiller
from kd_diffusion.engine.draws import Turn
from kd_diffusion.engine.process import Process, add_noise, expand
from kd_diffusion.engine.score import inject, weighted_error
from kd_diffusion.engine.timesteps import TimesConfig, sample_times
from kd_diffusion.runs import Run, score_method
from kdcore.config import EMAConfig
from kdcore.distiller import LossTerms
from kdcore.errors import InputError
from kdcore.losses import non_saturating_generator

Divergence = Literal["rkl", "kl", "js", "sf", "sh", "jf", "neyman"]
SMALLEST_BATCH = 16
_EPS = 1e-6

WEIGHTS: dict[Divergence, Callable[[Tensor], Tensor]] = {
    "rkl": torch.ones_like,
    "kl": lambda r: r,
    "js": lambda r: r / (1 + r),
    "sf": lambda r: 1 / (1 + r),
    "sh": torch.sqrt,
    "jf": lambda r: 1 + r,
    "neyman": lambda r: 1 / r.clamp_min(1e-8),
}
"""h(r) = r^2 f''(r), without the constants 1/2 (sh) and 2 (neyman)."""


def whole_table() -> TimesConfig:
    return TimesConfig(kind="continuous", low=0, high=999)


class FDistillConfig(ScoreArgs):
    f_div: Divergence = Field("js", description="divergence between teacher and student; rkl is DMD2")
    ratio_clip: tuple[float, float] = Field((0.1, 20.0), description="smallest and largest density ratio")
    ratio_bins: int = Field(10, ge=0, description="bins of t within which ratios are divided by their mean; 0: none")
    ratio_ema: float = Field(0.0, ge=0, lt=1, description="rho of the bins' means; 0.5 on ImageNet-64")
    guidance_scale: float = Field(1.0, description="kappa of the teacher; 1.75 for SD 1.5, 8 for SDXL")
    fake_updates: int = Field(5, ge=1, description="R; 10 for SD 1.5")
    fake_error: Literal["dmd2", "x"] = Field(
        "dmd2", description="error of the fake score: as in DMD2, or of x without a weight as in the authors' code"
    )
    gan: GANConfig = Field(
        default_factory=lambda: GANConfig(host="teacher_features", weight_generator=1e-3, weight_discriminator=1.0),
        description="the discriminator that gives the ratio; weight 3e-3 on ImageNet-64, 5e-3 on SDXL",
    )
    times: TimesConfig = Field(default_factory=whole_table, description="times of the generator's loss")
    fake_times: TimesConfig = Field(default_factory=whole_table, description="times of the fake score's loss")

    @model_validator(mode="after")
    def _clips_around_one(self) -> FDistillConfig:
        low, high = self.ratio_clip
        if not 0 < low < 1 < high:
            raise ValueError(f"has ratio_clip {low} to {high}; allowed: 0 < smallest < 1 < largest")
        return self


# ---------------------------------------------------------------- the weight


def density_ratio(logits: Tensor, clip: tuple[float, float]) -> Tensor:
    """r = p/q (B,) from logits (B, H) of a discriminator for which data are positive; no graph, float32 or better."""
    logits = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).mean(1)
    return logits.clamp(-10, 10).exp().clamp(*clip)


def time_bins(process: Process, t: Tensor, bins: int) -> Tensor:
    """Which of `bins` equal parts of [t_min, t_max] a time falls in, int64 (B,)."""
    low, high = process.at(torch.tensor([0, process.size - 1], device=t.device)).double()
    return ((t.double() - low) / (high - low) * bins).long().clamp(0, bins - 1)


def normalise_by_bin(ratio: Tensor, index: Tensor, means: Tensor, rho: float) -> Tensor:
    """r / m of its bin, where m <- rho m + (1 - rho) mean in every bin (K,) that the batch of all ranks reaches.

    Updates `means` in place.
    """
    counts = over_ranks(torch.bincount(index, minlength=len(means)).to(ratio.dtype))
    sums = over_ranks(torch.zeros_like(counts).index_add_(0, index, ratio))
    fresh = rho * means + (1 - rho) * sums / counts.clamp_min(1)
    means.copy_(torch.where(counts > 0, fresh, means))
    return ratio / (means[index] + _EPS)


def divergence_weight(f_div: Divergence, ratio: Tensor) -> Tensor:
    """h(r) / mean h(r), (B,); the mean is over the batch of all ranks, so that the gradient's size does not change.

    >>> divergence_weight("kl", torch.tensor([1.0, 3.0]))
    tensor([0.5000, 1.5000])
    """
    h = WEIGHTS[f_div](ratio)
    total, count = over_ranks(torch.stack((h.sum(), h.new_tensor(float(len(h))))))
    return h / (total / count + _EPS)


def over_ranks(values: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values


# ---------------------------------------------------------------- the method


class FDistill(ScoreDistiller):
    """DMD2 whose generator gradient is weighted by sample. The bins' means are part of checkpoints, not of the student.

    With accumulation the weight is relative to its micro-batch. Raises InputError for micro-batches under 16 samples
    over all processes: the mean of h would undo the weight (for one sample h is 1).
    """

    args: FDistillConfig

    def __init__(self, networks: Networks, args: FDistillConfig, *, seed: int = 0, ema: EMAConfig | None = None):
        super().__init__(networks, args, seed=seed, ema=ema)
        self.register_buffer("ratio_means", torch.ones(args.ratio_bins))

    def generator_terms(self, sample: Sample, batch: dict[str, Any], draw: Turn) -> LossTerms:
        x, condition = sample.x, sample.condition
        check_batch(self.args, len(x) * draw.world, "the generator's batch")
        t = sample_times(self.args.times, self.process, draw, len(x))
        x_t = add_noise(self.process, x, draw.normal(x.shape), t)
        assert self.discriminator is not None
        # One pass of the host gives the features and its conditional prediction, before guidance.
        mu_host, features = with_middle(self.discriminator.network, x_t, t, condition)
        logits = self.discriminator.logits(features)
        h = self.sample_weight(logits, t)
        g = expand(h, x).to(x.dtype) * self.matching(x.detach(), x_t.detach(), t, condition, mu_host.detach())
        self.meter.add(self.process, t, g)
        return LossTerms(
            matching=(1.0, inject(x, g)),
            adversarial=(self.args.gan.weight_generator, non_saturating_generator(logits)),
            effective_share=(0.0, h.mean().square() / h.square().mean()),
        )

    @torch.no_grad()
    def sample_weight(self, logits: Tensor, t: Tensor) -> Tensor:
        """h of mean 1, (B,)."""
        ratio = density_ratio(logits, self.args.ratio_clip)
        if self.args.ratio_bins > 0:
            index = time_bins(self.process, t, self.args.ratio_bins)
            ratio = normalise_by_bin(ratio, index, self.ratio_means, self.args.ratio_ema)
        return divergence_weight(self.args.f_div, ratio)

    @torch.no_grad()
    def matching(self, x: Tensor, x_t: Tensor, t: Tensor, condition: Condition, mu_host: Tensor) -> Tensor:
        """DMD2's g; `mu_host` is the conditional prediction of the network that hosts the discriminator."""
        host = self.discriminator.network if self.discriminator is not None else None

        def prediction(denoiser: Denoiser, kappa: float) -> Tensor:
            null = self.null(len(x_t), kappa)
            if denoiser is not host:
                return denoiser.guided(x_t, t, condition, null, kappa)
            return mu_host if kappa == 1 else guide(denoiser(x_t, t, null), mu_host, kappa)

        mu_real = prediction(self.real_score, self.args.guidance_scale)
        mu_fake = prediction(self.fake, self.args.fake_guidance_scale)
        return self.weight(x, mu_real, t) * (mu_fake - mu_real)

    def denoising_loss(self, x: Tensor, e: Tensor, t: Tensor, condition: Condition) -> Tensor:
        if self.args.fake_error == "dmd2":
            return super().denoising_loss(x, e, t, condition)
        return weighted_error(self.fake(add_noise(self.process, x, e, t), t, condition), x)


def check_batch(args: FDistillConfig, size: int, field: str) -> None:
    """Raises InputError for a batch in which the weights would be relative to too few samples."""
    if args.f_div != "rkl" and size < SMALLEST_BATCH:
        raise InputError(
            f"{field}: {size} samples, weights of f_div = '{args.f_div}' are relative to their batch; "
            f"allowed: {SMALLEST_BATCH} and more (or f_div: rkl)"
        )


def check(config: Run, data: Data) -> None:
    check_batch(config.method_args, config.train.batch_size, "train.batch_size")
    runs.check(config, data)


def build(config: Run, networks: Networks) -> FDistill:
    return FDistill(networks, config.method_args, seed=config.seed, ema=config.train.ema)


METHOD = score_method("f_distill", __doc__ or "", FDistillConfig, build, check=check)

"""SNOOPI: Supercharged One-step Diffusion Distillation with Proper Guidance (arXiv 2412.02687, 2024).

Two parts. PG-SB is SwiftBrush whose guidance scale is drawn anew in each iteration, one value for the teacher and the
adapted teacher; NASA is a negative prompt for networks that take one step, inside the text cross-attention.

    k ~ U(k_min, k_max);   e^k = (1 - k) e(x_t, t, 0) + k e(x_t, t, y)
    L_G = 0.5 mean (x - sg[x - g])^2 + w mean max(0, tau - cos(image(x), text(y))),   g = s_t^2 (e_T^k - e_L^k)
    Z = softmax(Q K+^T / sqrt d) V+ - alpha softmax(Q K-^T / sqrt d) V-                in every text cross-attention

g is linear in k, so that its mean is that of the fixed scale (k_min + k_max) / 2; what changes is its noise, and what
Adam and the adapters make of it. The term with CLIP is that of SwiftBrush v2 (arXiv 2408.14176).

NASA needs no training: see `kd_diffusion.integrations.nasa`. With `negatives` the student is trained with it (NASA-T):
it runs with a negative prompt y- and alpha ~ U(0, 1), and the teacher's guidance leads away from y- in the place of the
empty prompt, e_T = (1 - k) e_T(y-) + k e_T(y). The adapted teacher keeps the empty prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, interpolate

from kd_diffusion import runs as base
from kd_diffusion.engine.conditions import Condition, take
from kd_diffusion.engine.distillation import Networks, Sample
from kd_diffusion.engine.draws import Turn
from kd_diffusion.engine.variational import VariationalArgs, VariationalDistiller
from kd_diffusion.integrations.nasa import nasa
from kd_diffusion.negation import NegationConfig
from kd_diffusion.negation import evaluate as negation_metrics
from kdcore.config import Config, EMAConfig
from kdcore.distiller import LossTerms, freeze
from kdcore.errors import InputError
from kdcore.stages import Artefacts

Run = base.Run


class CLIPConfig(Config):
    pretrained: str = Field("openai/clip-vit-large-patch14", description="CLIP by hub name or folder")
    weight: float = Field(0.1, ge=0, description="weight of the term")
    tau: float = Field(0.37, ge=-1, le=1, description="cosine from which on an image is not pulled further")


class NegativesConfig(Config):
    """Negative prompts: from one to `most` of the terms, joined by commas."""

    terms: list[str] = Field(min_length=1, description="what negative prompts are made of")
    most: int = Field(3, ge=1, description="largest number of terms in a prompt")
    count: int = Field(10_000, ge=1, description="prompts that are made")
    alpha_low: float = Field(0.0, ge=0, description="smallest alpha of an iteration")
    alpha_high: float = Field(1.0, ge=0, description="largest alpha of an iteration")
    in_student: bool = Field(True, description="NASA in the student; false: the negatives guide the teacher alone")
    in_fake: bool = Field(False, description="guide the fake score away from the negatives as well")

    @model_validator(mode="after")
    def _ordered(self) -> NegativesConfig:
        if self.alpha_low > self.alpha_high:
            raise ValueError(f"alpha_low = {self.alpha_low} must not be above alpha_high = {self.alpha_high}")
        return self


class SnoopiConfig(VariationalArgs):
    random: Literal["both", "teacher", "fake", "none"] = Field(
        "both", description="whose guidance scale is drawn; the others' is guidance_scale"
    )
    guidance_low: float = Field(0.5, description="k_min")
    guidance_high: float = Field(4.0, description="k_max; 3 for PixArt-alpha")
    per_sample: bool = Field(False, description="draw a scale for each sample; false: one for the iteration")
    clip: CLIPConfig | None = Field(None, description="the clamped term with CLIP; null: none")
    negatives: NegativesConfig | None = Field(None, description="negative prompts in training (NASA-T); null: none")
    negation: NegationConfig = Field(
        default_factory=lambda: NegationConfig.model_validate({}),
        description="what the evaluation removes by negative prompts, where the data is drawn digits",
    )

    @model_validator(mode="after")
    def _consistent(self) -> SnoopiConfig:
        if self.guidance_low > self.guidance_high:
            raise ValueError(
                f"guidance_low = {self.guidance_low} must not be above guidance_high = {self.guidance_high}"
            )
        return self


class Snoopi(VariationalDistiller):
    """SwiftBrush with drawn guidance scales, and where asked for CLIP and NASA in training."""

    args: SnoopiConfig

    def __init__(self, networks: Networks, args: SnoopiConfig, *, seed: int = 0, ema: EMAConfig | None = None):
        super().__init__(networks, args, seed=seed, ema=ema)
        self.clip = freeze(ClampedCLIP(args.clip)) if args.clip else None
        self._negatives: dict[str, Tensor] | None = None  # tokens of all of them
        self._negative: Condition | None = None  # those of the present samples
        if args.negatives is not None:
            self._negatives = negative_tokens(args.negatives, self.conditioner, seed)
            if args.negatives.in_student:
                blank = self.conditioner.null(1, self.device)
                nasa(self.student, blank["prompt_embeds"], 0.0)  # raises where the network reads no text

    # ------------------------------------------------------------ PG-SB

    def guidance(self, count: int) -> tuple[float | Tensor, float | Tensor]:
        args, fixed = self.args, super().guidance(count)
        if args.random == "none":
            return fixed
        draw = self.draws.turn("guidance", self.progress.step, self.device)
        spread = args.guidance_high - args.guidance_low
        drawn: float | Tensor
        if args.per_sample:
            drawn = args.guidance_low + spread * draw.uniform(count)
        else:
            drawn = draw.one_uniform(args.guidance_low, args.guidance_high)
        return (
            fixed[0] if args.random == "fake" else drawn,
            fixed[1] if args.random == "teacher" else drawn,
        )

    def generator_terms(self, sample: Sample, batch: dict[str, Any], draw: Turn) -> LossTerms:
        terms = super().generator_terms(sample, batch, draw)
        if self.clip is not None and self.args.clip is not None:
            pixels = self.space.decode_with_grad(sample.x)
            terms["clip"] = (self.args.clip.weight, self.clip(pixels, self.prompts(batch)))
        return terms

    def prompts(self, batch: dict[str, Any]) -> list[str]:
        """The batch's prompts, from their tokens. Raises InputError where the data has none."""
        if "input_ids" not in batch:
            raise InputError("method_args.clip: needs prompts, and the data has none; give clip: null")
        return self.conditioner.tokenizers[0].batch_decode(batch["input_ids"], skip_special_tokens=True)

    # ------------------------------------------------------------ NASA-T

    def sample(self, batch: dict[str, Any], player: str, *, grad: bool) -> Sample:
        if self._negatives is None or self.args.negatives is None:
            return super().sample(batch, player, grad=grad)
        draw = self.draws.turn(f"negative {player}", self.progress.step, self.device)
        count = len(batch["input_ids"])
        rows = draw.integers(0, len(self._negatives["input_ids"]) - 1, count)
        tokens = {name: values.to(self.device)[rows] for name, values in self._negatives.items()}
        self._negative = negative = self.condition(tokens)
        alpha = draw.one_uniform(self.args.negatives.alpha_low, self.args.negatives.alpha_high)
        if not self.args.negatives.in_student:
            return super().sample(batch, player, grad=grad)
        with nasa(self.student, negative["prompt_embeds"], alpha, negative.get("prompt_mask")):
            return super().sample(batch, player, grad=grad)

    def turned_from(self, count: int, kappa: float | Tensor, *, fake: bool = False) -> Condition:
        if self._negative is None or self.args.negatives is None or (fake and not self.args.negatives.in_fake):
            return super().turned_from(count, kappa, fake=fake)
        return take(self._negative, slice(0, count))


# ---------------------------------------------------------------- the term with CLIP


def clamped_loss(cosine: Tensor, tau: float) -> Tensor:
    """mean max(0, tau - cos); cosine (B,) -> scalar (arXiv 2408.14176).

    >>> clamped_loss(torch.tensor([0.25, 0.5]), 0.375)
    tensor(0.0625)
    """
    return (tau - cosine).clamp_min(0).mean()


class ClampedCLIP(nn.Module):
    """The clamped loss of a CLIP model on pixels (B, 1 or 3, H, W) in about [-1, 1], with a graph, and B prompts.

    Raises InputError where the model cannot be loaded.
    """

    def __init__(self, config: CLIPConfig):
        super().__init__()
        from transformers import AutoTokenizer, CLIPModel

        self.tau = config.tau
        try:
            self.model = CLIPModel.from_pretrained(config.pretrained, use_safetensors=True)
            self.tokenizer = AutoTokenizer.from_pretrained(config.pretrained)
        except (OSError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"method_args.clip.pretrained = '{config.pretrained}': cannot be loaded ({reason})"
            ) from None
        # The colours that every released CLIP was trained with.
        self.register_buffer("mean", torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1))

    def forward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        return clamped_loss(self.cosine(pixels, prompts), self.tau)

    def cosine(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """Cosine (B,) of image and text."""
        side = self.model.config.vision_config.image_size
        colours = pixels.float().expand(-1, 3, -1, -1) / 2 + 0.5
        images = (interpolate(colours, (side, side), mode="bicubic", antialias=True) - self.mean) / self.std
        limit = self.model.config.text_config.max_position_embeddings
        text = self.tokenizer(prompts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        output = self.model(pixel_values=images, **text.to(pixels.device))
        return cosine_similarity(output.image_embeds, output.text_embeds, dim=-1)


# ---------------------------------------------------------------- negative prompts


def negative_prompts(config: NegativesConfig, seed: int) -> list[str]:
    """`count` prompts, each of one to `most` different terms."""
    generator = torch.Generator().manual_seed(seed)
    most = min(config.most, len(config.terms))
    prompts = []
    for _ in range(config.count):
        length = int(torch.randint(1, most + 1, (), generator=generator))
        chosen = torch.randperm(len(config.terms), generator=generator)[:length].tolist()
        prompts.append(", ".join(config.terms[index] for index in chosen))
    return prompts


def negative_tokens(config: NegativesConfig, conditioner: Any, seed: int) -> dict[str, Tensor]:
    """Their tokens. Raises InputError for a teacher that reads no text."""
    if not hasattr(conditioner, "tokens"):
        raise InputError("method_args.negatives: the teacher is not conditioned on text; give negatives: null")
    return conditioner.tokens(negative_prompts(config, seed))


# ---------------------------------------------------------------- the method


def build(config: Run, networks: Networks) -> Snoopi:
    return Snoopi(networks, config.method_args, seed=config.seed, ema=config.train.ema)


def evaluate(config: Run, artefacts: Artefacts) -> Mapping[str, Any]:
    """The usual metrics, and what negative prompts remove."""
    return {**_STAGES.evaluate(config, artefacts), **negation_metrics(config, artefacts, config.method_args.negation)}


_STAGES = base.score_method("snoopi", __doc__ or "", SnoopiConfig, build, networks=base.adapter_networks)
METHOD = dataclasses.replace(_STAGES, evaluate=evaluate)

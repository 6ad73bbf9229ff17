"""How well negative prompts remove what they name from a student's samples, and what is left of the rest.

Two questions about drawn digits: "a digit, upright" with the negative "a three" (the rate of the named digit), and "a
seven" with the negative "a bold digit" (the rate of the named weight, and the accuracy of the digit). Four answers:

    nasa       Z+ - alpha Z- in every text cross-attention (arXiv 2412.02687)
    guidance   x = x(n) + (1 + alpha) (x(p) - x(n)): guiding the samples, a linear blend of two images
    embedding  c_p - alpha c_n as the text
    teacher    its own guidance away from the negative prompt, in many steps
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from kd_diffusion import evaluation as ev
from kd_diffusion.attributes import NUMBER_WORDS, TILTS, WEIGHTS, attributes, sentence
from kd_diffusion.data import Data, load_data
from kd_diffusion.engine.conditions import Condition, take
from kd_diffusion.engine.denoiser import guide
from kd_diffusion.engine.draws import Draws
from kd_diffusion.engine.rollout import rollout
from kd_diffusion.engine.timesteps import levels
from kd_diffusion.integrations.nasa import nasa
from kd_diffusion.integrations.pipelines import Opened
from kd_diffusion.runs import Run, open_student, open_teacher
from kdcore.config import Config
from kdcore.stages import Artefacts

Sampler = Callable[[Tensor, Condition, Condition], Tensor]
"""(z, positive, negative) -> x, all (B, ...)."""


class NegationConfig(Config):
    alphas: list[float] = Field(default_factory=lambda: [0.25, 0.5, 1.0], description="scales of the negative prompt")
    samples: int = Field(500, ge=0, description="images a question and scale; 0: do not ask")
    teacher_steps: int = Field(10, ge=1, description="steps of the teacher's row")


@dataclass(frozen=True)
class Question:
    """N prompts with N negatives. `digit` (N,) is the digit that a prompt asks for, or with `negated` the one that the
    negative names; `weight` (N,) the index of the weight that the negative names."""

    prompts: list[str]
    negatives: list[str]
    digit: Tensor
    weight: Tensor | None = None


def digit_question(count: int) -> Question:
    """Any digit, with a negative that names one; the wording varies over what the training prompts say."""
    digit = torch.arange(count) % 10
    prompts = [sentence(None, (None, "thin", "bold")[i // 30 % 3], TILTS[i // 10 % 3]) for i in range(count)]
    return Question(prompts, [sentence(NUMBER_WORDS[d]) for d in digit.tolist()], digit)


def weight_question(count: int) -> Question:
    """A digit by name, with a negative that names a weight."""
    index = torch.arange(count)
    digit, weight = index % 10, torch.tensor([0, 2])[index // 10 % 2]
    prompts = [sentence(NUMBER_WORDS[d]) for d in digit.tolist()]
    return Question(prompts, [sentence(None, WEIGHTS[w]) for w in weight.tolist()], digit, weight)


# ---------------------------------------------------------------- ways to take a negative prompt


def plain(own: Opened, steps: int) -> Sampler:
    return lambda z, positive, negative: _rollout(own, steps, own.denoiser, z, positive)


def by_nasa(own: Opened, steps: int, alpha: float) -> Sampler:
    def sampler(z: Tensor, positive: Condition, negative: Condition) -> Tensor:
        with nasa(own.network, negative["prompt_embeds"], alpha, negative.get("prompt_mask")):
            return _rollout(own, steps, own.denoiser, z, positive)

    return sampler


def by_guidance(own: Opened, steps: int, alpha: float) -> Sampler:
    def sampler(z: Tensor, positive: Condition, negative: Condition) -> Tensor:
        def guided(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return guide(own.denoiser(x_t, t, negative), own.denoiser(x_t, t, condition), 1 + alpha)

        return _rollout(own, steps, guided, z, positive)

    return sampler


def by_embedding(own: Opened, steps: int, alpha: float) -> Sampler:
    def sampler(z: Tensor, positive: Condition, negative: Condition) -> Tensor:
        embeds = positive["prompt_embeds"] - alpha * negative["prompt_embeds"]
        return _rollout(own, steps, own.denoiser, z, {**positive, "prompt_embeds": embeds})

    return sampler


def by_teacher(teacher: Opened, steps: int, kappa: float) -> Sampler:
    """The teacher's steps with e(n) + kappa (e(p) - e(n))."""
    indices = levels(teacher.process, steps)

    def sampler(z: Tensor, positive: Condition, negative: Condition) -> Tensor:
        away = dataclasses.replace(teacher, conditioner=_Fixed(negative))
        return ev.trajectory(away, positive, z, indices, kappa)[-1]

    return sampler


class _Fixed:
    """A conditioner whose guidance leads away from a given condition."""

    def __init__(self, negative: Condition):
        self.negative = negative

    def null(self, count: int, device: torch.device | str) -> Condition:
        return take(self.negative, slice(0, count))


def _rollout(own: Opened, steps: int, generator: Any, z: Tensor, condition: Condition) -> Tensor:
    rest = torch.Generator(z.device).manual_seed(0)
    later = (torch.randn(z.shape, generator=rest, device=z.device) for _ in itertools.count())
    noises = itertools.chain([z], later)
    return rollout(generator, own.process, levels(own.process, steps), condition, lambda: next(noises))


# ---------------------------------------------------------------- metrics


@torch.no_grad()
def generate(own: Opened, question: Question, sampler: Sampler, *, seed: int, batch_size: int) -> Tensor:
    """Pixels (N, C, H, W) in [-1, 1]; the noise depends on the seed alone."""
    device = own.device
    own.network.eval()
    positive, negative = (_embedded(own, texts, device) for texts in (question.prompts, question.negatives))
    draws, pixels = Draws(seed), []
    for step, first in enumerate(range(0, len(question.prompts), batch_size)):
        part = slice(first, min(first + batch_size, len(question.prompts)))
        z = draws.at("negation", step, 0, device).normal((part.stop - part.start, *own.space.shape))
        x = sampler(z, take(positive, part), take(negative, part))
        pixels.append(own.space.decode(x).float().cpu().clamp(-1, 1))
    return torch.cat(pixels)


def _embedded(own: Opened, texts: Sequence[str], device: torch.device) -> Condition:
    tokens = own.conditioner.tokens(list(texts))
    return own.conditioner.embed({name: value.to(device) for name, value in tokens.items()})


def digit_metrics(data: Data, net: Any, pixels: Tensor, question: Question) -> dict[str, float]:
    """Of what was asked away: `digit_rate`; of the images that do not show it: `confidence` of the classifier (mean
    largest probability) and `frechet` to the held-out images."""
    from kd_diffusion.metrics import embed, frechet_distance

    found = embed(net, pixels)
    gone = found.logits.argmax(1).cpu() != question.digit
    result = {"digit_rate": 1 - float(gone.double().mean())}
    if int(gone.sum()) > 1:
        real = embed(net, data.held_out.pixels).features
        result["confidence"] = float(found.logits.softmax(1).amax(1).cpu()[gone].double().mean())
        result["frechet"] = frechet_distance(found.features[gone.to(found.features.device)], real)
    return result


def weight_metrics(data: Data, net: Any, pixels: Tensor, question: Question) -> dict[str, float]:
    """`weight_rate`, how often the weight asked away is there, and the `accuracy` of the digit asked for."""
    from kd_diffusion.metrics import class_accuracy, embed

    assert data.rule is not None
    seen = attributes(pixels, question.digit, data.rule).weight
    return {
        "weight_rate": float((seen == question.weight).double().mean()),
        "accuracy": class_accuracy(embed(net, pixels).logits, question.digit),
    }


def evaluate(config: Run, artefacts: Artefacts, settings: NegationConfig) -> dict[str, float]:
    """`negation/<way>_<alpha>/<metric>` of a saved student; {} where the data is not drawn digits with prompts.

    `digit_removal` and `weight_removal` are 1 - rate / rate without a negative prompt.
    """
    from kd_diffusion.metrics import load_features

    data = load_data(config.data, config.seed)
    if settings.samples == 0 or data.rule is None or "features" not in artefacts:
        return {}
    teacher = open_teacher(config, artefacts, data).to(ev.run_device())
    if not hasattr(teacher.conditioner, "tokens"):
        return {}
    own = open_student(config, artefacts["student"], teacher)
    net, steps = load_features(artefacts["features"]), config.method_args.steps
    questions = (digit_question(settings.samples), digit_metrics), (weight_question(settings.samples), weight_metrics)

    def answers(sampler: Sampler, opened: Opened = own) -> dict[str, float]:
        found: dict[str, float] = {}
        for question, metrics in questions:
            pixels = generate(opened, question, sampler, seed=config.seed, batch_size=config.evaluation.batch_size)
            found |= metrics(data, net, pixels, question)
        return found

    before = answers(plain(own, steps))
    rows = {"none": before}
    for name, way in (("nasa", by_nasa), ("guidance", by_guidance), ("embedding", by_embedding)):
        rows |= {f"{name}_{alpha:g}": answers(way(own, steps, alpha)) for alpha in settings.alphas}
    kappa = config.evaluation.guidance_scale or config.method_args.guidance_scale
    rows["teacher"] = answers(by_teacher(teacher, settings.teacher_steps, kappa), teacher)
    return {
        f"negation/{row}/{name}": value
        for row, found in rows.items()
        for name, value in _removals(found, before).items()
    }


def _removals(found: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    removal = {
        name.replace("rate", "removal"): 1 - found[name] / before[name]
        for name in ("digit_rate", "weight_rate")
        if found is not before and before[name] > 0
    }
    return {**found, **removal}

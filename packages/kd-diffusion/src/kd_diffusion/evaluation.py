"""What teachers and students generate, and how good it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from kd_diffusion.data import Data, Part
from kd_diffusion.engine.conditions import Condition
from kd_diffusion.engine.denoiser import Denoiser
from kd_diffusion.engine.draws import Draws, Turn
from kd_diffusion.engine.rollout import Renoise, Start, euler_move, rollout, start_noise
from kd_diffusion.engine.timesteps import levels
from kd_diffusion.integrations.pipelines import Opened
from kdcore.config import Config

Generate = Callable[[Condition, Turn], Tensor]
"""(condition, draw) -> samples in diffusion space, (B, C, H, W)."""


class EvaluationConfig(Config):
    samples: int = Field(1000, ge=1, description="generated samples that the metrics are computed on")
    batch_size: int = Field(250, ge=1, description="samples generated at once")
    features: Literal["auto", "classifier", "inception", "none"] = Field(
        "auto",
        description="what samples are compared in: a classifier that is trained on the data, Inception (FID; needs the "
        "extra fid), or nothing; auto: the classifier for labelled images in memory",
    )
    teacher_steps: list[int] = Field(default_factory=lambda: [1, 2, 4, 50], description="steps of the teacher's rows")
    guidance_scale: float | None = Field(None, description="kappa of the teacher's rows; None: as in the training")


@dataclass(frozen=True)
class Requests:
    """What is asked of a generator: the items of a batch for N samples, their labels and prompts where there are."""

    batch: dict[str, Tensor]
    labels: Tensor | None
    prompts: list[str] | None
    count: int

    @property
    def by_text(self) -> bool:
        return "input_ids" in self.batch


def requests(opened: Opened, part: Part, count: int) -> Requests:
    """The conditions of a part's samples in its own order, repeated until there are `count`."""
    index = torch.arange(count) % len(part)
    batch: dict[str, Tensor] = {"index": index}
    labels = None if part.labels is None else part.labels[index]
    prompts = None if part.prompts is None else [part.prompts[i] for i in index.tolist()]
    if hasattr(opened.conditioner, "tokens") and prompts is not None:
        unique = sorted(set(prompts))
        place = {prompt: row for row, prompt in enumerate(unique)}
        rows = torch.tensor([place[prompt] for prompt in prompts])
        batch |= {name: value[rows] for name, value in opened.conditioner.tokens(unique).items()}
    elif labels is not None:
        batch["class_labels"] = labels
    return Requests(batch, labels, prompts, count)


def run_device() -> torch.device:
    """The device of the run that goes on, else the machine's accelerator, else the CPU."""
    from accelerate.state import PartialState

    if PartialState._shared_state:
        return PartialState().device
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


@torch.no_grad()
def generate(opened: Opened, wanted: Requests, function: Generate, *, seed: int, batch_size: int) -> Tensor:
    """Pixels (N, C, H, W) in [-1, 1] of what is asked, the same noise for every function with the same seed."""
    draws, pixels = Draws(seed), []
    device = opened.device
    for step, first in enumerate(range(0, wanted.count, batch_size)):
        part = slice(first, min(first + batch_size, wanted.count))
        condition = opened.conditioner.embed({name: value[part].to(device) for name, value in wanted.batch.items()})
        x = function(condition, _Sized(draws.at("evaluate", step, 0, device), part))
        pixels.append(opened.space.decode(x).float().cpu())
    found = torch.cat(pixels)
    return found if opened.space.shape[1:] == (1, 1) else found.clamp(-1, 1)


def timed_generate(
    opened: Opened, wanted: Requests, function: Generate, *, seed: int, batch_size: int
) -> tuple[Tensor, float]:
    """(pixels, seconds per sample, decoding included)."""
    began = time.perf_counter()
    pixels = generate(opened, wanted, function, seed=seed, batch_size=batch_size)
    return pixels, (time.perf_counter() - began) / wanted.count


class _Sized(Turn):
    """A turn that knows how many samples are wanted, for unconditional generators."""

    def __init__(self, turn: Turn, part: slice):
        self.__dict__.update(turn.__dict__)
        self.count = part.stop - part.start
        self.rank, self.world = 0, 1


def student_function(
    opened: Opened, steps: int, *, start: Start = "unit", floor: bool = False, renoise: Renoise = "noise"
) -> Generate:
    """A few-step student as its folder describes it: the table of its scheduler ends at its first level."""
    indices = levels(opened.process, steps, floor=floor)
    return stepping(opened.denoiser, opened, indices, start=start, renoise=renoise)


def stepping(denoiser: Denoiser, opened: Opened, indices: Sequence[float], **options: Any) -> Generate:
    """A generator of these steps in the space of a pipeline; `options` as `rollout` has them."""

    def function(condition: Condition, draw: Any) -> Tensor:
        shape = (draw.count, *opened.space.shape)
        return rollout(denoiser.eval(), opened.process, indices, condition, lambda: draw.normal(shape), **options)

    return function


def teacher_function(opened: Opened, steps: int, kappa: float = 1.0) -> Generate:
    """The deterministic sampler of a teacher: DDIM (arXiv 2010.02502), Euler on the probability flow, to x itself."""
    indices = levels(opened.process, steps)

    def function(condition: Condition, draw: Any) -> Tensor:
        return trajectory(opened, condition, draw.normal((draw.count, *opened.space.shape)), indices, kappa)[-1]

    return function


@torch.no_grad()
def trajectory(
    opened: Opened, condition: Condition, z: Tensor, indices: Sequence[float], kappa: float = 1.0
) -> list[Tensor]:
    """The predictions of x along the teacher's deterministic path from z ~ N(0, I), one a level."""
    process, denoiser = opened.process, opened.denoiser.eval()
    null = {} if kappa == 1 or not condition else opened.conditioner.null(len(z), z.device)
    times = [process.at(torch.full((len(z),), index, device=z.device)) for index in indices]
    x_t, found = start_noise(process, z, times[0]), []
    for step, t in enumerate(times):
        x = denoiser.guided(x_t, t, condition, null, kappa)
        found.append(x)
        if step + 1 < len(times):
            x_t = euler_move(process, x_t, x, t, times[step + 1])
    return found


# ---------------------------------------------------------------- metrics


def measure(data: Data, features: Path | None, pixels: Tensor, wanted: Requests, *, seed: int = 0) -> dict[str, float]:
    """Metrics of generated samples against the held-out ones: in features of a classifier of the data, or without one
    the FID; for points the energy distance and the coverage of the modes."""
    if data.mixture is not None:
        return _point_metrics(data, pixels, wanted.count, seed)
    from kd_diffusion.metrics import generation_metrics, load_features, torchmetrics_fid

    if features is None:
        return {"fid": torchmetrics_fid(pixels, data.held_out.pixels)}
    reference = data.held_out.pixels
    net = load_features(features)
    if not wanted.by_text:
        return generation_metrics(net, pixels, wanted.labels, reference) | _spread(data, pixels, wanted.labels)
    return generation_metrics(net, pixels, None, reference) | _prompt_metrics(data, net, pixels, wanted)


def _point_metrics(data: Data, pixels: Tensor, count: int, seed: int) -> dict[str, float]:
    from kd_diffusion.metrics.points import energy_distance, mode_coverage
    from kd_diffusion.worlds.mixture import flat

    mixture = data.mixture
    assert mixture is not None
    reference, _ = mixture.sample(count, torch.Generator().manual_seed(seed + 9973))
    points = flat(pixels)
    coverage = mode_coverage(points, mixture.means, mixture.std, weights=mixture.weights)
    return {"energy_distance": energy_distance(points, reference, squared=False), **coverage.metrics()}


def _prompt_metrics(data: Data, net: Any, pixels: Tensor, wanted: Requests) -> dict[str, float]:
    """`accuracy` on the prompts that name the digit; how often a weight and a tilt that the prompt names are there."""
    from kd_diffusion.attributes import NUMBER_WORDS, TILTS, WEIGHTS, attributes
    from kd_diffusion.metrics import embed

    assert wanted.prompts is not None
    assert wanted.labels is not None
    words = [set(prompt.replace(",", "").split()) for prompt in wanted.prompts]
    named = torch.tensor([bool(found & set(NUMBER_WORDS)) for found in words])
    shown = embed(net, pixels).logits.argmax(1).cpu()
    result = {}
    if bool(named.any()):
        result["accuracy"] = float((shown == wanted.labels)[named].double().mean())
        result |= _spread(data, pixels[named], wanted.labels[named])
    if data.rule is None:
        return result
    seen = attributes(pixels, torch.where(named, wanted.labels, shown), data.rule)
    for kind, names, values in (("weight", WEIGHTS, seen.weight), ("tilt", TILTS, seen.tilt)):
        asked = torch.tensor([next((i for i, name in enumerate(names) if name in found), -1) for found in words])
        if bool((asked >= 0).any()):
            result[f"{kind}_accuracy"] = float((values == asked)[asked >= 0].double().mean())
    return result


def _spread(data: Data, pixels: Tensor, labels: Tensor | None) -> dict[str, float]:
    """`variance_ratio`: pixel variance within a class over the real images', mean over classes; 0 is a collapse."""
    from kd_diffusion.metrics import variance_ratio

    real = data.held_out.labels
    if labels is None or real is None:
        return {}
    repeated = [of.bincount(minlength=data.num_classes) > 1 for of in (labels, real)]
    if not bool((repeated[0] & repeated[1]).any()):
        return {}
    ratios = variance_ratio(pixels, data.held_out.pixels, labels, real)
    return {"variance_ratio": sum(ratios.values()) / len(ratios)}


def prefixed(prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in metrics.items()}

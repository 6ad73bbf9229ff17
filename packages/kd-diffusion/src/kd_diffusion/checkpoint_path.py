"""A path of checkpoints of one network on disk, s_0 .. s_N, and what each of them knows (arXiv 2408.15991)."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kd_diffusion import evaluation as ev
from kd_diffusion import runs
from kd_diffusion.data import Data
from kd_diffusion.engine.conditions import Condition
from kd_diffusion.engine.denoiser import Denoiser
from kd_diffusion.engine.distillation import Networks, batch_size
from kd_diffusion.engine.draws import Draws, Turn
from kd_diffusion.engine.lora import adapter_state, load_adapter
from kd_diffusion.engine.process import add_noise
from kd_diffusion.engine.rollout import rollout
from kd_diffusion.engine.score import weighted_error
from kd_diffusion.integrations.pipelines import Opened
from kd_diffusion.runs import Recipe
from kdcore.errors import InputError
from kdcore.stages import Artefacts, RunContext, write_atomically

INDEX = "index.json"
NEAR = 0.01  # a path that ends so near to the teacher has no effect
Generated = Callable[[dict[str, Tensor], Turn], Tensor]
"""(batch, draw) -> a generator's samples for the batch's conditions."""


def write_checkpoint(network: nn.Module, folder: Path, index: int) -> None:
    """`s_<index>.safetensors` in the network's own precision: the adapters where it has some, else all weights."""
    folder.mkdir(parents=True, exist_ok=True)
    state = adapter_state(network) or {name: value.detach() for name, value in network.state_dict().items()}
    temporary = folder / f".s_{index}.tmp"
    save_file({name: value.contiguous().cpu() for name, value in state.items()}, temporary)
    os.replace(temporary, folder / f"s_{index}.safetensors")


def read_checkpoint(network: nn.Module, folder: Path, index: int, *, adapter: str = "default") -> None:
    """Loads s_<index> in place: all of it, or InputError where a name or a shape does not fit."""
    path = folder / f"s_{index}.safetensors"
    try:
        state = load_file(path)
        if adapter_state(network):
            load_adapter(network, state, adapter)
        else:
            network.load_state_dict(state, strict=True)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"path: {path.name} does not fit {type(network).__name__} ({reason})") from None


def iterations_of(folder: Path) -> list[int]:
    """The iterations of the recording at which s_0 .. s_N were written."""
    return json.loads((folder / INDEX).read_text(encoding="utf-8"))["iterations"]


@torch.no_grad()
def path_errors(
    folder: Path, found: Networks, samples: Generated, data: Data, *, size: int, seed: int, device: torch.device
) -> tuple[dict[str, list[float]], float]:
    """({generated, real: the denoising error of s_0 .. s_N}, how far s_N is from s_0: the mean over samples of
    ||mu_N - mu_0|| / ||mu_0 - x||), in batches of `size`; leaves s_N in `found.fake`, which is on `device`."""
    opened = Opened(None, "", found.fake, found.conditioner, found.space)
    draws = Draws(seed)
    # Folders come class by class: the first samples would be those of a few conditions.
    places = np.random.default_rng([seed, 47]).permutation(len(data.train))[: min(256, 16 * size)]
    part = data.train.subset(places)
    wanted = ev.requests(opened, part, len(part))
    sets, conditions = dict[str, list[Tensor]](), []
    for number, first in enumerate(range(0, wanted.count, size)):
        rows = {name: value[first : first + size].to(device) for name, value in wanted.batch.items()}
        conditions.append(found.conditioner.embed(rows))
        sets.setdefault("generated", []).append(samples(rows, draws.at("path", number, device=device)))
        if part.has_images:
            pixels = part.read(wanted.batch["index"][first : first + size]).to(device)
            sets.setdefault("real", []).append(found.space.encode(pixels))
    errors: dict[str, list[float]] = {name: [] for name in sets}
    length, ends = len(iterations_of(folder)) - 1, dict[int, Tensor]()
    network = found.fake.eval()
    for index in range(length + 1):
        read_checkpoint(network.network, folder, index)
        for name, pieces in sets.items():
            results = [
                denoising_error(network, x, condition, draws.at("path noise", number, device=device))
                for number, (x, condition) in enumerate(zip(pieces, conditions, strict=True))
            ]
            errors[name].append(sum(error * len(mu) for error, mu in results) / wanted.count)
            if name == "generated" and index in (0, length):
                ends[index] = torch.cat([mu for _, mu in results])
    moved = (ends[length] - ends[0]).flatten(1).norm(dim=1)
    away = (ends[0] - torch.cat(sets["generated"])).flatten(1).norm(dim=1).clamp_min(1e-12)
    return errors, float((moved / away).mean())


def write_errors(context: RunContext, folder: Path, errors: dict[str, list[float]], moved: float) -> None:
    """Into the index and the report, with a warning where the path leads nowhere."""
    names = [f"s_{index}" for index in range(len(errors["generated"]))]
    for name, values in errors.items():
        title = f"denoising error along the path, {name} samples"
        context.log(kind="profile", name=title, stage="path", step=0, x=names, values=values)
    if moved < NEAR:
        context.say(f"path: {names[-1]} is only {100 * moved:.2f} % away from the teacher; record for longer")
    record = {"iterations": iterations_of(folder), "errors": errors, "moved": moved}
    write_atomically(folder / INDEX, json.dumps(record, indent=2))


@torch.no_grad()
def denoising_error(denoiser: Denoiser, x: Tensor, condition: Condition, draw: Turn) -> tuple[float, Tensor]:
    """(mean squared error of the noise prediction, mu) at times between the ends of the table."""
    process = denoiser.process
    t = process.at(draw.integers(process.size // 10, process.size * 9 // 10, len(x)))
    mu = denoiser(add_noise(process, x, draw.normal(x.shape).to(x.dtype), t), t, condition)
    a, s = process.levels(t)
    return float(weighted_error(mu, x, (a / s).square())), mu


# ---------------------------------------------------------------- in a run


def samples_of(host_config: Any, recipe: Recipe, found: Networks) -> Generated:
    """(batch, draw) -> what the generator makes of the batch's conditions, after its last step and without a graph."""
    generator = found.generator.eval().requires_grad_(False)
    indices = recipe.build(host_config, dataclasses.replace(found)).indices
    sampling = recipe.sampling

    @torch.no_grad()
    def samples(batch: dict[str, Tensor], draw: Turn) -> Tensor:
        shape = (batch_size(batch), *found.space.shape)
        return rollout(
            generator,
            generator.process,
            indices,
            found.conditioner.embed(batch),
            lambda: draw.normal(shape),
            start=sampling.start,
            renoise=sampling.renoise,
        )

    return samples


def measuring(host_config: Any, recipe: Recipe, data: Data) -> Callable[[RunContext], Artefacts]:
    """Writes into the path's index: the denoising error of every s_i on the initial generator's samples (it falls with
    i) and on real data (it rises), and how far s_N is from the teacher: mean ||mu_N - mu_0|| / ||mu_0 - x||."""

    def measure(context: RunContext) -> Artefacts:
        folder = context.artefacts["path"]
        if context.is_main:
            opened = runs.open_teacher(host_config, context.artefacts, data)
            found = recipe.networks(host_config, opened, context.artefacts, data)
            for module in (found.fake, found.generator, found.conditioner, found.space):
                if isinstance(module, nn.Module):
                    module.to(context.accelerator.device)
            errors, moved = path_errors(
                folder,
                found,
                samples_of(host_config, recipe, found),
                data,
                size=host_config.train.batch_size,
                seed=host_config.seed,
                device=context.accelerator.device,
            )
            write_errors(context, folder, errors, moved)
        context.accelerator.wait_for_everyone()
        return {}

    return measure

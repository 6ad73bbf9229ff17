"""DisBack: Distribution Backtracking Builds A Faster Convergence Trajectory for One-step Diffusion Distillation
(arXiv 2408.15991, 2024).

The teacher's score is unreliable on the samples of an untrained generator. So first a path is recorded: the teacher is
fine-tuned as a denoiser on the INITIAL generator's samples, and checkpoints are kept (degradation recording). Then any
method of score distillation runs with these checkpoints, in reverse order, in the teacher's place and ends at the
teacher itself (distribution backtracking). The student is the host method's.

    record      min E lambda_t || s'(x_t, t) - target ||^2,  x = sg[G_0(z)],  s' from the teacher       -> s_1 .. s_N
    backtrack   g = W (mu_f - mu_{s_i}) at x,   i = N-1, N-2, .., 0,   s_0 the teacher, mu_f from s_N       (Alg. 1, 2)

The last segment runs until the budget ends. Optimisers, averages and the fake score are never reset between segments.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kd_diffusion import evaluation as ev
from kd_diffusion import runs
from kd_diffusion.data import Data, load_data
from kd_diffusion.engine.conditions import Condition
from kd_diffusion.engine.denoiser import Denoiser
from kd_diffusion.engine.denoising import DenoisingDistiller
from kd_diffusion.engine.distillation import Networks, ScoreArgs, ScoreDistiller, batch_size
from kd_diffusion.engine.draws import Draws, Turn
from kd_diffusion.engine.lora import SharedDenoiser, adapter_state, add_frozen_adapter, load_adapter
from kd_diffusion.engine.process import add_noise, coefficients, expand
from kd_diffusion.engine.rollout import rollout
from kd_diffusion.engine.score import weighted_error
from kd_diffusion.integrations.pipelines import Opened
from kd_diffusion.runs import DiffusionRun, Recipe
from kdcore.config import MethodConfig, parse
from kdcore.distiller import Distiller, GradientRule, LossTerms, Player, Progress
from kdcore.errors import InputError
from kdcore.method import Method
from kdcore.stages import Artefacts, Procedure, RunContext, Stage, write_atomically
from kdcore.training import TrainSetup, TrainStage

INDEX = "index.json"


class DisBackConfig(MethodConfig):
    host: Literal["dmd2", "swiftbrush", "sid", "diff_instruct"] = Field("dmd2", description="the method that distils")
    host_args: dict[str, Any] = Field(default_factory=dict, description="method_args of the host")
    path_length: int = Field(5, ge=0, description="N, checkpoints of the recorded path; 0 is the host alone")
    record_iterations: int = Field(400, ge=1, description="iterations of the recording")
    segment_iterations: int = Field(300, ge=1, description="iterations with each checkpoint of the path")
    prompt_drop: float = Field(
        0.1, ge=0, le=1, description="share of empty conditions in the recording where the host guides the teacher"
    )
    target: Literal["path", "teacher", "reversed"] = Field(
        "path", description="ablations: the teacher throughout with the fake from s_N, or the path in wrong order"
    )


# ---------------------------------------------------------------- the path


def pointer(iteration: int, *, segment: int, length: int) -> int:
    """Which checkpoint stands in for the teacher: N-1 first, one less every `segment` iterations, 0 for ever.

    >>> [pointer(j, segment=100, length=4) for j in (0, 99, 100, 299, 300, 9999)]
    [3, 3, 2, 1, 0, 0]
    """
    return max(length - 1 - iteration // segment, 0)


def write_checkpoint(network: nn.Module, folder: Path, index: int) -> None:
    """`s_<index>.safetensors` in the network's own precision: the adapters where it has some, else all weights."""
    folder.mkdir(parents=True, exist_ok=True)
    state = adapter_state(network) or {name: value.detach() for name, value in network.state_dict().items()}
    temporary = folder / f".s_{index}.tmp"
    save_file({name: value.contiguous().cpu() for name, value in state.items()}, temporary)
    os.replace(temporary, folder / f"s_{index}.safetensors")


def read_checkpoint(network: nn.Module, folder: Path, index: int, *, adapter: str = "default") -> None:
    """Loads s_<index> in place. Raises InputError where a name or a shape does not fit."""
    path = folder / f"s_{index}.safetensors"
    try:
        state = load_file(path)
        if adapter_state(network):
            load_adapter(network, state, adapter)
        else:
            network.load_state_dict(state, strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"path: {path.name} does not fit {type(network).__name__} ({reason})") from None


class Recording(DenoisingDistiller):
    """The teacher learns to denoise what the initial generator makes; at the start of the iterations in `marks` its
    weights are written, so that a resumed run writes what it has not passed yet."""

    def __init__(self, denoiser: Denoiser, folder: Path, marks: Sequence[int], *, is_main: bool = True, **options: Any):
        super().__init__(denoiser, **options)
        self.folder, self.is_main = folder, is_main
        self.marks = {iteration: index for index, iteration in enumerate(marks, 1)}

    def loss(self, batch: dict[str, Tensor], player: str = "student") -> LossTerms:
        index = self.marks.get(self.progress.step)
        if index is not None and self.is_main:
            write_checkpoint(self.denoiser.network, self.folder, index)
        return super().loss(batch, player)


class Backtracking(Distiller):
    """The host's distiller, whose teacher is s_i of `path` until the pointer reaches the teacher."""

    def __init__(self, host: ScoreDistiller, path: Path, *, length: int, segment: int, target: str = "path"):
        super().__init__()
        self.host = host
        self.student = host.student
        self.path, self.length, self.segment, self.target = path, length, segment, target
        self._loaded: int | None = None

    @property
    def progress(self) -> Progress:
        return self.host.progress

    @progress.setter
    def progress(self, value: Progress) -> None:
        if "host" in self._modules:
            self.host.progress = value

    @property
    def indices(self) -> list[float]:
        return self.host.indices

    @property
    def meter(self) -> nn.Module:
        return self.host.meter

    def players(self) -> list[Player]:
        return self.host.players()

    def gradient_rule(self, player: str) -> GradientRule | None:
        return self.host.gradient_rule(player)

    def loss(self, batch: dict[str, Any], player: str = "generator") -> LossTerms:
        self.follow(self.progress.step)
        return self.host.loss(batch, player)

    def follow(self, iteration: int) -> None:
        """Puts the checkpoint of this iteration in the teacher's place, where it is not there already."""
        index = pointer(iteration, segment=self.segment, length=self.length)
        if self.target == "reversed" and index > 0:
            index = self.length - index
        if self.target == "teacher":
            index = 0
        if index != self._loaded:
            teacher = self.host.real_score
            if hasattr(teacher, "adapter"):  # shares the fake's weights: s_0 is the network without adapters
                teacher.adapter = "path" if index else None
            if index or not hasattr(teacher, "adapter"):
                read_checkpoint(teacher.network, self.path, index, adapter="path")
            self._loaded = index


# ---------------------------------------------------------------- hosts


class DiffInstruct(ScoreDistiller):
    """The plain gradient of the integral KL (arXiv 2305.18455), w_t a_t (score_f - score_r) with w_t = s_t^2 / a_t."""

    def weight(self, x: Tensor, mu_real: Tensor, t: Tensor) -> Tensor:
        return coefficients(self.process, t, x)[0].to(x.dtype)


class DiffInstructConfig(ScoreArgs):
    fake_updates: int = Field(1, ge=1, description="updates of the fake score for one of the generator")


def _diff_instruct(config: Any, networks: Networks) -> DiffInstruct:
    return DiffInstruct(networks, config.method_args, seed=config.seed, ema=config.train.ema)


def host_of(config: Any) -> tuple[Recipe, Any]:
    """The host's recipe, and the run config that it is given."""
    args = config.method_args
    recipe = Recipe(DiffInstructConfig, _diff_instruct) if args.host == "diff_instruct" else runs.recipe(args.host)[0]
    host_args = parse(recipe.arguments, args.host_args, source="method_args.host_args")
    values = dict(config)  # the fields as they are, validated already
    return recipe, DiffusionRun[recipe.arguments].model_construct(**{**values, "method_args": host_args})


# ---------------------------------------------------------------- stages


def stages(config: Any, context: RunContext) -> list[Stage]:
    """teacher, features, record, path (how far it leads), student."""
    args, data = config.method_args, load_data(config.data, config.seed)
    if data.mixture is not None and args.path_length:
        raise InputError("teacher.world: the exact teacher of a mixture cannot be fine-tuned; give path_length: 0")
    recipe, host_config = host_of(config)
    recipe.check(host_config, data)
    plan = runs.prepare(config, data)
    if args.path_length > args.record_iterations:
        raise InputError(
            f"method_args.path_length = {args.path_length}: more than record_iterations = {args.record_iterations}"
        )
    if args.path_length:
        plan += [
            record_stage(config, host_config, recipe, data),
            Procedure("path", measuring(host_config, recipe, data)),
        ]

    def networks(run: Any, opened: Opened, artefacts: Artefacts, data: Data) -> Networks:
        found = recipe.networks(run, opened, artefacts, data)
        if args.path_length:
            found.teacher.network.float()  # neighbours on the path differ by less than bfloat16 can hold
            read_checkpoint(found.fake.network, artefacts["path"], args.path_length)
            if hasattr(found.teacher, "adapter"):
                add_frozen_adapter(found.teacher.network, host_config.method_args.lora, "path")
                found.teacher = SharedDenoiser(found.teacher, adapter=None)
                found.fake = SharedDenoiser(found.fake, adapter="default")
        return found

    paths: dict[str, Path] = {}

    def build(run: Any, found: Networks) -> Any:
        host = recipe.build(run, found)
        if not args.path_length:
            return host
        return Backtracking(
            host, paths["path"], length=args.path_length, segment=args.segment_iterations, target=args.target
        )

    def with_path(run: Any, opened: Opened, artefacts: Artefacts, data: Data) -> Networks:
        paths.update(artefacts)
        return networks(run, opened, artefacts, data)

    student = runs.student_stage(
        host_config, data, build, sampling=recipe.sampling, batch_factor=recipe.batch_factor, networks=with_path
    )
    return [*plan, student]


def record_stage(config: Any, host_config: Any, recipe: Recipe, data: Data) -> TrainStage:
    """Gives the artefact `path`: s_0 (the teacher) .. s_N and their iterations."""
    args = config.method_args
    marks = [args.record_iterations * index // args.path_length for index in range(1, args.path_length + 1)]
    budget = config.train.model_copy(update={"steps": args.record_iterations, "epochs": None, "ema": None})
    kept: dict[str, Path] = {}

    def setup(context: RunContext) -> TrainSetup:
        opened = runs.open_teacher(config, context.artefacts, data)
        found = recipe.networks(host_config, opened, context.artefacts, data)
        kept["recording"] = context.folder / "recording"
        if context.is_main:
            write_checkpoint(found.fake.network, kept["recording"], 0)
        guided = host_config.method_args.guidance_scale != 1
        distiller = Recording(
            found.fake,
            kept["recording"],
            marks[:-1],
            is_main=context.is_main,
            data=samples_of(host_config, recipe, found),
            condition=opened.conditioner.embed,
            null=null_fields(opened) if guided else None,
            drop=args.prompt_drop if guided else 0.0,
            seed=config.seed,
        )
        return TrainSetup(distiller, runs.make_loader(config, opened, data))

    def save(network: nn.Module, folder: Path) -> None:
        for file in sorted(kept["recording"].glob("s_*.safetensors")):
            shutil.copy2(file, folder / file.name)
        write_checkpoint(network, folder, args.path_length)
        write_atomically(folder / INDEX, json.dumps({"iterations": [0, *marks]}, indent=2))

    return TrainStage("record", budget, setup, save, "path")


def samples_of(host_config: Any, recipe: Recipe, found: Networks) -> Callable[[dict[str, Tensor], Turn], Tensor]:
    """(batch, draw) -> samples of the generator as it is now, without a graph."""
    generator = found.generator.eval().requires_grad_(False)
    indices = recipe.build(host_config, dataclasses.replace(found)).indices

    def samples(batch: dict[str, Tensor], draw: Turn) -> Tensor:
        shape = (batch_size(batch), *found.space.shape)
        condition = found.conditioner.embed(batch)
        generator.to(draw.device)
        return rollout(
            generator, generator.process, indices, condition, lambda: draw.normal(shape), start=recipe.sampling.start
        )

    return samples


def null_fields(opened: Opened) -> dict[str, Tensor]:
    """The batch fields of one sample without a condition."""
    conditioner = opened.conditioner
    if hasattr(conditioner, "tokens"):
        return {name: value[0] for name, value in conditioner.tokens([""]).items()}
    return {name: value[0] for name, value in conditioner.null(1, "cpu").items()}


def measuring(host_config: Any, recipe: Recipe, data: Data, count: int = 256) -> Callable[[RunContext], Artefacts]:
    """Denoising error of every s_i on the initial generator's samples (it falls with i) and on real data (it rises),
    and how far s_N is from the teacher: mean ||mu_N - mu_0|| / ||mu_0 - x||."""

    def measure(context: RunContext) -> Artefacts:
        opened = runs.open_teacher(host_config, context.artefacts, data)
        found = recipe.networks(host_config, opened, context.artefacts, data)
        network, folder = found.fake.eval(), context.artefacts["path"]
        wanted = ev.requests(opened, data.train, count)
        condition = opened.conditioner.embed(wanted.batch)
        fake = samples_of(host_config, recipe, found)(wanted.batch, Draws(host_config.seed).at("path", 0))
        sets = {"generated": fake}
        if data.train.has_images:
            sets["real"] = opened.space.encode(data.train.read(wanted.batch["index"]))
        errors: dict[str, list[float]] = {name: [] for name in sets}
        predictions: dict[int, Tensor] = {}
        length = len(json.loads((folder / INDEX).read_text())["iterations"]) - 1
        for index in range(length + 1):
            read_checkpoint(network.network, folder, index)
            for name, x in sets.items():
                error, mu = denoising_error(network, x, condition, Draws(host_config.seed).at("path noise", 0))
                errors[name].append(error)
                if name == "generated" and index in (0, length):
                    predictions[index] = mu
        moved = (predictions[length] - predictions[0]).flatten(1).norm(dim=1)
        away = (predictions[0] - fake).flatten(1).norm(dim=1).clamp_min(1e-12)
        share = float((moved / away).mean())
        for name, values in errors.items():
            context.log(
                kind="profile",
                name=f"denoising error along the path, {name} samples",
                stage="path",
                step=0,
                x=[f"s_{index}" for index in range(length + 1)],
                values=values,
            )
        if share < 0.01:
            context.say(f"path: s_{length} is only {100 * share:.2f} % away from the teacher; record for longer")
        if context.is_main:
            record = {**json.loads((folder / INDEX).read_text()), "errors": errors, "moved": share}
            write_atomically(folder / INDEX, json.dumps(record, indent=2))
        return {}

    return measure


@torch.no_grad()
def denoising_error(denoiser: Denoiser, x: Tensor, condition: Condition, draw: Turn) -> tuple[float, Tensor]:
    """(mean squared error of the noise prediction, mu) at times spread over the table."""
    process = denoiser.process
    index = torch.linspace(0.1, 0.9, len(x)) * (process.size - 1)
    t = process.at(index.round().long())
    x_t = add_noise(process, x, draw.normal(x.shape), t)
    mu = denoiser(x_t, t, condition)
    a, s = process.levels(t)
    return float(weighted_error(expand(a / s, x).to(x.dtype) * mu, expand(a / s, x).to(x.dtype) * x)), mu


# ---------------------------------------------------------------- the method


def evaluate(config: Any, artefacts: Artefacts) -> dict[str, Any]:
    """The host's metrics, and how far the path led."""
    recipe, host_config = host_of(config)
    host = recipe if config.method_args.host == "diff_instruct" else runs.recipe(config.method_args.host)[1]
    result = dict(host.evaluate(host_config, artefacts))
    if "path" in artefacts:
        result["path/moved"] = json.loads((artefacts["path"] / INDEX).read_text())["moved"]
    return result


def predict(config: Any, artefacts: Artefacts, count: int) -> list[dict[str, Any]]:
    recipe, host_config = host_of(config)
    return recipe.predict(host_config, artefacts, count)


METHOD = Method("disback", __doc__ or "", DiffusionRun[DisBackConfig], stages, evaluate, predict)

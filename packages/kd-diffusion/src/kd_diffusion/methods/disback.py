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

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kd_diffusion import evaluation as ev
from kd_diffusion import runs
from kd_diffusion.checkpoint_path import INDEX, measuring, read_checkpoint, samples_of, write_checkpoint
from kd_diffusion.data import Data, load_data
from kd_diffusion.engine.conditions import Condition, where
from kd_diffusion.engine.denoiser import Denoiser
from kd_diffusion.engine.denoising import DenoisingDistiller
from kd_diffusion.engine.distillation import Networks, ScoreArgs, ScoreDistiller, batch_size
from kd_diffusion.engine.lora import LoRAConfig, SharedDenoiser, add_frozen_adapter
from kd_diffusion.engine.process import coefficients
from kd_diffusion.engine.rollout import Renoise
from kd_diffusion.integrations.pipelines import Opened
from kd_diffusion.integrations.routed import link_or_copy
from kd_diffusion.runs import DiffusionRun, Recipe
from kd_diffusion.snapshots import SEED
from kdcore.config import MethodConfig, parse
from kdcore.distiller import Distiller, GradientRule, LossTerms, Player, Progress
from kdcore.errors import InputError
from kdcore.method import Method
from kdcore.stages import Artefacts, Procedure, RunContext, Stage, write_atomically
from kdcore.training import TrainSetup, TrainStage


class DisBackConfig(MethodConfig):
    host: Literal["dmd2", "swiftbrush", "sid", "diff_instruct"] = Field("dmd2", description="the method that distils")
    host_args: dict[str, Any] = Field(default_factory=dict, description="method_args of the host")
    path_length: int = Field(5, ge=0, description="N, checkpoints of the recorded path; 0 is the host alone")
    record_iterations: int = Field(400, ge=1, description="iterations of the recording")
    segment_iterations: int = Field(300, ge=1, description="iterations with each checkpoint of the path")
    prompt_drop: float = Field(
        0.1, ge=0, le=1, description="share of empty conditions in the recording where the host guides"
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


class Recording(DenoisingDistiller):
    """The teacher learns to denoise what the initial generator makes; at the start of the iterations in `marks` its
    weights are written, so that a resumed run writes what it has not passed yet.

    conditioner, drop: a sample's condition is left out with probability `drop`, as the host's guidance leaves it out.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        folder: Path,
        marks: Sequence[int],
        *,
        conditioner: Any,
        drop: float = 0.0,
        is_main: bool = True,
        carried: Sequence[nn.Module] = (),
        **options: Any,
    ):
        super().__init__(denoiser, condition=self.conditional, carried=[conditioner, *carried], **options)
        self.folder, self.is_main = folder, is_main
        self.conditioner, self.drop_condition = conditioner, drop
        self.marks = {iteration: index for index, iteration in enumerate(marks, 1)}

    def loss(self, batch: dict[str, Tensor], player: str = "student") -> LossTerms:
        index = self.marks.get(self.progress.step)
        if index is not None and self.is_main:
            write_checkpoint(self.denoiser.network, self.folder, index)
        return super().loss(batch, player)

    def conditional(self, batch: dict[str, Tensor]) -> Condition:
        with torch.no_grad():
            condition = self.conditioner.embed(batch)
        if self.drop_condition == 0 or not condition:
            return condition
        count, device = batch_size(batch), next(self.denoiser.parameters()).device
        mask = self.draws.turn("drop condition", self.progress.step, device).uniform(count) < self.drop_condition
        return where(mask, self.conditioner.null(count, device), condition)


class Backtracking(Distiller):
    """The host's distiller, whose teacher is s_i of `path` until the pointer reaches the teacher. Which one follows
    from the number of the iteration, so a resumed run needs to remember nothing."""

    def __init__(self, host: ScoreDistiller, path: Path, *, length: int, segment: int, target: str = "path"):
        super().__init__()
        self.host = host
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

    @property
    def renoise(self) -> Renoise:
        return self.host.renoise

    def players(self) -> list[Player]:
        return self.host.players()

    def gradient_rule(self, player: str) -> GradientRule | None:
        return self.host.gradient_rule(player)

    def deployed(self) -> nn.Module:
        return self.host.deployed()

    def epoch_start(self) -> None:
        self.host.epoch_start()

    def epoch_end(self) -> None:
        self.host.epoch_end()

    def loss(self, batch: dict[str, Any], player: str = "generator") -> LossTerms:
        self.follow(self.progress.step)
        return self.host.loss(batch, player)

    def active(self, iteration: int) -> int:
        """Number of the checkpoint in the teacher's place."""
        index = pointer(iteration, segment=self.segment, length=self.length)
        if self.target == "teacher":
            return 0
        return self.length - index if self.target == "reversed" and index else index

    def follow(self, iteration: int) -> None:
        """Puts the checkpoint of this iteration in the teacher's place, where it is not there already."""
        index = self.active(iteration)
        if index == self._loaded:
            return
        teacher = self.host.real_score
        if isinstance(teacher, SharedDenoiser):  # shares the fake's weights: s_0 is the network without adapters
            teacher.adapter = "path" if index else None
        if index or not isinstance(teacher, SharedDenoiser):
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
    """teacher, features, record, path (how far it leads), student; without a path the host's own stages."""
    args, data = config.method_args, load_data(config.data, config.seed)
    recipe, host_config = host_of(config)
    _check(config, host_config, data)
    recipe.check(host_config, data)
    plan, paths = runs.prepare(config, data), list[Path]()
    if args.path_length:
        plan.append(record_stage(config, host_config, recipe, data))
        plan.append(Procedure("path", measuring(host_config, recipe, data)))

    def networks(run: Any, opened: Opened, artefacts: Artefacts, data: Data) -> Networks:
        found = recipe.networks(run, opened, artefacts, data)
        if args.path_length:
            paths.append(artefacts["path"])
            prepare_networks(found, artefacts["path"], args.path_length, getattr(run.method_args, "lora", None))
        return found

    def build(run: Any, found: Networks) -> Any:
        host, segment = recipe.build(run, found), args.segment_iterations
        if not args.path_length:
            return host
        return Backtracking(host, paths[-1], length=args.path_length, segment=segment, target=args.target)

    student = runs.student_stage(
        host_config,
        data,
        build,
        sampling=recipe.sampling,
        batch_factor=recipe.batch_factor,
        networks=networks,
        snapshots=Curve,
    )
    return [*plan, student]


def _check(config: Any, host_config: Any, data: Data) -> None:
    args = config.method_args
    if not args.path_length:
        return
    if data.mixture is not None:
        raise InputError("teacher.world: the exact teacher of a mixture cannot be fine-tuned; give path_length: 0")
    if args.path_length > args.record_iterations:
        raise InputError(
            f"method_args.path_length = {args.path_length}: allowed: up to record_iterations = {args.record_iterations}"
        )
    if getattr(host_config.method_args, "fake", None) == "noise":
        raise InputError("method_args.host_args.fake = 'noise': the path ends in a fake score; give lora or copy")


def prepare_networks(found: Networks, path: Path, length: int, lora: LoRAConfig | None) -> None:
    """The fake score starts as s_N, and the teacher's place can take the path's checkpoints."""
    found.teacher.network.float()  # neighbours on the path differ by less than bfloat16 can hold
    read_checkpoint(found.fake.network, path, length)
    if isinstance(found.teacher, SharedDenoiser):
        assert lora is not None
        add_frozen_adapter(found.teacher.network, lora, "path")
        found.teacher = SharedDenoiser(found.teacher, adapter=None)
        found.fake = SharedDenoiser(found.fake, adapter="default")


class Curve(runs.Snapshots):
    """Snapshots with the student's distance to the held-out data, which is what the path is to shorten."""

    samples = 500

    def __call__(self, deployed: nn.Module) -> dict[str, float]:
        super().__call__(deployed)
        features, data = self.context.artefacts.get("features"), self.data
        if features is None:
            return {}
        wanted = ev.requests(self.opened, data.held_out, min(self.samples, len(data.held_out)))
        function = self.sampler(deployed)
        pixels = ev.generate(self.opened, wanted, function, seed=SEED, batch_size=self.samples)
        return {"frechet": ev.measure(data, features, pixels, wanted)["frechet"]}


def record_stage(config: Any, host_config: Any, recipe: Recipe, data: Data) -> TrainStage:
    """Gives the artefact `path`: s_0 (the teacher) .. s_N and their iterations."""
    args, host_args = config.method_args, host_config.method_args
    marks = [args.record_iterations * index // args.path_length for index in range(1, args.path_length + 1)]
    changes = {"steps": args.record_iterations, "epochs": None, "ema": None}
    if host_args.fake_optimizer is not None:
        changes["optimizer"] = host_args.fake_optimizer
    budget = config.train.model_copy(update=changes)
    kept: dict[str, Path] = {}

    def setup(context: RunContext) -> TrainSetup:
        opened = runs.open_teacher(config, context.artefacts, data)
        found = recipe.networks(host_config, opened, context.artefacts, data)
        recording = kept["recording"] = context.folder / "recording"
        if context.is_main:
            write_checkpoint(found.fake.network, recording, 0)
        kappas = {host_args.guidance_scale, host_args.fake_guidance_scale} - {None}
        distiller = Recording(
            found.fake,
            recording,
            marks[:-1],
            is_main=context.is_main,
            conditioner=opened.conditioner,
            drop=0.0 if kappas == {1} else args.prompt_drop,
            data=samples_of(host_config, recipe, found),
            carried=[found.generator],
            seed=config.seed,
        )
        return TrainSetup(distiller, runs.make_loader(config, opened, data))

    def save(network: nn.Module, folder: Path) -> None:
        for file in sorted(kept["recording"].glob("s_*.safetensors")):
            link_or_copy(file, folder / file.name)
        write_checkpoint(network, folder, args.path_length)
        write_atomically(folder / INDEX, json.dumps({"iterations": [0, *marks]}, indent=2))

    return TrainStage("record", budget, setup, save, "path")


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


METHOD = Method("disback", __doc__ or "", DiffusionRun[DisBackConfig], stages, evaluate, predict)  # type: ignore[type-var]

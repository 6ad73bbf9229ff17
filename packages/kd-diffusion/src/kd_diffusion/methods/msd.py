"""Multi-student Diffusion Distillation for Better One-step Generators (arXiv 2410.23274, 2024).

One conditional teacher is distilled into K one-step generators. Each serves a part V_k of the conditions, of equal
size; a router picks one of them, so that latency stays that of one network. Students smaller than the teacher first
learn its score.

    TSM   mean lambda_t || mu_phi(x_t, t, c) - sg[mu_r(x_t, t, c)] ||^2 on noised real samples        (small students)
    DM    g = (mu_f,k - mu_r) / mean |x - mu_r| at x = G_k(z, c), c in V_k, + lambda_reg mean l(G_k(z), y)
    ADM   DM + lambda_G mean softplus(-D_k(x_t')), real samples from V_k
    x = G_{router(c)}(z, c)

The pairs (z, y, c) of the regression are the teacher's own and those of ALL conditions for every k: filtered ones make
students collapse. Nothing is shared between students but the teacher and the pairs: each is a run of its own, and
`only` trains some of them.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from kd_diffusion import evaluation as ev
from kd_diffusion import runs
from kd_diffusion.data import Data, Part, load_data
from kd_diffusion.engine.adversarial import GANConfig
from kd_diffusion.engine.conditions import Condition, take
from kd_diffusion.engine.denoising import DenoisingDistiller
from kd_diffusion.engine.distillation import Networks, Sample, ScoreArgs, ScoreDistiller
from kd_diffusion.engine.draws import Turn
from kd_diffusion.engine.rollout import start_noise
from kd_diffusion.integrations.pipelines import Opened, open_pipeline
from kd_diffusion.integrations.routed import Router, pooled, split_classes, split_embeddings
from kd_diffusion.pairs import Pairs, RegressionConfig, distance_of, read_pairs, write_pairs
from kd_diffusion.runs import DiffusionRun
from kdcore.config import OptimizerConfig, TrainConfig
from kdcore.distiller import LossTerms
from kdcore.errors import InputError
from kdcore.method import Method
from kdcore.stages import Artefacts, Procedure, RunContext, Stage
from kdcore.training import TrainSetup, TrainStage

Run = DiffusionRun[Any]


class MSDConfig(ScoreArgs):
    students: int = Field(4, ge=1, description="K")
    partition: Literal["consecutive", "embedding", "random"] = Field(
        "consecutive", description="of classes by their ids, of prompts by their embeddings, or at random"
    )
    only: list[int] | None = Field(None, description="train these students alone; None: all")
    student_network: dict[str, Any] = Field(
        default_factory=dict, description="arguments of the network's class that make students smaller"
    )
    tsm: TrainConfig | None = Field(None, description="teacher score matching for small students; None: random start")
    adm: TrainConfig | None = Field(None, description="budget of the adversarial stage; None: DM alone")
    gan: GANConfig | None = Field(
        default_factory=lambda: GANConfig.model_validate({"weight_generator": 3e-3, "weight_discriminator": 1e-2}),
        description="of the adversarial stage",
    )
    regression: RegressionConfig | None = Field(None, description="pairs of the DMD variant; None: the DMD2 variant")
    fake_optimizer: OptimizerConfig | None = Field(None, description="of fake scores and discriminators")

    @model_validator(mode="after")
    def _fits(self) -> MSDConfig:
        if self.steps != 1:
            raise ValueError(f"has steps = {self.steps}; students take one step")
        wrong = [k for k in self.only or [] if not 0 <= k < self.students]
        if wrong:
            raise ValueError(f"has only = {self.only}; the students are 0 to {self.students - 1}")
        if self.tsm is not None and not self.student_network:
            raise ValueError("has tsm without student_network; students of the teacher's size start from its weights")
        return self


# ---------------------------------------------------------------- one student


class MSD(ScoreDistiller):
    """DM of one student, with the regression on pairs where they are given; with `gan`, ADM."""

    def __init__(
        self,
        networks: Networks,
        args: MSDConfig,
        *,
        pairs: Pairs | None = None,
        distance: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
        **options: Any,
    ):
        super().__init__(networks, args, **options)
        self.pairs, self.distance = pairs, distance
        self.regression = args.regression

    def generator_terms(self, sample: Sample, batch: dict[str, Any], draw: Turn) -> LossTerms:
        terms = super().generator_terms(sample, batch, draw)
        if self.regression is not None and self.pairs is not None:
            terms["regression"] = (self.regression.weight, self.regression_loss(len(sample.x), draw))
        return terms

    def regression_loss(self, count: int, draw: Turn) -> Tensor:
        """mean l(G(z, c), y) over drawn pairs, in pixels."""
        pairs = self.pairs
        assert pairs is not None
        place = pairs.places.to(self.device)[draw.integers(0, len(pairs.places) - 1, count)].to(pairs.z.device)
        z, y = pairs.z[place].to(self.device), pairs.y[place].to(self.device)
        condition = {name: value.to(self.device) for name, value in take(pairs.condition, place).items()}
        t = self.process.at(torch.full((count,), self.indices[0], device=self.device))
        x = self.generator(start_noise(self.process, z, t, self.start), t, condition)
        return self.distance(self.space.decode_with_grad(x), self.space.decode(y))


# ---------------------------------------------------------------- stages


def stages(config: Run, context: RunContext) -> list[Stage]:
    """teacher, features, router, pairs (DMD variant), tsm (small students), dm-k and student-k, bundle."""
    args, data = config.method_args, load_data(config.data, config.seed)
    _check(config, data)
    plan = runs.prepare(config, data)
    plan.append(Procedure("router", _routing(config, data)))
    if args.regression is not None:
        plan.append(Procedure("pairs", _pairing(config, data)))
    if args.tsm is not None:
        plan.append(_tsm_stage(config, data))
    for k in chosen(args):
        if args.adm is None:
            plan.append(_student_stage(config, data, k, name=stage_name(args, k), gan=False))
        else:
            plan.append(_student_stage(config, data, k, name=f"dm-{k}", artefact=f"dm_{k}", gan=False))
            plan.append(_student_stage(config, data, k, name=stage_name(args, k), start=f"dm_{k}", gan=True))
    plan.append(Procedure("bundle", _bundling(config)))
    return plan


def chosen(args: MSDConfig) -> list[int]:
    """The students that this run trains."""
    return sorted(set(args.only)) if args.only is not None else list(range(args.students))


def stage_name(args: MSDConfig, k: int) -> str:
    """One student alone is the host method's run, seeds included."""
    return "student" if args.students == 1 else f"student-{k}"


def _check(config: Run, data: Data) -> None:
    args = config.method_args
    runs.check(config.model_copy(update={"method_args": args if args.adm is not None else _without_gan(args)}), data)
    if data.train.labels is None and data.train.prompts is None:
        raise InputError("data: has neither classes nor prompts to give to different students")
    if config.student.pretrained is not None and args.student_network:
        raise InputError("student.pretrained: with method_args.student_network the students are built anew")
    if args.regression is not None and args.regression.distance == "features" and not runs.uses_features(data):
        raise InputError("method_args.regression.distance = 'features': the data has no classifier; give l2 or lpips")


def _without_gan(args: MSDConfig) -> MSDConfig:
    return args.model_copy(update={"gan": None})


def make_router(config: Run, opened: Opened, data: Data) -> Router:
    """The partition of the conditions."""
    args, generator = config.method_args, np.random.default_rng([config.seed, 41])
    if hasattr(opened.conditioner, "tokens"):
        wanted = ev.requests(opened, data.train, len(data.train))
        drawn = torch.Generator().manual_seed(config.seed) if args.partition == "random" else None
        return split_embeddings(pooled(opened.conditioner.embed(wanted.batch)), args.students, drawn)
    order = generator.permutation(data.num_classes) if args.partition == "random" else None
    return split_classes(data.num_classes, args.students, order)


def _routing(config: Run, data: Data) -> Callable[[RunContext], Artefacts]:
    def run(context: RunContext) -> Artefacts:
        folder = context.folder / "router"
        if context.is_main:
            make_router(config, runs.open_teacher(config, context.artefacts, data), data).save(folder)
        context.accelerator.wait_for_everyone()
        return {"router": folder}

    return run


def _pairing(config: Run, data: Data) -> Callable[[RunContext], Artefacts]:
    """The teacher's noise-sample pairs, by its deterministic sampler."""
    args = config.method_args

    def run(context: RunContext) -> Artefacts:
        folder = context.folder / "pairs"
        if context.is_main:
            opened = runs.open_teacher(config, context.artefacts, data)
            write_pairs(folder, opened, data.train, args.regression, kappa=args.guidance_scale, seed=config.seed)
        context.accelerator.wait_for_everyone()
        return {"pairs": folder}

    return run


def _tsm_stage(config: Run, data: Data) -> TrainStage:
    """Gives the artefact `small`: a network of the students' size that has learnt the teacher's prediction."""
    args = config.method_args
    kept: dict[str, Opened] = {}

    def setup(context: RunContext) -> TrainSetup:
        opened = kept["teacher"] = runs.open_teacher(config, context.artefacts, data)
        distiller = DenoisingDistiller(
            opened.denoiser_for(small_network(opened, args)),
            condition=opened.conditioner.embed,
            teacher=opened.denoiser,
            seed=config.seed,
        )
        budget = config.model_copy(update={"train": args.tsm})
        return TrainSetup(distiller, runs.make_loader(budget, opened, data))

    return TrainStage("tsm", args.tsm, setup, lambda network, folder: network.save_pretrained(folder), "small")


def small_network(opened: Opened, args: MSDConfig) -> nn.Module:
    """A fresh network of the teacher's class with `student_network` over its config."""
    from kd_diffusion.worlds.vae import created

    network = opened.network
    known = {name: value for name, value in network.config.items() if not name.startswith("_")}
    made = created(type(network), {**known, **args.student_network}, "method_args.student_network")
    if sum(p.numel() for p in made.parameters()) >= sum(p.numel() for p in network.parameters()):
        raise InputError("method_args.student_network: the student is not smaller than the teacher")
    return made


def _student_stage(
    config: Run,
    data: Data,
    k: int,
    *,
    name: str,
    gan: bool,
    artefact: str | None = None,
    start: str | None = None,
) -> TrainStage:
    """DM, or from the artefact `start` ADM, of student k on its part of the conditions."""
    args: MSDConfig = config.method_args if gan else _without_gan(config.method_args)
    budget = args.adm if gan and args.adm is not None else config.train
    own_config = config.model_copy(update={"train": budget, "method_args": args})
    kept: dict[str, Any] = {}

    def setup(context: RunContext) -> TrainSetup:
        opened = runs.open_teacher(config, context.artefacts, data)
        runs.check_data(opened, data, own_config)
        router = Router.load(context.artefacts["router"])
        part = part_of(opened, data, router, k)
        if budget.batch_size > len(part.train):
            raise InputError(f"train.batch_size = {budget.batch_size}: student {k} has {len(part.train)} samples")
        networks = runs.make_networks(config, opened, context.artefacts, data)
        if args.student_network:
            networks.generator = opened.denoiser_for(_start_network(opened, args, context.artefacts))
        if start is not None:
            networks.generator = opened.denoiser_for(_loaded(context.artefacts[start], opened))
            fake = _loaded(context.artefacts[start] / "fake", opened, whole=False)
            networks.fake = opened.denoiser_for(fake)
        pairs = None
        if args.regression is not None:
            pairs = read_pairs(context.artefacts["pairs"])
            if args.regression.filtered:
                pairs.places = torch.nonzero(router.route(pairs.condition) == k).flatten()
        distiller = MSD(
            networks,
            args,
            pairs=pairs,
            distance=distance_of(args.regression, context.artefacts.get("features")),
            seed=config.seed,
            ema=budget.ema,
        )
        kept.update(teacher=opened, distiller=distiller)
        loader = runs.make_loader(own_config, opened, part)
        snapshots = runs.Snapshots(context, name, opened, part, distiller, distiller.start)
        return TrainSetup(distiller, loader, snapshots)

    def save(network: nn.Module, folder: Path) -> None:
        distiller, opened = kept["distiller"], kept["teacher"]
        runs.save_pipeline(own_config, opened, network, folder, distiller.indices, runs.Sampling())
        if artefact is not None:  # the adversarial stage goes on from both
            distiller.fake.network.save_pretrained(folder / "fake")

    return TrainStage(name, budget.model_copy(update={"ema": None}), setup, save, artefact or f"student_{k}")


def part_of(opened: Opened, data: Data, router: Router, k: int) -> Data:
    """The data whose conditions belong to student k."""
    parts = {name: served(opened, getattr(data, name), router, [k]) for name in ("train", "held_out")}
    return dataclasses.replace(data, **parts)


def served(opened: Opened, part: Part, router: Router, students: list[int]) -> Part:
    """The samples whose conditions these students serve."""
    if router.count == 1 or len(part) == 0:
        return part
    places = router.route(opened.conditioner.embed(ev.requests(opened, part, len(part)).batch))
    return part.subset(np.flatnonzero(torch.isin(places, torch.tensor(students)).numpy()))


def _start_network(opened: Opened, args: MSDConfig, artefacts: Artefacts) -> nn.Module:
    if "small" in artefacts:
        return runs.trainable(type(opened.network).from_pretrained(artefacts["small"], use_safetensors=True))
    return runs.trainable(small_network(opened, args))


def _loaded(folder: Path, opened: Opened, *, whole: bool = True) -> nn.Module:
    network = open_pipeline(folder).network if whole else type(opened.network).from_pretrained(folder)
    return runs.trainable(network)


def _bundling(config: Run) -> Callable[[RunContext], Artefacts]:
    """`student/`: the router and the students that are there."""

    def run(context: RunContext) -> Artefacts:
        folder = context.folder / "student"
        if context.is_main:
            shutil.copytree(context.artefacts["router"], folder, dirs_exist_ok=True)
            for k in chosen(config.method_args):
                shutil.copytree(context.artefacts[f"student_{k}"], folder / f"student_{k}", dirs_exist_ok=True)
        context.accelerator.wait_for_everyone()
        return {"student": folder}

    return run


# ---------------------------------------------------------------- evaluation


def routed_function(bundle: Path, teacher: Opened) -> ev.Generate:
    """The bundle's sampler: the noise of a batch is drawn once, each sample goes to its own student."""
    router = Router.load(bundle)
    students: dict[int, Opened] = {}

    def function(condition: Condition, draw: Any) -> Tensor:
        places, z = router.route(condition), draw.normal((draw.count, *teacher.space.shape))
        x = torch.empty_like(z)
        for k in places.unique().tolist():
            if k not in students:
                folder = bundle / f"student_{k}"
                if not folder.is_dir():
                    raise InputError(f"student {k}: not trained in this run (only = ..), so there is no evaluation")
                students[k] = open_pipeline(folder)
            own = students[k]
            mask = (places == k).to(z.device)
            t = own.process.at(torch.full((int(mask.sum()),), own.process.size - 1, device=z.device))
            with torch.no_grad():
                x[mask] = own.denoiser.eval()(start_noise(own.process, z[mask], t), t, take(condition, mask))
        return x

    return function


def evaluate(config: Run, artefacts: Artefacts) -> dict[str, Any]:
    """The shared metrics of the bundle, on the conditions that its students serve."""
    args = config.method_args
    data = load_data(config.data, config.seed)
    if args.only is not None:
        teacher, router = runs.open_teacher(config, artefacts, data), Router.load(artefacts["router"])
        data = dataclasses.replace(data, held_out=served(teacher, data.held_out, router, chosen(args)))
    result = runs.evaluate(
        config, artefacts, data=data, student=lambda teacher: routed_function(artefacts["student"], teacher)
    )
    folders = [artefacts["student"] / f"student_{k}" for k in chosen(args)]
    result["student/parameters"] = sum(p.numel() for p in open_pipeline(folders[0]).network.parameters())
    result["students"] = len(folders)
    return result


def predict(config: Run, artefacts: Artefacts, count: int) -> list[dict[str, Any]]:
    from kd_diffusion.pictures import comparison

    return comparison(config, artefacts, count, student=lambda teacher: routed_function(artefacts["student"], teacher))


METHOD = Method("msd", __doc__ or "", DiffusionRun[MSDConfig], stages, evaluate, predict)

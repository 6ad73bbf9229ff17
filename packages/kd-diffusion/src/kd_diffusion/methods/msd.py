"""Multi-student Diffusion Distillation for Better One-step Generators (arXiv 2410.23274, 2024).

One conditional teacher is distilled into K one-step generators. Each serves a part V_k of the conditions, of equal
size; a router picks one of them, so that latency stays that of one network. Students smaller than the teacher first
learn its score.

    TSM   mean lambda_t || mu_phi(x_t, t, c) - sg[mu_r(x_t, t, c)] ||^2 on noised real samples        (small students)
    DM    g = (mu_f,k - mu_r) / mean |x - mu_r| at x = G_k(z, c), c in V_k, + lambda_reg mean l(G_k(z), y)
    ADM   DM + lambda_G mean softplus(-D_k(x_t')), real samples from V_k
    x = G_{router(c)}(z, c)

The pairs (z, y, c) of the regression are the teacher's own and those of ALL conditions for every k: filtered ones make
students collapse. ADM goes on from what DM left, generator and fake score alike. Nothing is shared between students but
the teacher and the pairs: each is a run of its own, and `only` trains some of them (`router` gives runs apart the same
partition, `integrations.routed.join_bundles` puts their students together).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from kd_diffusion import evaluation as ev
from kd_diffusion import runs
from kd_diffusion.data import Data, load_data
from kd_diffusion.engine.adversarial import GANConfig
from kd_diffusion.engine.conditions import take
from kd_diffusion.engine.denoising import DenoisingDistiller
from kd_diffusion.engine.distillation import Networks, Sample, ScoreArgs, ScoreDistiller
from kd_diffusion.engine.draws import Turn
from kd_diffusion.engine.lora import add_lora
from kd_diffusion.engine.rollout import start_noise
from kd_diffusion.integrations.pipelines import Opened, open_pipeline, trainable
from kd_diffusion.integrations.routed import Router, routed_function, write_bundle
from kd_diffusion.pairs import Pairs, RegressionConfig, distance_of, drawn_pairs, write_pairs
from kd_diffusion.partition import by_prompt, class_router, part_of, prompt_router
from kd_diffusion.runs import DiffusionRun
from kdcore.config import TrainConfig
from kdcore.data import mix
from kdcore.distiller import LossTerms
from kdcore.errors import InputError
from kdcore.method import Method
from kdcore.stages import Artefacts, Procedure, RunContext, Stage
from kdcore.training import TrainSetup, TrainStage

Run = DiffusionRun[Any]
ADM_SEED = 2  # the adversarial stage sees the data in another order, and noise of its own


class MSDConfig(ScoreArgs):
    students: int = Field(4, ge=1, description="K; for prompts a power of two")
    partition: Literal["similar", "random"] = Field(
        "similar", description="classes by their ids, prompts by their embeddings; or at random"
    )
    router: str | None = Field(None, description="folder of an earlier run's router, instead of a new partition")
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

    @model_validator(mode="after")
    def _fits(self) -> MSDConfig:
        if self.steps != 1:
            raise ValueError(f"has steps = {self.steps}; students take one step")
        wrong = [k for k in self.only or [] if not 0 <= k < self.students]
        if wrong or self.only == []:
            raise ValueError(f"has only = {self.only}; the students are 0 to {self.students - 1}, and one is needed")
        if self.tsm is not None and not self.student_network:
            raise ValueError("has tsm without student_network; students of the teacher's size start from its weights")
        if self.adm is not None and self.gan is None:
            raise ValueError("has adm with gan: null; the adversarial stage needs its terms")
        return self

    @property
    def chosen(self) -> list[int]:
        """The students that the run trains."""
        return list(range(self.students)) if self.only is None else sorted(set(self.only))


# ---------------------------------------------------------------- one student


class MSD(ScoreDistiller):
    """DM of one student, with the regression where there are pairs; with `args.gan`, ADM."""

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
    for k in args.chosen:
        if args.adm is not None:
            plan.append(_student_stage(config, data, k, name=f"dm-{k}", artefact=f"dm_{k}"))
        start = None if args.adm is None else f"dm_{k}"
        plan.append(_student_stage(config, data, k, name=student_name(args, k), artefact=f"student_{k}", start=start))
    plan.append(Procedure("bundle", _bundling(config)))
    return plan


def student_name(args: MSDConfig, k: int) -> str:
    """Name of a student's last stage; one student alone is the host method's run, seeds included."""
    return "student" if args.students == 1 else f"student-{k}"


def _check(config: Run, data: Data) -> None:
    """Raises InputError for what shows before anything trains."""
    args = config.method_args
    checked = args if args.adm is not None else _without_gan(args)
    opened = runs.check(config.model_copy(update={"method_args": checked}), data)
    for field in ("pretrained", "lora"):
        if args.student_network and getattr(config.student, field) is not None:
            raise InputError(f"student.{field}: with method_args.student_network the students are built anew")
    if args.tsm is not None and not data.train.has_images:
        raise InputError("method_args.tsm: needs real samples, and the data has prompts alone; give tsm: null")
    if args.regression is not None and args.regression.distance == "features" and not runs.uses_features(config, data):
        raise InputError("method_args.regression.distance = 'features': the data has no classifier; give l2 or lpips")
    if args.router is not None and Router.load(args.router, field="method_args.router").count != args.students:
        raise InputError(f"method_args.router = '{args.router}': does not divide among {args.students} students")
    by_class = config.teacher.world is not None and config.teacher.world.name not in ("digits_text", "mixture")
    if config.teacher.world is not None and config.teacher.world.name == "mixture":
        raise InputError("teacher.world: the mixture's teacher has no condition to divide among students")
    if opened is not None:
        by_class = not by_prompt(opened)
        if args.student_network:
            small_network(opened, args)
    if by_class:
        _check_sizes(config, data, make_router(config, None, data))
    elif args.students & (args.students - 1):
        raise InputError(f"method_args.students = {args.students}: allowed for prompts: a power of two")


def _check_sizes(config: Run, data: Data, router: Router) -> None:
    """Raises InputError where a student has less than a batch of samples."""
    labels = data.train.labels
    if labels is None:
        raise InputError("data: the teacher is class-conditional and the data has no labels")
    counts, args = router.route({"class_labels": labels}).bincount(minlength=router.count), config.method_args
    budgets = {"train": config.train} if args.adm is None else {"train": config.train, "method_args.adm": args.adm}
    for field, budget in budgets.items():
        for k in args.chosen:
            if budget.batch_size > counts[k]:
                raise InputError(f"{field}.batch_size = {budget.batch_size}: student {k} has {int(counts[k])} samples")


def _without_gan(args: MSDConfig) -> MSDConfig:
    return args.model_copy(update={"gan": None})


# ---------------------------------------------------------------- the trainings


def make_router(config: Run, opened: Opened | None, data: Data, device: torch.device | str = "cpu") -> Router:
    """The partition of the conditions; of classes without `opened`."""
    args = config.method_args
    if args.router is not None:
        return Router.load(args.router, field="method_args.router")
    shuffled = args.partition == "random"
    if opened is not None and by_prompt(opened):
        return prompt_router(opened, data.train, args.students, shuffled=shuffled, seed=config.seed, device=device)
    return class_router(data.num_classes, args.students, shuffled=shuffled, seed=config.seed)


def _routing(config: Run, data: Data) -> Callable[[RunContext], Artefacts]:
    def run(context: RunContext) -> Artefacts:
        folder = context.folder / "router"
        if context.is_main:
            opened = runs.open_teacher(config, context.artefacts, data)
            make_router(config, opened, data, context.accelerator.device).save(folder)
        context.accelerator.wait_for_everyone()
        return {"router": folder}

    return run


def _pairing(config: Run, data: Data) -> Callable[[RunContext], Artefacts]:
    """The teacher's noise-sample pairs, by its deterministic sampler."""
    args = config.method_args

    def run(context: RunContext) -> Artefacts:
        folder, device = context.folder / "pairs", context.accelerator.device
        if context.is_main:
            opened = runs.open_teacher(config, context.artefacts, data)
            options = {"kappa": args.guidance_scale, "seed": config.seed, "device": device}
            write_pairs(folder, opened, data.train, args.regression, **options)
        context.accelerator.wait_for_everyone()
        return {"pairs": folder}

    return run


def _tsm_stage(config: Run, data: Data) -> TrainStage:
    """Gives the artefact `small`: a network of the students' size that has learnt the teacher's prediction."""
    args = config.method_args

    def setup(context: RunContext) -> TrainSetup:
        opened = runs.open_teacher(config, context.artefacts, data)
        distiller = DenoisingDistiller(
            opened.denoiser_for(small_network(opened, args)),
            condition=opened.conditioner.embed,
            encode=opened.space.encode,
            teacher=opened.denoiser,
            carried=(opened.conditioner, opened.space),
            seed=config.seed,
        )
        budget = config.model_copy(update={"train": args.tsm})
        return TrainSetup(distiller, runs.make_loader(budget, opened, data))

    return TrainStage("tsm", args.tsm, setup, _save_network, "small")


def _save_network(network: Any, folder: Path) -> None:
    network.save_pretrained(folder)


def small_network(opened: Opened, args: MSDConfig) -> Any:
    """A fresh network of the teacher's class with `student_network` over its config. Nothing of the teacher's weights
    is taken: names that happen to fit would hold layers of another width or place."""
    from kd_diffusion.worlds.vae import created

    network: Any = opened.network
    known = {name: value for name, value in network.config.items() if not name.startswith("_")}
    made = created(type(network), {**known, **args.student_network}, "method_args.student_network")
    sizes = [sum(p.numel() for p in module.parameters()) for module in (made, network)]
    if sizes[0] >= sizes[1]:
        raise InputError(
            f"method_args.student_network: has {sizes[0]} parameters; allowed: fewer than the teacher's {sizes[1]}"
        )
    return made


def _student_stage(
    config: Run, data: Data, k: int, *, name: str, artefact: str, start: str | None = None
) -> TrainStage:
    """DM, or from the artefact `start` ADM, of student k on its part of the conditions."""
    gan = start is not None
    args: MSDConfig = config.method_args if gan else _without_gan(config.method_args)
    budget = args.adm if gan and args.adm is not None else config.train
    seed = mix(config.seed, ADM_SEED) if gan else config.seed
    own = config.model_copy(update={"train": budget, "method_args": args, "seed": seed})
    kept: dict[str, Any] = {}

    def setup(context: RunContext) -> TrainSetup:
        opened = runs.open_teacher(config, context.artefacts, data)
        router = Router.load(context.artefacts["router"])
        part = part_of(opened, data, router, [k], context.accelerator.device)
        if budget.batch_size > len(part.train):
            raise InputError(f"train.batch_size = {budget.batch_size}: student {k} has {len(part.train)} samples")
        runs.check_data(opened, part, own)
        networks = make_networks(config, opened, context.artefacts, data, start)
        options: dict[str, Any] = {}
        if args.regression is not None and not gan:
            options["pairs"] = drawn_pairs(context.artefacts["pairs"], args.regression, router, k)
            options["distance"] = distance_of(args.regression, context.artefacts.get("features"))
        distiller = MSD(networks, args, seed=seed, ema=budget.ema, **options)
        kept.update(teacher=opened, distiller=distiller)
        snapshots = runs.Snapshots(context, name, opened, part, distiller, distiller.start)
        return TrainSetup(distiller, runs.make_loader(own, opened, part), snapshots)

    def save(network: nn.Module, folder: Path) -> None:
        distiller = kept["distiller"]
        runs.save_pipeline(own, kept["teacher"], network, folder, distiller.indices, runs.Sampling())
        if artefact.startswith("dm_"):  # the adversarial stage goes on from both
            distiller.fake.network.save_pretrained(folder / "fake")

    return TrainStage(name, budget.model_copy(update={"ema": None}), setup, save, artefact)


def make_networks(config: Run, opened: Opened, artefacts: Artefacts, data: Data, start: str | None) -> Networks:
    """As the host method's; the generator anew where it is smaller, both of what trains from `start` in ADM."""
    args, networks = config.method_args, runs.make_networks(config, opened, artefacts, data)
    own_class: Any = type(opened.network)
    if start is not None:
        fake = own_class.from_pretrained(artefacts[start] / "fake", use_safetensors=True)
        networks.fake = opened.denoiser_for(trainable(fake))
        generator = open_pipeline(artefacts[start]).network
    elif "small" in artefacts:
        generator = own_class.from_pretrained(artefacts["small"], use_safetensors=True)
    elif args.student_network:
        generator = small_network(opened, args)
    else:
        return networks
    networks.generator = opened.denoiser_for(trainable(generator))
    if config.student.lora is not None:  # ADM: on the weights that DM's adapters went into
        add_lora(networks.generator.network, config.student.lora, field="student.lora")
    return networks


def _bundling(config: Run) -> Callable[[RunContext], Artefacts]:
    """`student/`: the router and the students that are there."""

    def run(context: RunContext) -> Artefacts:
        folder = context.folder / "student"
        if context.is_main:
            students = {k: context.artefacts[f"student_{k}"] for k in config.method_args.chosen}
            write_bundle(folder, Router.load(context.artefacts["router"]), students)
        context.accelerator.wait_for_everyone()
        return {"student": folder}

    return run


# ---------------------------------------------------------------- evaluation


def evaluate(config: Run, artefacts: Artefacts) -> dict[str, Any]:
    """The shared metrics of the bundle, on the conditions that its students serve, and of each student on its own."""
    args, data, device = config.method_args, load_data(config.data, config.seed), ev.run_device()
    teacher, router = runs.open_teacher(config, artefacts, data).to(device), Router.load(artefacts["router"])
    function = routed_function(artefacts["student"], teacher)
    asked = part_of(teacher, data, router, args.chosen, device)
    result = runs.evaluate(config, artefacts, data=asked, teacher=teacher, student=lambda teacher: function)
    first = open_pipeline(artefacts[f"student_{args.chosen[0]}"])
    result["student/parameters"] = sum(p.numel() for p in first.network.parameters())
    result["students"] = len(args.chosen)
    if args.students > 1 and "features" in artefacts:
        for k in args.chosen:
            part = part_of(teacher, data, router, [k], device)
            wanted = ev.requests(teacher, part.held_out, max(1, config.evaluation.samples // len(args.chosen)))
            options = {"seed": config.seed, "batch_size": config.evaluation.batch_size}
            pixels = ev.generate(teacher, wanted, function, **options)
            metrics = ev.measure(part, artefacts["features"], pixels, wanted, seed=config.seed)
            result |= ev.prefixed(f"student_{k}", metrics)
    return result


def predict(config: Run, artefacts: Artefacts, count: int) -> list[dict[str, Any]]:
    """Some rows of each student, for conditions of its own."""
    from kd_diffusion.pictures import comparison

    args, data = config.method_args, load_data(config.data, config.seed)
    teacher, router = runs.open_teacher(config, artefacts, data), Router.load(artefacts["router"])
    function, rows = routed_function(artefacts["student"], teacher), []
    for k in args.chosen:
        asked, share = part_of(teacher, data, router, [k]), -(-count // len(args.chosen))
        options = {"data": asked, "stage": student_name(args, k)}
        rows += comparison(config, artefacts, share, student=lambda teacher: function, **options)
    return rows


METHOD = Method("msd", __doc__ or "", DiffusionRun[MSDConfig], stages, evaluate, predict)

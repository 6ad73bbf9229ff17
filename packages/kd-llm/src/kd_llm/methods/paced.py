"""PACED: Distillation and On-Policy Self-Distillation at the Frontier of Student Competence (arXiv 2603.11178, 2026).

A problem that the student always solves, or never, teaches it little: the gradients of such problems are small or
disagree with each other. So each problem counts by how often the student solves it, out of K samples of its own. With
x a problem, y_T the teacher's response, y_S a sample of the current student, p_T and p_S next-token distributions:

    p(x) = 1/K sum_k 1[verifier(y_S^(k)) correct]                                                                   (1)
    w(p) = p^a (1 - p)^b,  a = b = 1                                                                                (2)
    forward:  D(x) = 1/|y_T| sum_t KL(p_T(.|x, y_T<t) || p_S(.|x, y_T<t))                                           (3)
    reverse:  D(x) = 1/|y_S| sum_t KL(p_S(.|x, y_S<t) || p_T(.|x, y_S<t)),  y_S = sg[sample]                        (4)
    L = 1/B sum_x sg[w~(x)] D(x),  w~ = w / mean of w                                                               (5)
    SNR = ||mean_i g_i||^2 / mean_i ||g_i - mean g||^2,  g_i the gradient of D(x_i)                                 (6)

Stages: pass rates (1), forward training on the teacher's responses, pass rates again, reverse training on the student's
own fresh samples. `variant: self` needs no second model: the teacher is the initial student, shown the reference
solution (`kd_llm.engine.reference`). Nothing is differentiated through samples, weights or the teacher.

Ours, not confirmed by the paper: the normalisation of (5) over the data set, which keeps the mean weight at 1; whether
rates are measured again between the stages; the bounds of the hard filter. (6) is bell-shaped over bins of p; with
`diagnostic` a run measures it before it trains. The numbers of the equations are this file's.

The weights are a column of the data (`Weighter`, `kd_weight`), so that any objective of the package can use them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import nn

from kd_llm import evaluation as ev
from kd_llm import metrics as m
from kd_llm import runs
from kd_llm.engine.frontier import Normalisation, Scheme, Weighter, binned_snr, normalised_over_step, problem_gradients
from kd_llm.engine.objective import Batch, DivergenceArgs, TokenObjective
from kd_llm.engine.onpolicy import OnPolicy, OnPolicyConfig
from kd_llm.engine.passrate import PassRates, Sampler, with_completion
from kd_llm.engine.problems import Problems, problems_of
from kd_llm.engine.reference import ReferenceTeacher, WithReference
from kd_llm.engine.rollouts import HFRollouts, Rollout, Rollouts, SamplerName, Sampling, VLLMRollouts
from kd_llm.engine.teachers import LocalTeacher
from kd_llm.engine.verifiers import verifier
from kd_llm.integrations.stage import LMSetup, TransformersStage
from kd_llm.models import add_adapters, load_model, parameters_of
from kd_llm.runs import LLMRun, Prepared, Run
from kd_llm.warmup import WarmupConfig, base_stage
from kdcore.config import Config, MethodConfig, TrainConfig
from kdcore.data import mix
from kdcore.errors import InputError
from kdcore.method import Method
from kdcore.stages import Artefacts, Procedure, RunContext, Stage

Kind = Literal["forward", "reverse"]


class TestConfig(Config):
    """How networks are tested."""

    samples: int = Field(1, ge=1, description="responses to each test problem; accuracy is their mean")
    sampling: Sampling = Field(
        default_factory=lambda: Sampling.model_validate({"temperature": 0}), description="0: the most likely answer"
    )
    problems: int | None = Field(None, ge=1, description="test problems that are used; None: all")


class PacedConfig(MethodConfig):
    """a, b, K, the order of the stages and the sampling are the paper's; see the module for what is not confirmed."""

    variant: Literal["distill", "self"] = Field("distill", description="a teacher, or the student with the solution")
    stages: list[Kind] = Field(["forward", "reverse"], description="trainings, in order; they share the budget")
    weighting: Scheme = Field("paced", description="paced (2); unweighted; filter: low <= p <= high; inverse 1-4p(1-p)")
    a: float = Field(1.0, ge=0, description="exponent of p")
    b: float = Field(1.0, ge=0, description="exponent of 1 - p")
    low: float = Field(0.2, ge=0, le=1, description="filter: smallest pass rate")
    high: float = Field(0.8, ge=0, le=1, description="filter: largest pass rate")
    normalise: Normalisation = Field("dataset", description="mean weight 1 over the data, over a step, or not at all")
    samples: int = Field(8, ge=1, description="K, samples of the student for each pass rate")
    sampling: Sampling = Field(
        default_factory=lambda: Sampling.model_validate({}), description="of the student, for rates and for training"
    )
    teacher_sampling: Sampling = Field(
        default_factory=lambda: Sampling.model_validate({}), description="of the teacher's responses y_T"
    )
    remeasure: bool = Field(True, description="measure the rates again before the second stage")
    first_share: float = Field(0.5, gt=0, lt=1, description="share of the budget that the first of two stages gets")
    problems: int | None = Field(None, ge=1, description="training problems that are used; None: all")
    verifier: str = Field("math", description="exact, number, math, or package.module:function (response, answer)")
    reference_template: str = Field(
        "{prompt}\n\nReference solution: {reference}\n\n", description="prompt of the teacher of `variant: self`"
    )
    rollouts: SamplerName = Field("transformers", description="what samples")
    engine: dict[str, Any] = Field(default_factory=dict, description="vllm: arguments of its LLM, as in its own docs")
    diagnostic: int = Field(0, ge=0, description="problems of each of five pass-rate bins for (6); 0: not measured")
    warmup: WarmupConfig | None = Field(None, description="train the student first; None: it is trained already")
    test: TestConfig = Field(default_factory=lambda: TestConfig.model_validate({}), description="of the networks")

    @field_validator("stages")
    @classmethod
    def _one_or_two(cls, stages: list[Kind]) -> list[Kind]:
        if not 1 <= len(stages) <= 2 or len(set(stages)) != len(stages):
            raise ValueError(f"stages = {stages}: allowed: forward, reverse, or both in one of the two orders")
        return stages

    @model_validator(mode="after")
    def _fits(self) -> PacedConfig:
        if self.low > self.high:
            raise ValueError(f"low = {self.low}: must not be above high = {self.high}")
        for name in ("{prompt}", "{reference}"):
            if self.reference_template.count(name) != 1:
                raise ValueError(f"reference_template = {self.reference_template!r}: needs {name} once")
        if self.warmup is not None and self.warmup.hints and self.variant != "self":
            raise ValueError("warmup.hints: only for variant: self, whose teacher reads solutions")
        return self

    def weighter(self) -> Weighter:
        return Weighter(self.weighting, self.a, self.b, self.low, self.high, self.normalise)

    @property
    def measures(self) -> bool:
        """Whether pass rates are needed."""
        return self.weighting != "unweighted" or self.diagnostic > 0


# ---------------------------------------------------------------- the objective


class PacedObjective(TokenObjective):
    """(3) or (4) times w~, by the batch's `kd_weight`: each response's tokens are averaged first, then responses.

    kind: forward or reverse. over_step: divide the weights by their mean over each optimiser step. tokenizers:
    (student's, teacher's), where their vocabularies may have different sizes.
    """

    name = "paced"

    def __init__(self, teacher: Any, kind: Kind, *, over_step: bool = False, tokenizers: Any = None):
        super().__init__(teacher, DivergenceArgs(divergence=kind, reduction="sequence"), tokenizers=tokenizers)
        self.over_step = over_step
        self.columns = getattr(teacher, "columns", ())

    def window(self, student: nn.Module, batches: Sequence[Batch], step: int) -> Sequence[Batch]:
        if not self.over_step or "kd_weight" not in batches[0]:
            return batches
        return normalised_over_step([dict(batch) for batch in batches])


def budgets(args: PacedConfig, train: TrainConfig) -> list[TrainConfig]:
    """What each training gets of the run's steps (or epochs), at least one."""
    shares = [1.0] if len(args.stages) == 1 else [args.first_share, 1 - args.first_share]
    field = "steps" if train.steps is not None else "epochs"
    return [train.model_copy(update={field: max(1, round(share * getattr(train, field)))}) for share in shares]


# ---------------------------------------------------------------- what the stages share


@dataclass
class Setting:
    """The parts of a run that its stages share."""

    config: Run
    prepared: Prepared

    @property
    def args(self) -> PacedConfig:
        return self.config.method_args

    def problems(self, artefacts: Artefacts, split: str = "train") -> Problems:
        """Training problems, or those of another split for tests."""
        args, limit = self.args, self.args.problems if split == "train" else self.args.test.problems
        template = args.reference_template if args.variant == "self" else None
        rows, tokenizer = self.prepared.data.split(split), self.prepared.tokenizer(artefacts)
        length = self.config.data.length
        return problems_of(rows, tokenizer, length, limit=limit, seed=self.config.seed, template=template)

    def open(self, folder: Path, device: Any = None) -> Any:
        """A model of the run, without adapters."""
        student = self.config.student
        kernel = student.attn_implementation
        return load_model(folder, dtype=student.dtype, attention=kernel, field="student").to(device).eval()

    def teacher(self, artefacts: Artefacts) -> Any:
        """p_T: the teacher, or for self-distillation the student as it was at the start."""
        if self.args.variant == "self":
            return self.open(artefacts["base"])
        return runs.open_teacher(self.config, self.prepared, artefacts)

    def teacher_prompts(self, problems: Problems) -> list[torch.Tensor]:
        return problems.prompts if problems.shown is None else problems.shown

    def sampler(self, artefacts: Artefacts, context: RunContext | None = None, source: str = "base") -> Sampler:
        tokenizer = self.prepared.tokenizer(artefacts)
        rank, processes = (0, 1) if context is None else _place(context)
        return Sampler(self.rollouts(artefacts, source), tokenizer, rank, processes)

    def rollouts(self, artefacts: Artefacts, source: str) -> Rollouts:
        """`source`: the artefact that a vLLM engine starts from; its weights are the model's at every use."""
        if self.args.rollouts == "vllm":
            return VLLMRollouts(str(artefacts.get(source) or self.config.teacher.pretrained), **self.args.engine)
        return HFRollouts(self.prepared.tokenizer(artefacts))

    def responses(self, context: RunContext, problems: Problems) -> list[Rollout]:
        """y_T behind the student's prompts; made once, then from the cache."""
        artefacts = context.artefacts
        teacher = self.teacher(artefacts).to(context.accelerator.device).eval()
        sampler = self.sampler(artefacts, context, "base" if self.args.variant == "self" else "teacher")
        made = sampler.responses(
            teacher, self.teacher_prompts(problems), self.args.teacher_sampling, mix(self.config.seed, 1)
        )
        pairs = zip(problems.prompts, made, strict=True)
        return [with_completion(prompt, r.completion.tolist(), r.finished) for prompt, r in pairs]

    def objective(self, artefacts: Artefacts, kind: Kind) -> PacedObjective:
        model, tokenizer = self.teacher(artefacts), self.prepared.tokenizer(artefacts)
        over_step = self.args.normalise == "batch"
        if self.args.variant == "self":
            return PacedObjective(ReferenceTeacher(model, tokenizer.pad_token_id), kind, over_step=over_step)
        pair = runs.tokenizer_pair(self.config, tokenizer)
        return PacedObjective(LocalTeacher(model), kind, over_step=over_step, tokenizers=pair)

    def collator(self, artefacts: Artefacts) -> Any:
        collate = self.prepared.collator(artefacts)
        return WithReference(collate, collate.pad) if self.args.variant == "self" else collate


def _place(context: RunContext) -> tuple[int, int]:
    return context.accelerator.process_index, context.accelerator.num_processes


# ---------------------------------------------------------------- stages


def stages(config: Run, context: RunContext) -> list[Stage]:
    prepared = runs.prepare(config)
    setting, args = Setting(config, prepared), config.method_args
    check(config, prepared)
    teacher = [] if args.variant == "self" else runs.teacher_stage(config, prepared)
    template = args.reference_template if args.variant == "self" else None
    made: list[Stage] = [
        runs.tokenizer_stage(config, prepared),
        *teacher,
        base_stage(config, prepared, args.warmup, template),
    ]
    student, table = "base", None
    for number, (kind, train) in enumerate(zip(args.stages, budgets(args, config.train), strict=True), 1):
        if args.measures and (number == 1 or args.remeasure):
            table = f"passrate{number}"
            made.append(Procedure(table, partial(measure_rates, setting, table, student)))
        if number == 1 and args.diagnostic:
            made.append(Procedure("snr", partial(measure_snr, setting, kind)))
        name = "student" if number == len(args.stages) else kind
        build = partial(training, setting, kind, student, table)
        made.append(TransformersStage(name, train, build, artefact=name))
        student = name
    return made


def check(config: Run, prepared: Prepared) -> None:
    """What is wrong with the config beyond its fields, before anything trains."""
    args, data = config.method_args, prepared.data
    verifier(args.verifier)
    if config.task != "causal":
        raise InputError(f"task = '{config.task}': paced samples responses; allowed: causal")
    if not data.has_prompts:
        raise InputError(f"data.name = '{config.data.name}': plain text; allowed: problems with prompt and completion")
    if config.teacher.cache is not None or config.teacher.served is not None:
        raise InputError("teacher.cache, teacher.served: paced needs the teacher's weights; leave them out")
    if args.variant == "self" and config.student.cut is not None:
        raise InputError("student.cut: there is no teacher in variant: self to cut the student out of")
    if args.warmup is not None:
        args.warmup.check(data.domains, "method_args.warmup")


def measure_rates(setting: Setting, name: str, source: str, context: RunContext) -> Artefacts:
    """(1) of the student in the artefact `source`, as a table in the run's folder."""
    args, artefacts = setting.args, context.artefacts
    problems = setting.problems(artefacts)
    model = setting.open(artefacts[source], context.accelerator.device)
    table = setting.sampler(artefacts, context, source).pass_rates(
        model, problems.prompts, problems.answers, verifier(args.verifier),
        k=args.samples, sampling=args.sampling, seed=mix(setting.config.seed, 0),
    )  # fmt: skip
    found = table.summary()
    context.say(
        f"{name}: mean {found['mean']:.3f}, never solved {found['never']:.1%}, always {found['always']:.1%}, "
        f"responses cut {found['truncated']:.1%}"
    )
    path = context.folder / f"{name}.json"
    if context.is_main:
        table.save(path, sampling=args.sampling.model_dump(), source=source)
    context.accelerator.wait_for_everyone()
    return {name: path}


def training(setting: Setting, kind: Kind, source: str, table: str | None, context: RunContext) -> LMSetup:
    """One training: (5) with (3) on the teacher's responses, or with (4) on samples drawn at every step."""
    config, args, artefacts = setting.config, setting.args, context.artefacts
    problems, rates = setting.problems(artefacts), None
    if args.weighting != "unweighted":
        assert table is not None
        rates = PassRates.load(artefacts[table]).rates
        kept = args.weighter().weights(rates) > 0  # the teacher need not answer the others
        problems, rates = problems.subset(kept.nonzero().flatten().tolist()), rates[kept]
    rows = problems.rows(setting.responses(context, problems) if kind == "forward" else None)
    if rates is not None:
        rows = args.weighter().attach(rows, rates)
    student: nn.Module = setting.open(artefacts[source]).train()
    if config.student.adapters is not None:
        student = add_adapters(student, config.student.adapters, "causal", field="student.adapters")
    hook = None
    if kind == "reverse":
        mixing = OnPolicyConfig(lmbda=1.0, sampling=args.sampling)
        pad, rank = setting.prepared.tokenizer(artefacts).pad_token_id, context.accelerator.process_index
        rollouts = setting.rollouts(artefacts, source)
        hook = OnPolicy(rollouts, mixing, seed=mix(config.seed, 2), pad=pad, rank=rank)
    objective = setting.objective(artefacts, kind)
    setup = runs.make_setup(config, setting.prepared, context, student, objective, dataset=rows, window_hook=hook)
    setup.collate = setting.collator(artefacts)
    return setup


# ---------------------------------------------------------------- the diagnostic


def measure_snr(setting: Setting, kind: Kind, context: RunContext) -> Artefacts:
    """(6) in five bins of the pass rate, before training, and the share of gradient norm from p = 0 and p = 1."""
    args, artefacts, device = setting.args, context.artefacts, context.accelerator.device
    problems, rates = setting.problems(artefacts), PassRates.load(artefacts["passrate1"]).rates
    student = setting.open(artefacts["base"], device)
    if kind == "forward":
        responses = setting.responses(context, problems)
    else:
        sampler = setting.sampler(artefacts, context)
        responses = sampler.responses(student, problems.prompts, args.sampling, mix(setting.config.seed, 3))
    rows, collate = problems.rows(responses), setting.collator(artefacts)
    objective = setting.objective(artefacts, kind)
    objective.prepare(student)

    def gradients(chosen: Sequence[int]) -> Iterable[torch.Tensor]:
        batches = ({k: v.to(device) for k, v in collate([rows[i]]).items()} for i in chosen)
        return problem_gradients(student, objective, batches)

    bins, edge_share = binned_snr(rates, gradients, args.diagnostic, setting.config.seed)
    found = {name: {"ratio": s.ratio, "unbiased": s.unbiased, "norm": s.norm, "n": s.n} for name, s in bins.items()}
    path = context.folder / "snr.json"
    if context.is_main:
        path.write_text(json.dumps({"bins": found, "edge_share": edge_share}, indent=2), encoding="utf-8")
    context.accelerator.wait_for_everyone()
    return {"snr": path}


# ---------------------------------------------------------------- evaluation


def evaluate(config: Run, artefacts: Artefacts) -> dict[str, Any]:
    """Accuracy on the test problems (mean over domains) of student, base and teacher; `forgotten`, the share of the
    base's sure answers that the student misses; the pass-rate tables and the diagnostic of the run."""
    setting = Setting(config, runs.prepare(config))
    args, domains = config.method_args, setting.prepared.data.domains
    problems, device = setting.problems(artefacts, "test"), ev.run_device()
    prompts = {"student": problems.prompts, "base": problems.prompts, "teacher": setting.teacher_prompts(problems)}
    result: dict[str, Any] = {}
    rates = {}
    for name in ("base", "teacher", "student"):
        model = setting.teacher(artefacts) if name == "teacher" else setting.open(artefacts[name])
        table = setting.sampler(artefacts, source=name if name in artefacts else "base").pass_rates(
            model.to(device).eval(), prompts[name], problems.answers, verifier(args.verifier),
            k=args.test.samples, sampling=args.test.sampling, seed=mix(config.seed, 4),
        )  # fmt: skip
        rates[name] = table.rates
        result |= m.prefixed(name, table.accuracies(problems.domains, domains))
        result[f"{name}/parameters"] = parameters_of(model)
    sure = rates["base"] == 1
    if bool(sure.any()):
        result["student/forgotten"] = float(1 - rates["student"][sure].mean())
    for name in ("passrate1", "passrate2"):
        if name in artefacts:
            result |= m.prefixed(name, PassRates.load(artefacts[name]).summary())
    if "snr" in artefacts:
        found = json.loads(artefacts["snr"].read_text(encoding="utf-8"))
        result |= {f"snr/{name}": values["unbiased"] for name, values in found["bins"].items()}
        result["snr/edge_share"] = found["edge_share"]
    return result


METHOD = Method("paced", __doc__ or "", LLMRun[PacedConfig], stages, evaluate, ev.predict)

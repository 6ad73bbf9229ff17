"""DDK: Distilling Domain Knowledge for Efficient Large Language Models (arXiv 2407.16154, 2024).

A small language model goes on with pretraining beside a large one on a corpus of N domains. The share of each domain is
set anew every K optimiser steps from how far the student lags behind the teacher there, with a memory, so that it does
not jump, and a floor, so that no domain starves. With CE_i(M) the mean token cross-entropy of model M on the fixed
validation text of domain i:

    l_S[i] = exp CE_i(student),  l_T[i] = exp CE_i(teacher),  rho[i] = l_S[i] / l_T[i]                              (1)
    r_0[i] = exp rho_0[i] / sum_j exp rho_0[j]                                                                      (2)
    psi[i] = r_t[i] exp rho_{t+1}[i],   r_{t+1}[i] = alpha psi[i] / sum_j psi[j] + (1 - alpha) / N                  (3)
    L      = CE(z_S, y) + gamma T^2 KL(softmax(z_T / T) || softmax(z_S / T))                                        (4)

(1) uses perplexities, not losses: a student far behind gets nearly everything but the floor. r_0 only starts the memory
of (3): the first K steps see the corpus as it is. The teacher never changes, so its perplexities are measured once.
The paper does not say which way round its KL is: `divergence` chooses, and forward is the usual one. The numbers of the
equations are this file's.

Teacher frozen, in eval mode; all of the student trains and ships. `mixture.json` of the run has the trajectory of r.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from kd_llm import evaluation as ev
from kd_llm import metrics as m
from kd_llm.engine.mixture import DomainMixture, by_domain
from kd_llm.engine.objective import DivergenceArgs, TokenObjective
from kd_llm.engine.perplexity import perplexities
from kd_llm.engine.teachers import TeacherSource
from kd_llm.integrations.stage import LMSetup, TransformersStage
from kd_llm.models import load_model
from kd_llm.runs import (
    LLMRun,
    Networks,
    Prepared,
    Run,
    make_setup,
    open_student,
    open_teacher,
    prepare,
    supervised,
    teacher_identity,
    teacher_stage,
    tokenizer_pair,
    tokenizer_stage,
    write_cache,
)
from kdcore.config import Config, MethodConfig, TrainConfig
from kdcore.errors import InputError, did_you_mean
from kdcore.method import Method
from kdcore.stages import Artefacts, CachedStage, Procedure, RunContext, Stage, write_atomically

Batch = Mapping[str, Any]
Sampling = Literal["ddk", "fresh", "equal", "natural"]


class PretrainConfig(Config):
    """Pretraining of a student from scratch, where there is no pretrained one: the labels alone, fixed shares."""

    train: TrainConfig
    shares: dict[str, float] | None = Field(
        None, description="share of each domain, for those not named the rest in equal parts; None: the corpus as it is"
    )

    @field_validator("shares")
    @classmethod
    def _are_shares(cls, shares: dict[str, float] | None) -> dict[str, float] | None:
        if shares is not None and (min(shares.values(), default=0) < 0 or sum(shares.values()) > 1 + 1e-9):
            raise ValueError("must be >= 0 and sum to 1 at most")
        return shares


class DDKConfig(MethodConfig):
    interval: int = Field(1000, ge=1, description="K, optimiser steps between two updates of the shares; one epoch")
    alpha: float = Field(0.5, ge=0, le=1, description="weight of the discrepancy in the shares; the rest is uniform")
    gamma: float = Field(0.2, ge=0, description="weight of the divergence beside the cross-entropy")
    temperature: float = Field(1.0, gt=0, description="T of the divergence")
    divergence: Literal["forward", "reverse"] = Field("forward", description="KL(teacher || student), or the other way")
    sampling: Sampling = Field(
        "ddk", description="ddk: (3); fresh: (2) at every interval; equal: 1/N from the first update on; natural"
    )
    counts: Literal["categorical", "rounded"] = Field(
        "categorical", description="each sample's domain is drawn, or every domain gets its share, rounded"
    )
    validation_size: int = Field(500, ge=1, description="validation examples of each domain that perplexity is of")
    stop_within: float | None = Field(
        None, gt=0, lt=1, description="training ends early when every share is this near to 1/N; None: the whole budget"
    )
    pretrain: PretrainConfig | None = Field(None, description="trains the student before; None: it comes pretrained")


# ---------------------------------------------------------------- shares


def initial_shares(ratios: list[float]) -> list[float]:
    """Eq. (2): softmax of the ratios rho_0, N numbers.

    >>> [round(share, 6) for share in initial_shares([1.0, 1.5, 2.0])]
    [0.186324, 0.307196, 0.50648]
    """
    return torch.tensor(ratios, dtype=torch.float64).softmax(0).tolist()


def next_shares(shares: list[float], ratios: list[float], alpha: float = 0.5) -> list[float]:
    """Eq. (3): the shares r_{t+1} from r_t and rho_{t+1}, N numbers each, alpha in [0, 1].

    >>> [round(share, 6) for share in next_shares([0.5, 0.5], [1.0, 1.0])]
    [0.5, 0.5]
    """
    r, rho = torch.tensor(shares, dtype=torch.float64), torch.tensor(ratios, dtype=torch.float64)
    return (alpha * (r.log() + rho).softmax(0) + (1 - alpha) / len(shares)).tolist()


# ---------------------------------------------------------------- the objective


class DDK(TokenObjective):
    """Eq. (4), and at the start of each interval eqs. (1) to (3); the state of the mixture is in its checkpoints.

    Args:
        mixture: what the student trains on; its size is K optimiser steps.
        validation: domain -> batches, in the order of the mixture's domains.
        teacher_perplexity: domain -> l_T, measured beforehand.
        log: gets a record of each interval. tokenizers: (student's, teacher's), see `TokenObjective`.
    """

    name = "ddk"

    def __init__(
        self,
        teacher: TeacherSource | None,
        args: DDKConfig,
        mixture: DomainMixture,
        validation: Mapping[str, Sequence[Batch]],
        teacher_perplexity: Mapping[str, float],
        *,
        log: Callable[..., None] = lambda **record: None,
        tokenizers: tuple[Any, Any] | None = None,
    ):
        divergence = DivergenceArgs(
            divergence=args.divergence, temperature=args.temperature, soft_weight=args.gamma, hard_weight=1.0
        )
        super().__init__(teacher, divergence, tokenizers=tokenizers)
        if list(validation) != mixture.names or set(teacher_perplexity) != set(mixture.names):
            raise InputError(
                f"validation, teacher_perplexity: domains {list(validation)}, {list(teacher_perplexity)}; "
                f"allowed: those of the mixture, {mixture.names}"
            )
        self.ddk, self.mixture, self.log = args, mixture, log
        self.validation, self.teacher_perplexity = validation, teacher_perplexity
        self.shares: list[float] | None = None
        self.history: list[dict[str, Any]] = []

    def start(self, student: nn.Module, interval: int, step: int) -> bool:
        """Measures the student and sets the shares of `interval`; `step` optimiser steps are done.

        Returns whether to go on: with `stop_within`, the domains that are level again end the training (section 3.3).
        """
        found = _on_all_processes(student, self.validation)
        ratios = [found[name] / self.teacher_perplexity[name] for name in self.mixture.names]
        self.shares = self.updated(ratios)
        natural = interval == 0 or self.ddk.sampling == "natural"
        self.mixture.set_weights(self.mixture.natural if natural else self.shares)
        record = {
            "interval": interval,
            "step": step + 1,  # the first one with these shares
            "sampled": dict(zip(self.mixture.names, self.mixture.weights, strict=True)),
            "shares": dict(zip(self.mixture.names, self.shares, strict=True)),
            "ratio": dict(zip(self.mixture.names, ratios, strict=True)),
        }
        self.history.append(record)
        self.log(kind="mixture", **record)
        uneven = max(abs(share - 1 / len(ratios)) for share in self.shares)
        return interval == 0 or self.ddk.stop_within is None or uneven > self.ddk.stop_within

    def updated(self, ratios: list[float]) -> list[float]:
        """The shares after a measurement, by `sampling`."""
        if self.ddk.sampling in ("equal", "natural"):
            return [1 / len(ratios)] * len(ratios) if self.ddk.sampling == "equal" else self.mixture.natural
        if self.shares is None or self.ddk.sampling == "fresh":
            return initial_shares(ratios)
        return next_shares(self.shares, ratios, self.ddk.alpha)

    def extra_state(self) -> dict[str, Any]:
        return {"mixture": self.mixture.state_dict(), "shares": self.shares, "history": self.history}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        self.mixture.load_state_dict(state["mixture"])
        self.shares, self.history = state["shares"], list(state["history"])


def _on_all_processes(student: nn.Module, validation: Mapping[str, Sequence[Batch]]) -> dict[str, float]:
    """Perplexities, measured by all processes together; the main one's numbers count, to the last bit."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list, reduce

    state = PartialState()
    sums: Callable[[Tensor], Tensor] = lambda values: reduce(values, "sum")  # noqa: E731
    found = perplexities(student, validation, rank=state.process_index, processes=state.num_processes, reduce=sums)
    return broadcast_object_list([found])[0]


# ---------------------------------------------------------------- stages


def check(config: Run, prepared: Prepared) -> None:
    """Raises InputError for what the method cannot do, before anything trains."""
    args: DDKConfig = config.method_args
    domains = prepared.data.domains
    if config.task != "causal":
        raise InputError(f"task = '{config.task}': DDK goes on with the pretraining of decoders; allowed: 'causal'")
    if len(domains) < 2:
        raise InputError(f"data.domains: given {domains}, allowed: two or more, whose shares can change")
    if config.teacher.served is not None:
        raise InputError("teacher.served: the teacher's perplexities need its weights; give teacher.pretrained")
    if args.pretrain is not None:
        if args.pretrain.train.steps is None:
            raise InputError("method_args.pretrain.train: its data are drawn for a number of steps; give steps")
        for name in args.pretrain.shares or {}:
            if name not in domains:
                raise InputError(f"method_args.pretrain.shares: '{name}' is no domain{did_you_mean(name, domains)}")


def validation_batches(config: Run, prepared: Prepared, artefacts: Artefacts) -> dict[str, list[Batch]]:
    """V_i: the first validation examples of each domain, in batches."""
    rows = by_domain(
        prepared.tokens(artefacts).validation, prepared.data.domains, limit=config.method_args.validation_size
    )
    collate = prepared.collator(artefacts)
    return {
        name: list(m.evaluation_batches(part, collate, config.evaluation.batch_size)) for name, part in rows.items()
    }


def teacher_perplexity_stage(config: Run, prepared: Prepared) -> Stage:
    """l_T of (1), as a file: measured once for a teacher and a validation text."""

    def run(context: RunContext) -> Artefacts:
        path = context.folder / "teacher_perplexity.json"
        teacher = open_teacher(config, prepared, context.artefacts)
        assert teacher is not None  # checked
        batches = validation_batches(config, prepared, context.artefacts)
        found = _on_all_processes(teacher.to(context.accelerator.device).eval(), batches)
        if context.is_main:
            write_atomically(path, json.dumps(found))
        context.accelerator.wait_for_everyone()
        return {"teacher_perplexity": path}

    stage = Procedure("teacher_perplexity", run)
    if config.teacher.train is None and config.teacher.revision is None:
        return stage  # what a name or a folder stands for may change
    size = {"validation_size": config.method_args.validation_size, "batch_size": config.evaluation.batch_size}
    return CachedStage(stage, {**teacher_identity(config, prepared), **size})


def base_stage(config: Run, prepared: Prepared, pretrain: PretrainConfig) -> Stage:
    """Gives the artefact `base`, the student before DDK: trained on the labels with fixed shares, and cached."""

    def build(context: RunContext) -> LMSetup:
        network = open_student(config, prepared, context.artefacts)
        rows = by_domain(prepared.tokens(context.artefacts).train, prepared.data.domains)
        train = pretrain.train
        mixture = DomainMixture(rows, context.seed, size=train.steps * train.batch_size * train.accumulation)
        if pretrain.shares is not None:
            mixture.set_weights(completed(pretrain.shares, prepared.data.domains))
        mixture.draw()
        return make_setup(config, prepared, context, network, supervised(config), dataset=mixture)

    identity = {
        **teacher_identity(config, prepared),
        "student": config.student.model_dump(mode="json"),
        "pretrain": pretrain.model_dump(mode="json"),
    }
    return CachedStage(TransformersStage("base", pretrain.train, build, artefact="base"), identity)


def completed(shares: Mapping[str, float], domains: Sequence[str]) -> list[float]:
    """Shares of all domains; those not named have the rest in equal parts.

    >>> completed({"a": 0.8}, ["a", "b", "c"])
    [0.8, 0.1, 0.1]
    """
    others = [name for name in domains if name not in shares]
    rest = max(0.0, 1 - sum(shares.values()))
    found = [shares[name] if name in shares else rest / len(others) for name in domains]
    return [round(share / sum(found), 15) for share in found]


@dataclass
class DDKStage:
    """The training, one interval an epoch; leaves the trajectory of the mixture as `mixture.json` too."""

    config: Run
    prepared: Prepared
    objective: DDK | None = field(default=None, init=False)

    name = "student"

    def run(self, context: RunContext) -> Artefacts:
        artefacts = TransformersStage(self.name, self.config.train, self._setup).run(context)
        assert self.objective is not None  # built by the stage
        path = context.folder / "mixture.json"
        if context.is_main:
            write_atomically(path, json.dumps(self.objective.history, indent=1))
        context.accelerator.wait_for_everyone()
        return {**artefacts, "mixture": path}

    def _setup(self, context: RunContext) -> LMSetup:
        from kd_llm.integrations.mixture import MixtureCallback

        config, prepared, artefacts = self.config, self.prepared, context.artefacts
        args, train = config.method_args, config.train
        tokens = prepared.tokens(artefacts)
        student = (
            load_model(artefacts["base"], dtype=config.student.dtype, field="student")
            if args.pretrain is not None
            else open_student(config, prepared, artefacts)
        )
        networks = Networks(student, prepared.tokenizer(artefacts), tokens, prepared, context)
        mixture = DomainMixture(
            by_domain(tokens.train, prepared.data.domains),
            context.seed,
            size=args.interval * train.batch_size * train.accumulation,
            counts=args.counts,
        )
        self.objective = DDK(
            networks.teacher if args.gamma > 0 else None,
            args,
            mixture,
            validation_batches(config, prepared, artefacts),
            json.loads(artefacts["teacher_perplexity"].read_text(encoding="utf-8")),
            log=lambda **record: context.log(stage=self.name, **record),
            tokenizers=tokenizer_pair(config, networks.tokenizer),
        )
        callback = MixtureCallback(mixture, args.interval, self.objective.start)
        setup = make_setup(config, prepared, context, student, self.objective, dataset=mixture, callbacks=[callback])
        if train.monitor is None:
            setup.eval = None  # every interval measures the student already
        return setup


def stages(config: Run, context: RunContext) -> list[Stage]:
    prepared = prepare(config)
    check(config, prepared)
    pretrain = config.method_args.pretrain
    return [
        tokenizer_stage(config, prepared),
        *teacher_stage(config, prepared),
        teacher_perplexity_stage(config, prepared),
        *([] if pretrain is None else [base_stage(config, prepared, pretrain)]),
        DDKStage(config, prepared),
    ]


# ---------------------------------------------------------------- evaluation


def evaluate(config: Run, artefacts: Artefacts) -> dict[str, Any]:
    """The metrics of `kd_llm.evaluation`, and: `ratio/<domain>` = rho on the test text, `ratio/max`, `ratio/mean` and
    `ratio/gap` (largest less smallest); `mixture/...` as in `trajectory_metrics`."""
    result = ev.evaluate(config, artefacts)
    ratios = {
        name.removeprefix("student/perplexity/"): value / result[name.replace("student", "teacher", 1)]
        for name, value in result.items()
        if name.startswith("student/perplexity/")
    }
    result |= {f"ratio/{name}": ratio for name, ratio in ratios.items()}
    result["ratio/max"], result["ratio/mean"] = max(ratios.values()), sum(ratios.values()) / len(ratios)
    result["ratio/gap"] = max(ratios.values()) - min(ratios.values())
    return result | trajectory_metrics(json.loads(Path(artefacts["mixture"]).read_text(encoding="utf-8")))


def trajectory_metrics(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of the intervals after the first: mixture/turnover, the mean total variation of the sampled shares between two of
    them; mixture/correlation, the mean correlation over domains of share and ratio (where both vary)."""
    sampled = torch.tensor([list(record["sampled"].values()) for record in history[1:]], dtype=torch.float64)
    ratios = torch.tensor([list(record["ratio"].values()) for record in history[1:]], dtype=torch.float64)
    result: dict[str, float] = {}
    if len(sampled) > 1:
        result["mixture/turnover"] = float((sampled[1:] - sampled[:-1]).abs().sum(1).mean() / 2)
    found = [
        float(torch.corrcoef(torch.stack([share, ratio]))[0, 1])
        for share, ratio in zip(sampled, ratios, strict=True)
        if share.std() > 1e-9 and ratio.std() > 1e-9
    ]
    if found:
        result["mixture/correlation"] = sum(found) / len(found)
    return result


METHOD = Method("ddk", __doc__, LLMRun[DDKConfig], stages, evaluate, ev.predict, write_cache)

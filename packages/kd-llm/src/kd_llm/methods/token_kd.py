"""On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes (arXiv 2306.13649, 2023).

The baselines of language-model distillation in one place: what a student minimises is a divergence D between the
teacher's p and its own q at every token of a text y, and the methods differ in D and in whose text y is. With x a
prompt and L_D(y|x) = 1/|y| sum_n D( p(.|y_<n, x), q(.|y_<n, x) ):

    L_GKD = (1 - lambda) E_(x,y)~data [ L_D(y|x) ] + lambda E_x~data E_y~q(.|x) [ L_D(y|x) ]                        (1)
    D     = KL(p, q)                                            forward:  Hinton et al. 2015 at every token
          = KL(q, p)                                            reverse:  mode seeking
          = beta KL(p, m) + (1 - beta) KL(q, m),  m = beta p + (1 - beta) q          js: generalised Jensen-Shannon (2)
          = KL(p, alpha p + (1 - alpha) q), KL(q, alpha q + (1 - alpha) p)     skew, skew_reverse: arXiv 2402.03898
          = 1/2 sum |p - q|                                     total_variation: arXiv 2307.15190
    L_SFT = -E_(x,y)~data ln q(y|x)                             sft: no teacher
    L_Seq = -E_x~data ln q(y_p(x)|x),  y_p(x) by the teacher    sequence: Kim & Rush 2016, arXiv 1606.07947

No gradient goes through the sampling of y (section 3.1). lambda 0 is supervised distillation, 1 is on-policy
distillation, and a step draws for each micro-batch whether it is the student's (algorithm 1). The mean is over the
predicted tokens of the whole optimiser step; `reduction: sequence` takes it inside each text first, as (1) has it.
The numbers of the equations are this file's. What the paper adds for reinforcement learning is not here.

The hard term (weight `hard_weight`) is the cross-entropy on whatever text the row has; so `sft` and `sequence` are
soft_weight 0, hard_weight 1. Teacher frozen; the student alone trains and ships.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from kd_llm import evaluation as ev
from kd_llm import runs
from kd_llm.engine.classification import ClassificationObjective
from kd_llm.engine.objective import DivergenceArgs, Objective, TokenObjective
from kd_llm.engine.onpolicy import OnPolicy, OnPolicyConfig
from kd_llm.engine.rollouts import HFRollouts, SamplerName, Sampling, check_vllm
from kd_llm.engine.teacher_texts import read_rows, teacher_rows, write_rows
from kd_llm.runs import LLMRun, Networks, Prepared
from kdcore.config import Config, MethodConfig
from kdcore.errors import InputError
from kdcore.method import Method
from kdcore.stages import Artefacts, CachedStage, Procedure, RunContext, Stage


class SequenceConfig(Config):
    """Texts that the teacher writes once, before the student trains."""

    count: int | None = Field(None, ge=1, description="training prompts that are answered, evenly spaced; None: all")
    n: int = Field(1, ge=1, description="texts for each prompt")
    sampling: Sampling = Field(
        default_factory=lambda: Sampling.model_validate({"temperature": 0.0}),
        description="how the teacher is sampled: greedily where this is not given",
    )
    batch_size: int = Field(256, ge=1, description="texts that are written at a time")


class TokenKDConfig(DivergenceArgs, MethodConfig):
    """The defaults are the mixed setting of the paper, lambda 0.5, with the generalised Jensen-Shannon divergence."""

    divergence: Literal["forward", "reverse", "js", "skew", "skew_reverse", "total_variation"] = Field(
        "js", description="divergence between the teacher's and the student's distributions of a token"
    )
    lmbda: float = Field(0.5, ge=0, le=1, description="share of micro-batches whose text is the student's own (eq. 1)")
    sampling: Sampling = Field(
        default_factory=lambda: Sampling.model_validate({}), description="how the student writes them"
    )
    rollouts: SamplerName = Field("transformers", description="what samples from the student")
    engine: dict[str, Any] = Field(default_factory=dict, description="vllm: arguments of its LLM, as in its own docs")
    sequence: SequenceConfig | None = Field(None, description="the teacher's texts in the place of the data's")

    @model_validator(mode="after")
    def _one_author(self) -> TokenKDConfig:
        if self.soft_weight == 0 and self.hard_weight == 0:
            raise ValueError("has no loss: soft_weight and hard_weight are 0")
        if self.lmbda > 0 and self.soft_weight == 0:
            raise ValueError("lmbda > 0 needs soft_weight > 0: the student's own text teaches nothing by itself")
        return self


# ---------------------------------------------------------------- the method


def build(config: Any, networks: Networks) -> Objective:
    args: TokenKDConfig = config.method_args
    if config.task == "classification":
        teacher = networks.teacher_model if args.soft_weight else None
        weights = {"soft_weight": args.soft_weight, "hard_weight": args.hard_weight}
        return ClassificationObjective(teacher, temperature=args.temperature, **weights)
    plain = DivergenceArgs.model_validate(args.model_dump(include=set(DivergenceArgs.model_fields)))
    teacher_source = networks.teacher if args.soft_weight else None
    return TokenObjective(teacher_source, plain, tokenizers=runs.tokenizer_pair(config, networks.tokenizer))


def on_policy(networks: Networks) -> OnPolicy | None:
    """What replaces a share lambda of the micro-batches by the student's own text (eq. 1)."""
    config, tokenizer = networks.prepared.config, networks.tokenizer
    args: TokenKDConfig = config.method_args
    if args.lmbda == 0:
        return None
    prompt_tokens = None if networks.prepared.data.has_prompts else config.data.prompt_tokens
    mixing = OnPolicyConfig(lmbda=args.lmbda, sampling=args.sampling, prompt_tokens=prompt_tokens)
    rank = networks.context.accelerator.process_index
    pad = int(tokenizer.pad_token_id)  # type: ignore[arg-type]
    rollouts = runs.student_rollouts(args.rollouts, args.engine, networks)
    return OnPolicy(rollouts, mixing, seed=config.seed, pad=pad, rank=rank)


def check(config: Any, prepared: Prepared) -> None:
    """Raises InputError for settings that do not go together, before anything trains."""
    args: TokenKDConfig = config.method_args
    if args.lmbda > 0 and args.rollouts == "vllm":
        check_vllm()
        if config.task != "causal":
            raise InputError(f"method_args.rollouts = 'vllm': only for decoders; task = '{config.task}'")
    generating = [name for name, on in (("lmbda", args.lmbda > 0), ("sequence", args.sequence is not None)) if on]
    for name in generating:
        if config.task not in ("causal", "seq2seq"):
            raise InputError(f"method_args.{name}: only for models that write texts; task = '{config.task}'")
        if config.data.packing:
            raise InputError(f"method_args.{name}: the texts are written anew; set data.packing to false")
    if args.sequence is not None and config.teacher.served is not None and config.teacher.pretrained is None:
        raise InputError("method_args.sequence: a served teacher writes no texts; give teacher.pretrained")
    if config.teacher.cache is not None and generating and args.soft_weight:
        raise InputError(f"teacher.cache: it has the texts of the data alone; not with method_args.{generating[0]}")
    if config.task == "classification" and args.divergence != "forward" and args.soft_weight:
        raise InputError(f"method_args.divergence = '{args.divergence}': classifiers have 'forward' alone")


def texts_stage(config: Any, prepared: Prepared) -> Stage:
    """Gives the artefact `teacher_texts`: the training prompts with the teacher's completions."""
    args: SequenceConfig = config.method_args.sequence

    def run(context: RunContext) -> Artefacts:
        path = context.folder / "teacher_texts.jsonl"
        if context.is_main:
            teacher = runs.open_teacher(config, prepared, context.artefacts)
            assert teacher is not None  # checked
            teacher = teacher.to(context.accelerator.device).eval()
            rollouts = HFRollouts(prepared.tokenizer(context.artefacts), batch_size=args.batch_size)
            rows = list(ev.spaced(prepared.tokens(context.artefacts).train, args.count))
            context.say(f"teacher_texts: {len(rows)} prompts, {args.n} text(s) each")
            write_rows(path, teacher_rows(teacher, rollouts, rows, args.sampling, config.seed, args.n))
        context.accelerator.wait_for_everyone()
        return {"teacher_texts": path}

    stage = Procedure("teacher_texts", run)
    if config.teacher.train is None:  # a name does not tell which weights it stands for
        return stage
    identity = {"teacher": runs.teacher_identity(config, prepared), "sequence": args.model_dump(mode="json")}
    return CachedStage(stage, identity)


def stages(config: Any, context: RunContext) -> list[Stage]:
    prepared = runs.prepare(config)
    check(config, prepared)
    sequence = config.method_args.sequence is not None

    def written(networks: Networks) -> Any:
        return read_rows(Path(networks.context.artefacts["teacher_texts"]), encoder_decoder=config.task == "seq2seq")

    return [
        runs.tokenizer_stage(config, prepared),
        *runs.teacher_stage(config, prepared),
        *([texts_stage(config, prepared)] if sequence else []),
        runs.student_stage(config, prepared, build, dataset=written if sequence else None, window_hook=on_policy),
    ]


METHOD = Method("token_kd", __doc__ or "", LLMRun[TokenKDConfig], stages, ev.evaluate, ev.predict, runs.write_cache)

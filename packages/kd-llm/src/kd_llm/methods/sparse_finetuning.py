"""Sparse Finetuning for Inference Acceleration of Large Language Models (arXiv 2310.06927, 2023).

The student is the teacher itself, a dense model finetuned on the task, with most weights set to zero by a one-shot
pruner and kept there by a mask. Finetuning on the labels alone does not bring it back at high sparsity. SquareHead
does: the squared distance to the teacher's hidden states at every block, each relative to their size, so that every
block counts the same. With h^l the hidden states after block l = 1..L (the last after the final norm), A the attention
mask, U = {(b, s): A = 1} the real positions, d the width:

    MSE_l = mean over U x d of (h_S^l - h_T^l)^2,     M_l = mean over U x d of (h_T^l)^2                             (1)
    L_sq  = sum over l of MSE_l / (M_l + eps),        eps = 2^-7, the machine epsilon of bfloat16                    (2)
    L_kl  = T^2 * mean over the predicted tokens of KL( softmax(z_T / T) || softmax(z_S / T) )                       (3)
    L     = c_ce CE(z_S, y) + c_kl L_kl + c_sq L_sq                                                                  (4)
    W    <- W * mask   after each optimiser step, for every pruned W; neither gradients nor moments are masked       (5)
    dL_sq / dh_S^l = 2 (h_S^l - h_T^l) / (|U| d (M_l + eps)) on U, 0 on padding                                      (6)

The prompt counts in (2), not in (3) and the cross-entropy. The paper's runs have c = (1, 0, 1); its baselines are
(1, 1, 0), standard distillation, and (1, 0, 0). The numbers of the equations are this file's.

Pruned is every linear layer inside the transformer blocks, by SparseGPT on text of the task (`kd_llm.engine.sparse`).
Teacher frozen, in eval mode. Embeddings, norms, biases, head and what is left of the matrices train. What ships is the
student: the teacher's class with exact zeros, `masks.safetensors` and `sparsity.json` beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kd_llm import evaluation as ev
from kd_llm import metrics as m
from kd_llm.engine.blocks import Layer, block_linears, hidden_layers, hidden_of, real_positions
from kd_llm.engine.masks import MASKS, SPARSITY, MaskedWeights, Masks, load_masks, masks_of, save_masks, sparsity_report
from kd_llm.engine.objective import DivergenceArgs, StudentCall, TokenObjective
from kd_llm.engine.pruning import prune_model
from kd_llm.engine.rows import model_inputs
from kd_llm.engine.sparse import Pattern
from kd_llm.engine.teachers import LocalTeacher, TeacherSource
from kd_llm.models import load_model
from kd_llm.runs import (
    LLMRun,
    Networks,
    Prepared,
    Run,
    open_student,
    open_teacher,
    prepare,
    student_stage,
    teacher_stage,
    tokenizer_pair,
    tokenizer_stage,
    write_cache,
)
from kdcore.config import MethodConfig
from kdcore.distiller import LossTerms
from kdcore.errors import InputError
from kdcore.method import Method
from kdcore.stages import Artefacts, Procedure, RunContext, Stage, write_atomically
from kdcore.taps import FeatureTap

Batch = Mapping[str, Any]
EPS = torch.finfo(torch.bfloat16).eps  # source: train_sparse.py of the authors, whatever the training's dtype is


class SparseFinetuningConfig(MethodConfig):
    sparsity: float | str = Field(
        0.5, description="share of zeros in every pruned matrix, or an N:M pattern, in quotes in YAML: '2:4'"
    )
    pruner: Literal["sparsegpt", "magnitude", "none"] = Field(
        "sparsegpt", description="the one-shot pruner; none: the student comes with its zeros, which stay"
    )
    calibration: int = Field(128, ge=1, description="training sequences that SparseGPT is calibrated on")
    one_by_one: bool = Field(False, description="calibrate the layers inside a block one after the other")
    block: int = Field(128, ge=1, description="columns of a matrix whose mask SparseGPT chooses together")
    damping: float = Field(0.01, gt=0, description="of SparseGPT's Hessian, relative to its mean diagonal")
    c_ce: float = Field(1.0, ge=0, description="weight of the cross-entropy on the labels")
    c_kl: float = Field(0.0, ge=0, description="weight of the divergence to the teacher's outputs")
    c_sq: float = Field(1.0, ge=0, description="weight of SquareHead, a sum over the blocks")
    temperature: float = Field(1.0, gt=0, description="T of the divergence")
    normalise: bool = Field(True, description="SquareHead; False: the sum of the plain mean squared errors")

    @field_validator("sparsity")
    @classmethod
    def _is_a_pattern(cls, value: float | str) -> float | str:
        if isinstance(value, int | float) and value >= 1:
            raise ValueError("must be below 1; an N:M pattern needs quotes, as YAML reads a bare 2:4 as a number")
        Pattern.parse(value)
        return value

    @model_validator(mode="after")
    def _has_a_loss(self) -> SparseFinetuningConfig:
        if self.c_ce == self.c_kl == self.c_sq == 0:
            raise ValueError("c_ce, c_kl and c_sq are all 0: nothing to minimise")
        return self

    @property
    def pattern(self) -> Pattern:
        return Pattern.parse(self.sparsity)


# ---------------------------------------------------------------- losses


class _RelativeError(torch.autograd.Function):
    """MSE_l / (M_l + eps) of one block, eqs. (1) and (2). Keeps one tensor for the backward pass, the difference."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, real: Tensor, eps: float, normalise: bool) -> Tensor:
        padding = ~real.unsqueeze(-1)
        wide = torch.promote_types(student.dtype, torch.float32)
        difference = (student - teacher.to(student.dtype)).masked_fill(padding, 0)
        count = real.sum().to(wide).clamp(min=1) * student.shape[-1]
        size = teacher.to(wide).masked_fill(padding, 0).square().sum() / count if normalise else 1 - eps
        scale = 1 / (count * (size + eps))
        ctx.save_for_backward(difference, scale)
        return difference.to(wide).square().sum() * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        difference, scale = ctx.saved_tensors
        return difference * (2 * grad * scale).to(difference.dtype), None, None, None, None


def relative_error(
    student: Tensor, teacher: Tensor, real: Tensor, *, eps: float = EPS, normalise: bool = True
) -> Tensor:
    """One block's term of SquareHead, eqs. (1) and (2): MSE_l / (M_l + eps), a scalar in float32 or better.

    Hidden states (B, S, d), `real` (B, S) bool marks the positions that count; what the others hold, NaN included, is
    not read. No gradient reaches the teacher. normalise=False is the mean squared error itself.
    A batch without a real position gives 0. Raises InputError for shapes that differ.
    """
    if student.shape != teacher.shape or student.shape[:-1] != real.shape:
        shapes = f"{tuple(student.shape)}, {tuple(teacher.shape)}, {tuple(real.shape)}"
        raise InputError(f"student, teacher, real: shapes {shapes}; allowed: (B, S, d), (B, S, d), (B, S)")
    return _RelativeError.apply(student, teacher.detach(), real.bool(), eps, normalise)


class SquareHead:
    """L_sq of eq. (2) between a student and a teacher of one architecture, by hooks on both.

        with head.student(): run the student
        with head.teacher(batch) as terms: run the teacher, without gradient
        sum(terms)

    The student runs first: its hidden states are kept by its own backward pass anyway. Each of the teacher's becomes a
    term as soon as it exists and is dropped, so that no list of them is ever held.
    Raises InputError where the two do not have the same layers.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, *, eps: float = EPS, normalise: bool = True):
        self.layers, self.eps, self.normalise = hidden_layers(student), eps, normalise
        theirs = hidden_layers(teacher)
        if self.layers != theirs:
            raise InputError(
                f"teacher: {len(theirs)} blocks in {type(teacher).__name__}, the student has {len(self.layers)} in "
                f"{type(student).__name__}; SquareHead compares a network with its own sparse copy"
            )
        names = [layer.name for layer in self.layers]
        self.tap = FeatureTap(student, names, select=hidden_of)
        self.modules = [teacher.get_submodule(name) for name in names]

    @contextmanager
    def student(self) -> Iterator[None]:
        """Inside, the student's forward pass is read; its hidden states stay until the teacher's has run."""
        with self.tap:
            yield

    @contextmanager
    def teacher(self, batch: Batch) -> Iterator[list[Tensor]]:
        """Inside, the teacher's forward pass fills the list with MSE_l / (M_l + eps), l = 1..L."""
        terms: list[Tensor] = []
        states = self.tap.as_dict()
        self.tap.clear()
        with ExitStack() as hooks:
            for layer, module in zip(self.layers, self.modules, strict=True):

                def compare(module: nn.Module, args: Any, output: Any, layer: Layer = layer) -> None:
                    student = states.pop(layer.name)
                    with torch.enable_grad():  # the teacher runs without
                        terms.append(self._term(student, hidden_of(output), real_positions(batch, layer)))

                hooks.callback(module.register_forward_hook(compare).remove)
            yield terms

    def _term(self, student: Tensor, teacher: Tensor, real: Tensor) -> Tensor:
        return relative_error(student, teacher, real, eps=self.eps, normalise=self.normalise)


# ---------------------------------------------------------------- the objective


class SparseFinetuning(TokenObjective):
    """Eqs. (4) and (5). `masks` are by parameter name of the student, bool, True where a weight may differ from 0.

    `tokenizers` are (student's, teacher's), see `TokenObjective`.
    """

    name = "sparse_finetuning"

    def __init__(
        self, teacher: TeacherSource | None, args: SparseFinetuningConfig, masks: Masks, tokenizers: Any = None
    ):
        self.has_token_terms = args.c_ce > 0 or args.c_kl > 0
        hard = args.c_ce if self.has_token_terms else 1.0  # SquareHead alone: the token terms are left out below
        divergence = DivergenceArgs(soft_weight=args.c_kl, hard_weight=hard, temperature=args.temperature)
        super().__init__(teacher, divergence, tokenizers=tokenizers)
        if args.c_sq > 0 and not isinstance(teacher, LocalTeacher):
            raise InputError("c_sq: SquareHead needs the teacher itself, not its cached or served outputs")
        self.c_sq, self.normalise, self.masks = args.c_sq, args.normalise, masks
        self.head: SquareHead | None = None
        self.weights: MaskedWeights | None = None

    def prepare(self, student: nn.Module) -> None:
        super().prepare(student)
        self.weights = MaskedWeights(student, self.masks)
        self.weights.apply()
        if self.c_sq > 0:
            self.head = SquareHead(student, self.teacher.model, normalise=self.normalise)

    def loss(self, call: StudentCall, batch: Batch, items: Tensor | int | None) -> LossTerms:
        if self.head is None:
            return super().loss(call, batch, items)
        with self.head.student():
            rows = call.hidden_rows(batch)
        with self.head.teacher(batch) as errors:
            signal, _ = self.teacher.run(batch, rows)
        terms = LossTerms()
        if self.has_token_terms:
            terms = self.terms_to(signal if self.args.soft_weight > 0 else None, rows, batch, items)
        terms["squarehead"] = (self.c_sq, torch.stack(errors).sum() * self.share(batch, items))
        return terms

    def on_step_end(self, trainer: Any) -> None:
        self.weights.apply()


# ---------------------------------------------------------------- stages


def check(config: Run, prepared: Prepared) -> None:
    """Raises InputError for what the method cannot do, before anything trains."""
    args: SparseFinetuningConfig = config.method_args
    if config.student.adapters is not None:
        raise InputError("student.adapters: merged adapters would fill the zeros; this method trains the weights")
    if config.task == "classification":
        raise InputError("task = 'classification': this method is for language models")
    if args.c_sq > 0:
        for name in ("cache", "served"):
            if getattr(config.teacher, name) is not None:
                raise InputError(f"teacher.{name}: SquareHead needs the teacher's hidden states; leave it out")
        if config.train.compile:
            raise InputError("train.compile: SquareHead reads hidden states by hooks, which compiled code leaves out")
    if args.pruner != "none" and config.student.cut is None:
        raise InputError("student: is the teacher, pruned; give student.cut: {}, or method_args.pruner: none")


def prune_stage(config: Run, prepared: Prepared) -> Stage:
    """Gives the artefact `pruned`: the sparse student before finetuning, with its masks."""
    args: SparseFinetuningConfig = config.method_args

    def run(context: RunContext) -> Artefacts:
        folder = context.folder / "pruned"
        if context.is_main:
            student = open_student(config, prepared, context.artefacts).to(context.accelerator.device)
            masks = _pruned(student, args, prepared, context)
            student.save_pretrained(folder)
            prepared.tokenizer(context.artefacts).save_pretrained(folder)
            _record_sparsity(folder, student, masks, args)
        context.accelerator.wait_for_everyone()
        return {"pruned": folder}

    return Procedure("prune", run)


def _pruned(student: nn.Module, args: SparseFinetuningConfig, prepared: Prepared, context: RunContext) -> Masks:
    if args.pruner == "none":
        return masks_of(student, [f"{name}.weight" for name in block_linears(student)])
    rows = prepared.tokens(context.artefacts).train
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(context.seed))[: args.calibration]
    batches = m.evaluation_batches(
        rows.select(chosen.tolist()), prepared.collator(context.artefacts), prepared.config.evaluation.batch_size
    )
    return prune_model(
        student,
        list(batches),
        args.pattern,
        method=args.pruner,
        one_by_one=args.one_by_one,
        block=args.block,
        damping=args.damping,
        say=context.say,
    )


def _record_sparsity(folder: Path, student: nn.Module, masks: Masks, args: SparseFinetuningConfig) -> None:
    """The masks and `sparsity.json` beside a model."""
    save_masks(masks, folder / MASKS)
    write_atomically(folder / SPARSITY, json.dumps(sparsity_report(student, masks, args.pattern), indent=1))


@dataclass
class SparseStage:
    """The finetuning; the student's folder gets the masks too."""

    stage: Stage
    config: Run

    @property
    def name(self) -> str:
        return self.stage.name

    def run(self, context: RunContext) -> Artefacts:
        artefacts = self.stage.run(context)
        if context.is_main:
            folder = artefacts["student"]
            masks, student = load_masks(context.artefacts["pruned"] / MASKS), load_model(folder, self.config.task)
            left = MaskedWeights(student, masks).violations()
            if left:
                raise RuntimeError(f"{folder}: {left} masked weights are not zero")
            _record_sparsity(folder, student, masks, self.config.method_args)
        context.accelerator.wait_for_everyone()
        return artefacts


def build(config: Run, networks: Networks) -> SparseFinetuning:
    args: SparseFinetuningConfig = config.method_args
    needed = args.c_sq > 0 or args.c_kl > 0
    masks = load_masks(networks.context.artefacts["pruned"] / MASKS)
    return SparseFinetuning(
        networks.teacher if needed else None, args, masks, tokenizer_pair(config, networks.tokenizer)
    )


def stages(config: Run, context: RunContext) -> list[Stage]:
    prepared = prepare(config)
    check(config, prepared)

    def pruned(context: RunContext) -> nn.Module:
        return load_model(context.artefacts["pruned"], config.task, dtype=config.student.dtype, field="student")

    return [
        tokenizer_stage(config, prepared),
        *teacher_stage(config, prepared),
        prune_stage(config, prepared),
        SparseStage(student_stage(config, prepared, build, model=pruned), config),
    ]


# ---------------------------------------------------------------- evaluation


def evaluate(config: Run, artefacts: Artefacts) -> dict[str, Any]:
    """The metrics of `kd_llm.evaluation`, and: `pruned/...` of the student before finetuning; `student/sparsity`, the
    share of exact zeros in the pruned matrices; `student/relative_error/l` = MSE_l / (M_l + eps) on the test text."""
    prepared = prepare(config)
    result = ev.evaluate(config, artefacts, prepared=prepared)
    device = ev.run_device()
    before = load_model(artefacts["pruned"], config.task, field="student").to(device).eval()
    result |= m.prefixed("pruned", ev.measure(config, prepared, artefacts, before, "test"))
    student = load_model(artefacts["student"], config.task, field="student").to(device).eval()
    report = json.loads((artefacts["student"] / SPARSITY).read_text(encoding="utf-8"))
    result["student/sparsity"] = report["sparsity"]
    teacher = open_teacher(config, prepared, artefacts)
    if teacher is not None and hidden_layers(teacher) == hidden_layers(student):
        for name, model in (("pruned", before), ("student", student)):
            errors = layer_errors(config, prepared, artefacts, model, teacher.to(device).eval())
            result |= {f"{name}/relative_error/{layer + 1}": error for layer, error in enumerate(errors)}
    return result


@torch.no_grad()
def layer_errors(
    config: Run, prepared: Prepared, artefacts: Artefacts, student: nn.Module, teacher: nn.Module
) -> list[float]:
    """MSE_l / (M_l + eps) by layer, the mean over the batches of the test text."""
    head, sums, count = SquareHead(student, teacher), 0.0, 0
    device = next(student.parameters()).device
    rows = ev.spaced(prepared.tokens(artefacts).test, config.evaluation.samples)
    for batch in m.evaluation_batches(rows, prepared.collator(artefacts), config.evaluation.batch_size):
        batch = {name: value.to(device) for name, value in batch.items()}
        with head.student():
            student(**model_inputs(student, batch))
        with head.teacher(batch) as terms:
            teacher(**model_inputs(teacher, batch))
        sums, count = sums + torch.stack(terms).double().cpu(), count + 1
    return (sums / count).tolist()


METHOD = Method("sparse_finetuning", __doc__, LLMRun[SparseFinetuningConfig], stages, evaluate, ev.predict, write_cache)

"""What a student minimises, inside its own forward pass.

`DistillTrainer` replaces the student's `forward` for the duration of a call by `Objective.loss`: hooks of DDP and FSDP
fire, and a sharded head is whole where it is used. An objective asks the `StudentCall` for the rows that predict a
label (the head multiplies none but those, and inside the fused loss) or for the ordinary outputs.

    loss = sum_i w_i [ soft_weight D(p_i, q_i) + hard_weight (-ln q_i(y_i)) ]            TokenObjective

with the teacher's p and the student's q at row i, y its label, and w as in `kd_llm.engine.rows`: the mean over the
predicted tokens of the whole optimiser step, whatever the micro-batches and processes are.
Sources: forward KL: Hinton et al. 2015 (arXiv 1503.02531); the others: `kdcore.gpu.linear_divergence`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kd_llm.engine import rows as r
from kd_llm.engine.heads import Head, common_vocabulary, head_of, kept_rows, replaced_head, select, whole_head
from kd_llm.engine.teachers import DenseSignal, TeacherSource
from kd_llm.engine.token_loss import Divergence, Signal, token_terms
from kdcore.config import Config
from kdcore.distiller import LossTerms
from kdcore.errors import InputError

Batch = Mapping[str, Any]


class DivergenceArgs(Config):
    """A token-level objective: which divergence to the teacher, and how much cross-entropy on the labels."""

    divergence: Literal["forward", "reverse", "js", "skew", "skew_reverse", "total_variation"] = Field(
        "forward", description="divergence between the teacher's and the student's distributions of a token"
    )
    temperature: float = Field(1.0, gt=0, description="softens both distributions; the loss is times its square")
    beta: float = Field(0.5, gt=0, lt=1, description="mixture of js")
    alpha: float = Field(0.1, ge=0, lt=1, description="mixture of skew and skew_reverse")
    soft_weight: float = Field(1.0, ge=0, description="weight of the divergence")
    hard_weight: float = Field(0.0, ge=0, description="weight of the cross-entropy on the labels")
    topk_mode: Literal["tail", "truncated", "renormalised"] = Field(
        "tail", description="what a cached or served top-k says of the other tokens"
    )
    reduction: Literal["token", "sequence"] = Field(
        "token", description="mean over tokens, or over sequences of the mean over their tokens"
    )

    def kind(self) -> Divergence:
        """The fields that choose the divergence."""
        return Divergence(self.divergence, self.temperature, self.beta, self.alpha, self.topk_mode)


@dataclass
class HiddenRows:
    """The rows of a batch that predict a label, and the body's output.

    hidden: (N, d) what `head.weight` multiplies, or (N, V) logits where the head is not linear (`head.linear`).
    index: (N, 2) int64, their (sample, position); labels: (N,) int64; output: its logits are not to be used.
    """

    hidden: Tensor
    index: Tensor
    labels: Tensor
    output: Any
    head: Head

    def logits(self) -> Tensor:
        """(N, V) with gradient, for losses that need them."""
        return self.head.logits(self.hidden) if self.head.linear else self.hidden


@dataclass
class StudentCall:
    """What an objective may do with the student inside its forward pass."""

    model: nn.Module
    shift: bool
    forward: Callable[..., Any]

    def hidden_rows(self, batch: Batch, **inputs: Any) -> HiddenRows:
        """Runs the body once; `inputs` as output_hidden_states=True go to the model."""
        return run_body(self.model, batch, r.predicted(batch, self.shift).nonzero(), self.shift, self.forward, **inputs)

    def outputs(self, batch: Batch, **inputs: Any) -> Any:
        """The ordinary forward pass, head included; without labels, so without a loss of its own."""
        return self.forward(**r.model_inputs(self.model, batch, **inputs))


def run_body(
    model: nn.Module, batch: Batch, index: Tensor, shift: bool, forward: Callable[..., Any] | None = None, **inputs: Any
) -> HiddenRows:
    """One forward pass of a language model whose head multiplies no more than the rows `index` (N, 2)."""
    forward = forward or model.__call__
    head = head_of(model)
    labels = r.row_labels(batch, index, shift)
    inputs = r.model_inputs(model, batch, **inputs)
    if not head.linear:
        with kept_rows(head.module, index):
            output = forward(**inputs)
        return HiddenRows(output.logits.reshape(len(index), -1), index, labels, output, head)
    with replaced_head(model, head.module) as recorder:
        output = forward(**inputs)
    head = whole_head(head_of(model))  # what FSDP shards is whole after the forward pass of its root
    hidden = recorder.hidden[:, -batch["labels"].shape[1] :]  # prompt tuning puts rows of its own in front
    return HiddenRows(head.rows(select(hidden, index)), index, labels, output, head)


class Objective(nn.Module):
    """What the student minimises. Subclasses implement `loss`.

    Trainable modules of `auxiliary` (projections, f_sub) train with the student; they and the buffers of the
    objective are saved beside it in checkpoints and never shipped. A module elsewhere in the objective is a mistake.
    """

    name: str = "objective"
    columns: tuple[str, ...] = ()  # keys of a batch beyond the engine's own that this objective reads
    reduction: Literal["token", "sequence"] = "token"

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.ModuleDict()
        self.shift = True

    def prepare(self, student: nn.Module) -> None:
        """Once, before training and before DDP or FSDP wrap the student: hooks, checks. InputError on a mismatch."""
        self.shift = r.shifts_labels(student)

    def count(self, batch: Batch) -> Tensor:
        """What a batch adds to `items`, a scalar: predicted tokens (or sequences, by `reduction`), else examples."""
        return r.count(batch, self.shift, self.reduction)

    def share(self, batch: Batch, items: Tensor | int | None) -> Tensor | float:
        """This batch's part of the optimiser step: the factor that makes a mean over a batch add up over the step."""
        return 1.0 if items is None else self.count(batch) / items

    def loss(self, call: StudentCall, batch: Batch, items: Tensor | int | None) -> LossTerms:
        """The terms on one micro-batch, normalised so that they add up over an optimiser step (see `share`).

        `items` counts the whole step over all processes; None: this batch is all there is.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement loss(call, batch, items)")

    def window(self, student: nn.Module, batches: Sequence[Batch], step: int) -> Sequence[Batch]:
        """May replace the micro-batches of optimiser step `step` (counted from 0) before they are counted."""
        return batches

    def on_step_end(self, trainer: Any) -> None:
        """After each optimiser step: masks, samplers."""

    def extra_state(self) -> dict[str, Any]:
        """Tensors and plain values for checkpoints besides the state dict; the same on every process."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """The counterpart of `extra_state`."""


class TokenObjective(Objective):
    """Divergence to a teacher and cross-entropy, on the predicted tokens; see the module.

    `teacher` None: cross-entropy alone (`hard_weight` must say so). `tokenizers` are (student's, teacher's).
    """

    name = "token"

    def __init__(
        self,
        teacher: TeacherSource | None,
        args: DivergenceArgs | None = None,
        *,
        tokenizers: tuple[Any, Any] | None = None,
    ):
        super().__init__()
        self.args = args or DivergenceArgs.model_validate({} if teacher else {"soft_weight": 0, "hard_weight": 1})
        if teacher is None and self.args.soft_weight != 0:
            raise InputError("soft_weight: there is no teacher to diverge from; give one, or soft_weight 0")
        if self.args.soft_weight == 0 and self.args.hard_weight == 0:
            raise InputError("soft_weight, hard_weight: given 0 and 0, allowed: at least one above 0")
        self.teacher, self.tokenizers = teacher, tokenizers
        self.reduction = self.args.reduction
        self.vocabulary: int | None = None

    def prepare(self, student: nn.Module) -> None:
        super().prepare(student)
        head = head_of(student)
        if self.teacher is not None:
            self.teacher.prepare(student)
            size = len(head.weight) if head.linear else head_size(student)
            self.vocabulary = common_vocabulary(size, self.teacher.num_outputs, self.tokenizers)
            self.teacher.check(self.args)

    def loss(self, call: StudentCall, batch: Batch, items: Tensor | int | None) -> LossTerms:
        rows = call.hidden_rows(batch)
        return self.token_terms(rows, batch, items)

    def token_terms(self, rows: HiddenRows, batch: Batch, items: Tensor | int | None) -> LossTerms:
        """Soft and hard terms of rows that exist; for objectives that add terms of their own."""
        return self.terms_to(self.signal(rows, batch), rows, batch, items)

    def terms_to(self, signal: Signal | None, rows: HiddenRows, batch: Batch, items: Tensor | int | None) -> LossTerms:
        """The same to a signal that exists, where the teacher has run for other terms too."""
        args, items = self.args, self.count(batch) if items is None else items
        dtype = torch.float64 if rows.hidden.dtype == torch.float64 else torch.float32
        weights = r.row_weights(batch, rows.index, items, args.reduction, dtype)
        return token_terms(
            rows, signal, weights, args.kind(), args.soft_weight, args.hard_weight, vocabulary=self.vocabulary
        )

    def signal(self, rows: HiddenRows, batch: Batch) -> Signal | None:
        """What the teacher says of the rows; None where it does not count."""
        return None if self.teacher is None or self.args.soft_weight == 0 else self.teacher.signal(batch, rows)


def head_size(model: nn.Module) -> int:
    """Outputs of a head that is not linear, by its config."""
    return int(model.config.get_text_config(decoder=True).vocab_size)


__all__ = ["DenseSignal", "DivergenceArgs", "HiddenRows", "Objective", "StudentCall", "TokenObjective", "run_body"]

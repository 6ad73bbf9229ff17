"""Which rows of a batch predict a label, how much each counts, and what of a batch the model reads.

A decoder's row t predicts labels[t + 1] (labels are unshifted, as transformers has them); rows of an encoder-decoder
or of a masked model predict the label at their own position. Labels of -100 are not predicted. In packed batches
(`position_ids`) the first token of a sequence is not predicted: the row before it belongs to another sequence.

With mask m_i, example weights a_i (`kd_weight`) and the predicted tokens of the whole optimiser step over all
processes, M = sum m, the weight of a row is  w_i = m_i a_i / M  (reduction "token"), or with T_s tokens in sequence s
and S sequences in the step  w_i = m_i a_i / (T_s S)  (reduction "sequence"). Both make gradient accumulation and data
parallelism exact: micro-batches with few tokens do not count more.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kd_llm.engine.heads import base_model
from kdcore.errors import InputError

IGNORE = -100
EXTRA = ("labels", "kd_weight", "example", "domain", "spans")
"""Keys of a batch that are for objectives, never for the model."""

Batch = Mapping[str, Any]


def is_encoder_decoder(model: Any) -> bool:
    """Whether a (peft-wrapped) model reads a prompt in an encoder and writes in a decoder."""
    return bool(getattr(getattr(base_model(model), "config", None), "is_encoder_decoder", False))


def shifts_labels(model: nn.Module) -> bool:
    """Whether row t predicts label t + 1: decoders yes; encoder-decoders, masked models and classifiers no."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    base = base_model(model)
    if is_encoder_decoder(base):
        return False
    loss = LOSS_MAPPING.get(getattr(base, "loss_type", None))
    if loss is not None:
        return loss is ForCausalLMLoss
    names = {cls.__name__ for cls in type(base).__mro__}  # GPT2LMHeadModel and its like name no loss
    return bool(names & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()))


def predicted(batch: Batch, shift: bool) -> Tensor:
    """Mask of the rows that predict a label, in the shape of `labels`."""
    labels = batch["labels"]
    kept = labels != IGNORE
    if not shift:
        return kept
    mask = torch.zeros_like(kept)
    mask[:, :-1] = kept[:, 1:]
    starts = _starts(batch)
    if starts is not None:
        mask[:, :-1] &= ~starts[:, 1:]
    return mask


def row_labels(batch: Batch, index: Tensor, shift: bool) -> Tensor:
    """Labels (N,) of the rows `index` (N, 2)."""
    return batch["labels"][index[:, 0], index[:, 1] + int(shift)]


def _starts(batch: Batch) -> Tensor | None:
    """Where a packed sequence starts, (B, L)."""
    positions = batch.get("position_ids")
    return positions == 0 if positions is not None and positions.ndim == 2 else None


def segments(batch: Batch) -> Tensor:
    """A number (B, L) per sequence: rows of the batch, or in packed batches the sequences inside them."""
    labels = batch["labels"]
    rows = torch.arange(len(labels), device=labels.device).unsqueeze(1).expand_as(labels)
    starts = _starts(batch)
    return rows if starts is None else rows * (labels.shape[1] + 1) + starts.long().cumsum(1)


def count(batch: Batch, shift: bool, reduction: str = "token") -> Tensor:
    """Predicted tokens, or for reduction "sequence" the sequences that have one: a scalar int64.

    Without labels: the number of examples.
    """
    if "labels" not in batch:
        first = next(value for value in batch.values() if isinstance(value, Tensor))
        return torch.as_tensor(len(first), device=first.device)
    mask = predicted(batch, shift)
    if reduction == "token":
        return mask.sum()
    return torch.as_tensor(len(segments(batch)[mask].unique()), device=mask.device)


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place where there are several."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values


def row_weights(
    batch: Batch, index: Tensor, items: Tensor | int, reduction: str = "token", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Weights w_i (N,) of the predicting rows `index` (N, 2); see the module. `kd_weight` is (B,) or (B, L)."""
    total = torch.as_tensor(items, device=index.device).to(dtype).clamp(min=1)
    weights = torch.ones(len(index), dtype=dtype, device=index.device) / total
    if reduction == "sequence":
        _, where, tokens = segments(batch)[index[:, 0], index[:, 1]].unique(return_inverse=True, return_counts=True)
        weights = weights / tokens[where].to(dtype)
    example = batch.get("kd_weight")
    if example is not None:
        example = example.to(device=index.device, dtype=dtype)
        weights = weights * (example[index[:, 0]] if example.ndim == 1 else example[index[:, 0], index[:, 1]])
    return weights


def model_inputs(model: nn.Module, batch: Batch, **inputs: Any) -> dict[str, Any]:
    """The keys of a batch that the model's forward names, without labels; an encoder-decoder gets its decoder's ids.

    `inputs` go in as they are. Raises: InputError where an encoder-decoder has neither labels nor decoder_input_ids.
    """
    base = base_model(model)
    names = inspect.signature(type(base).forward).parameters
    kept = {key: value for key, value in batch.items() if key in names and key not in EXTRA}
    if "use_cache" in names:
        kept.setdefault("use_cache", False)
    if base.config.is_encoder_decoder and "decoder_input_ids" not in kept and "decoder_inputs_embeds" not in kept:
        if "labels" not in batch:
            raise InputError("batch: an encoder-decoder needs labels or decoder_input_ids")
        kept["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    return {**kept, **inputs}

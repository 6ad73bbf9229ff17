"""What is measured of language models: perplexity by domain, distance to the teacher, accuracy, solved problems.

Everything over the vocabulary is computed for a chunk of rows at a time, from hidden rows and head: no tensor of
(tokens, vocabulary) exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_llm.engine.rows import model_inputs, predicted, shifts_labels
from kdcore.errors import InputError

if TYPE_CHECKING:
    from kd_llm.engine.objective import HiddenRows

Batch = Mapping[str, Any]
CHUNK = 2**22
"""Entries of a chunk's logits of one model; both models' logits and their log-probabilities live at a time."""


@dataclass
class RowStatistics:
    """float32 (N,) each: -ln q(y) of the student, whether its best token is y; with a teacher KL(p || q) and whether
    both have the same best token."""

    nll: Tensor
    correct: Tensor
    kl: Tensor | None = None
    agree: Tensor | None = None


@torch.no_grad()
def row_statistics(
    student: HiddenRows, teacher: HiddenRows | None = None, *, chunk_rows: int | None = None
) -> RowStatistics:
    """Statistics of N rows that predict `student.labels`; `teacher` has the same rows of the same batch.

    KL(p || q) and agreement are over the first outputs that both vocabularies have; -ln q(y) over all of the student's.
    """
    count = len(student.labels)
    step = chunk_rows or max(1, CHUNK // max(1, _outputs(student)))
    parts: dict[str, list[Tensor]] = {name: [] for name in ("nll", "correct", "kl", "agree")}
    for start in range(0, count, step):
        part = slice(start, start + step)
        z, labels = _logits(student, part), student.labels[part]
        parts["nll"].append(F.cross_entropy(z, labels, reduction="none"))
        best = z.argmax(1)
        parts["correct"].append((best == labels).float())
        if teacher is None:
            continue
        t = _logits(teacher, part)
        shared = min(t.shape[1], z.shape[1])
        z, t = z[:, :shared], t[:, :shared]
        log_p = t.log_softmax(1)
        parts["kl"].append((log_p.exp() * (log_p - z.log_softmax(1))).sum(1))
        parts["agree"].append((z.argmax(1) == t.argmax(1)).float())
    empty = student.hidden.new_zeros(0, dtype=torch.float32)
    joined = {name: torch.cat(values) if values else empty for name, values in parts.items()}
    if teacher is None:
        return RowStatistics(joined["nll"], joined["correct"])
    return RowStatistics(**joined)


def _outputs(rows: HiddenRows) -> int:
    return len(rows.head.weight) if rows.head.linear else rows.hidden.shape[-1]


def _logits(rows: HiddenRows, part: slice) -> Tensor:
    hidden = rows.hidden[part]
    logits = rows.head.logits(hidden) if rows.head.linear else hidden
    return logits if logits.dtype == torch.float64 else logits.float()


@torch.no_grad()
def language_metrics(
    model: nn.Module, batches: Iterable[Batch], domains: Sequence[str] = (), *, teacher: nn.Module | None = None
) -> dict[str, float]:
    """Token-weighted means over the predicted tokens of all batches; the batches may lie on another device.

    perplexity = exp(mean -ln q(y)), token_accuracy, and with a teacher agreement (same best token) and
    kl_to_teacher = mean KL(p || q), nats. With several `domains` (names of the batches' `domain`) perplexity/<name>.
    Raises InputError where no token is predicted.
    """
    from kd_llm.engine.objective import run_body

    device = next(model.parameters()).device
    shift = shifts_labels(model)
    sums: dict[tuple[str, int], float] = {}
    tokens: dict[int, int] = {}
    for batch in batches:
        batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        index = predicted(batch, shift).nonzero()
        other = None if teacher is None else run_body(teacher, batch, index, shift)
        found = row_statistics(run_body(model, batch, index, shift), other)
        domain = batch["domain"][index[:, 0]] if "domain" in batch else torch.zeros(len(index), device=device)
        for number in domain.unique().tolist():
            chosen = domain == number
            tokens[number] = tokens.get(number, 0) + int(chosen.sum())
            for name, values in vars(found).items():
                if values is not None:
                    sums[name, number] = sums.get((name, number), 0.0) + float(values[chosen].double().sum())
    total = sum(tokens.values())
    if total == 0:
        raise InputError("evaluation: no token is predicted in the data")

    def mean(name: str) -> float:
        return sum(value for (key, _), value in sums.items() if key == name) / total

    result = {"perplexity": _exp(mean("nll"))}
    if len(domains) > 1:
        for number, name in enumerate(domains):
            if number in tokens:
                result[f"perplexity/{name}"] = _exp(sums["nll", number] / tokens[number])
    result["token_accuracy"] = mean("correct")
    if teacher is not None:
        result |= {"agreement": mean("agree"), "kl_to_teacher": mean("kl")}
    return result


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


# ---------------------------------------------------------------- classification


@torch.no_grad()
def class_logits(model: nn.Module, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """float32 logits (N, C) of a classifier and labels (N,), on the CPU."""
    device = next(model.parameters()).device
    logits, labels = [], []
    for batch in batches:
        inputs = {name: value.to(device) for name, value in model_inputs(model, batch).items() if hasattr(value, "to")}
        logits.append(model(**inputs).logits.float().cpu())
        labels.append(batch["labels"].cpu())
    return torch.cat(logits), torch.cat(labels)


def classification_metrics(logits: Tensor, labels: Tensor, teacher: Tensor | None = None) -> dict[str, float]:
    """accuracy, macro_f1, nll; with the teacher's logits agreement and kl_to_teacher."""
    best = logits.argmax(1)
    result = {
        "accuracy": float((best == labels).double().mean()),
        "macro_f1": macro_f1(best, labels, logits.shape[1]),
        "nll": float(F.cross_entropy(logits.double(), labels)),
    }
    if teacher is not None:
        log_p, log_q = teacher.double().log_softmax(1), logits.double().log_softmax(1)
        result["agreement"] = float((best == teacher.argmax(1)).double().mean())
        result["kl_to_teacher"] = float((log_p.exp() * (log_p - log_q)).sum(1).mean())
    return result


def macro_f1(found: Tensor, labels: Tensor, classes: int) -> float:
    """Mean F1 of the classes that are in `labels` or `found`."""
    scores = []
    for label in range(classes):
        hit = int(((found == label) & (labels == label)).sum())
        size = int((found == label).sum()) + int((labels == label).sum())
        if size:
            scores.append(2 * hit / size)
    return sum(scores) / len(scores)


# ---------------------------------------------------------------- text


def completions(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, batch_size: int = 64
) -> list[str]:
    """What the model writes after each prompt (ids), the most probable token at a time."""
    from kd_llm.engine.rollouts import HFRollouts, Sampling

    sampling = Sampling(temperature=0.0, max_new_tokens=max_new_tokens)
    made = HFRollouts(tokenizer, batch_size=batch_size).generate(
        model, [torch.tensor(ids) for ids in prompts], 1, sampling, 0
    )
    return [tokenizer.decode(r.ids[r.completion_start :], skip_special_tokens=True) for r in made]


@torch.no_grad()
def text_metrics(
    student: nn.Module,
    teacher: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    seed: int = 0,
    batch_size: int = 64,
) -> dict[str, float]:
    """What the teacher says of texts that the student draws after the prompts (ids), as means over their tokens.

    text_nll: -ln p(y), nats; text_kl: KL(q || p) between the student's q and the teacher's p. Decoders, temperature 1.
    """
    from kd_llm.engine.objective import run_body
    from kd_llm.engine.onpolicy import with_responses
    from kd_llm.engine.rollouts import HFRollouts, Sampling

    device, sampling = next(student.parameters()).device, Sampling(temperature=1.0, max_new_tokens=max_new_tokens)
    source = HFRollouts(tokenizer, batch_size=batch_size)
    made = source.generate(student, [torch.tensor(ids) for ids in prompts], 1, sampling, seed)
    nll, kl, tokens = 0.0, 0.0, 0
    for start in range(0, len(made), batch_size):
        empty = {"input_ids": torch.zeros(0, device=device)}
        batch = with_responses(empty, made[start : start + batch_size], tokenizer.pad_token_id)
        index = predicted(batch, True).nonzero()
        found = row_statistics(run_body(teacher, batch, index, True), run_body(student, batch, index, True))
        assert found.kl is not None
        nll, kl = nll + float(found.nll.double().sum()), kl + float(found.kl.double().sum())
        tokens += len(index)
    return {"text_nll": nll / tokens, "text_kl": kl / tokens}


def pass_rate(texts: Sequence[str], truths: Sequence[str]) -> float:
    """Share of the texts that are the truth, but for blanks around it."""
    return sum(text.strip() == truth.strip() for text, truth in zip(texts, truths, strict=True)) / len(truths)


def prefixed(role: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"{role}/{name}": value for name, value in metrics.items()}


# ---------------------------------------------------------------- batches for measuring


def evaluation_batches(rows: Any, collate: Any, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Batches of rows of like length, in a fixed order; the mask of a row is always the same."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    for start in range(0, len(order), batch_size):
        chosen = [dict(rows[place]) for place in order[start : start + batch_size]]
        for row in chosen:
            if "mask_seed" in row:
                row["mask_seed"] = row["example"]
        yield collate(chosen)

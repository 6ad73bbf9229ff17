"""Metrics of the saved student and of the teacher, and samples of both for the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import nn

from kd_llm import metrics as m
from kd_llm.models import load_model, parameters_of
from kdcore.config import Config

if TYPE_CHECKING:
    from kd_llm.networks import Prepared, Run
    from kdcore.stages import Artefacts


class EvaluationConfig(Config):
    """How the networks are measured on the test split (and on validation, while they train)."""

    batch_size: int = Field(32, ge=1, description="examples of a batch")
    samples: int | None = Field(None, ge=1, description="test examples that are used, evenly spaced; None: all")
    answers: int = Field(0, ge=0, description="test prompts of each domain whose greedy answer is compared: pass_rate")
    texts: int = Field(0, ge=0, description="test prompts after which networks write what the teacher judges: text_nll")
    max_new_tokens: int = Field(48, ge=1, description="most tokens of an answer, and of the report's samples")


def run_device() -> torch.device:
    """The device of the run that goes on, else the machine's accelerator, else the CPU."""
    from accelerate.state import PartialState

    if PartialState._shared_state:
        return PartialState().device
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def spaced(rows: Any, count: int | None) -> Any:
    """`count` rows of a data set, evenly spaced."""
    if count is None or count >= len(rows):
        return rows
    return rows.select([int(place * len(rows) / count) for place in range(count)])


def measure(
    config: Run, prepared: Prepared, artefacts: Artefacts, model: nn.Module, split: str, *, teacher: Any = None
) -> dict[str, float]:
    """Metrics of a model in evaluation mode on a split; `teacher` is a model, for a classifier its logits."""
    rows = spaced(prepared.tokens(artefacts).split(split), config.evaluation.samples)
    collate = prepared.collator(artefacts)
    batches = m.evaluation_batches(rows, collate, config.evaluation.batch_size)
    if config.task == "classification":
        return m.classification_metrics(*m.class_logits(model, batches), teacher)
    return m.language_metrics(model, batches, prepared.data.domains, teacher=teacher)


def evaluate(config: Run, artefacts: Artefacts, *, prepared: Prepared | None = None) -> dict[str, Any]:
    """`student/...` and `teacher/...`: see `kd_llm.metrics`, and `parameters`; a confusion matrix of classifiers."""
    from kd_llm.networks import open_teacher
    from kd_llm.runs import prepare

    prepared = prepared or prepare(config)
    device = run_device()
    student = _open_student(config, prepared, artefacts).to(device).eval()
    teacher = open_teacher(config, prepared, artefacts)
    result: dict[str, Any] = {}
    if teacher is not None:
        teacher = teacher.to(device).eval()
        result |= m.prefixed("teacher", measure(config, prepared, artefacts, teacher, "test"))
    beside: Any = teacher
    if config.task == "classification":
        rows = spaced(prepared.tokens(artefacts).test, config.evaluation.samples)
        collate = prepared.collator(artefacts)
        batches = list(m.evaluation_batches(rows, collate, config.evaluation.batch_size))
        beside = None if teacher is None else m.class_logits(teacher, batches)[0]
        logits, labels = m.class_logits(student, batches)
        result |= m.prefixed("student", m.classification_metrics(logits, labels, beside))
        result |= {"confusion_matrix": _confusion(logits, labels), "class_names": prepared.data.label_names}
    else:
        result |= m.prefixed("student", measure(config, prepared, artefacts, student, "test", teacher=beside))
    for name, model in (("student", student), ("teacher", teacher)):
        if model is None:
            continue
        result |= m.prefixed(name, answered(config, prepared, artefacts, model))
        if teacher is not None and config.evaluation.texts and config.task == "causal":
            result |= m.prefixed(name, judged(config, prepared, artefacts, model, teacher))
        result[f"{name}/parameters"] = parameters_of(model)
    return result


def _open_student(config: Run, prepared: Prepared, artefacts: Artefacts) -> Any:
    return load_model(artefacts["student"], config.task, prepared.data.num_labels or None, field="student")


def _confusion(logits: torch.Tensor, labels: torch.Tensor) -> list[list[int]]:
    """Rows: truth; columns: answer."""
    classes = logits.shape[1]
    flat = torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2)
    return flat.reshape(classes, classes).tolist()


def answered(config: Run, prepared: Prepared, artefacts: Artefacts, model: nn.Module) -> dict[str, float]:
    """pass_rate, and pass_rate/<domain> of several: greedy answers that equal the completion."""
    wanted = config.evaluation.answers
    if not wanted or config.task != "causal" or not prepared.data.has_prompts:
        return {}
    rows, tokens = prepared.data.test, prepared.tokens(artefacts).test
    places: dict[int, list[int]] = {}
    for place, domain in enumerate(rows["domain"]):
        if len(places.setdefault(domain, [])) < wanted:
            places[domain].append(place)
    chosen = [place for domain in sorted(places) for place in places[domain]]
    prompts = [tokens[place]["input_ids"][: tokens[place]["prompt_length"]] for place in chosen]
    texts = m.completions(model, prepared.tokenizer(artefacts), prompts, config.evaluation.max_new_tokens)
    truths = [rows[place]["completion"] for place in chosen]
    result = {"pass_rate": m.pass_rate(texts, truths)}
    if len(places) > 1:
        for domain in sorted(places):
            own = [index for index, place in enumerate(chosen) if place in set(places[domain])]
            rate = m.pass_rate([texts[i] for i in own], [truths[i] for i in own])
            result[f"pass_rate/{prepared.data.domains[domain]}"] = rate
    return result


def judged(config: Run, prepared: Prepared, artefacts: Artefacts, model: Any, teacher: Any) -> dict[str, float]:
    """What the teacher says of texts that a model writes after test prompts; see `kd_llm.metrics.text_metrics`."""
    rows = spaced(prepared.tokens(artefacts).test, config.evaluation.texts)
    prompts = [row["input_ids"][: row["prompt_length"]] for row in rows]
    return m.text_metrics(
        model, teacher, prepared.tokenizer(artefacts), prompts, config.evaluation.max_new_tokens, seed=config.seed
    )


# ---------------------------------------------------------------- samples for the report


def predict(
    config: Run, artefacts: Artefacts, count: int, *, prepared: Prepared | None = None
) -> list[Mapping[str, Any]]:
    """Test prompts with the true continuation, the teacher's and the student's; of classifiers, their answers."""
    from kd_llm.networks import open_teacher
    from kd_llm.runs import prepare

    prepared = prepared or prepare(config)
    device = run_device()
    models = {"student": _open_student(config, prepared, artefacts).to(device).eval()}
    teacher = open_teacher(config, prepared, artefacts)
    if teacher is not None:
        models = {"teacher": teacher.to(device).eval(), **models}
    if config.task == "classification":
        return _class_samples(config, prepared, artefacts, models, count)
    if config.task != "causal":
        return []
    tokenizer = prepared.tokenizer(artefacts)
    rows = spaced(prepared.tokens(artefacts).test, count)
    prompts = [row["input_ids"][: row["prompt_length"]] for row in rows]
    truths = [row["input_ids"][row["prompt_length"] :] for row in rows]
    written = {
        name: m.completions(model, tokenizer, prompts, config.evaluation.max_new_tokens)
        for name, model in models.items()
    }
    return [
        {
            "prompt": tokenizer.decode(prompt, skip_special_tokens=True),
            "truth": tokenizer.decode(truth[: config.evaluation.max_new_tokens], skip_special_tokens=True),
            **{name: {"text": texts[index]} for name, texts in written.items()},
        }
        for index, (prompt, truth) in enumerate(zip(prompts, truths, strict=True))
    ]


def _class_samples(
    config: Run, prepared: Prepared, artefacts: Artefacts, models: Mapping[str, nn.Module], count: int
) -> list[Mapping[str, Any]]:
    rows = spaced(prepared.tokens(artefacts).test, count)
    texts, names = spaced(prepared.data.test, count), prepared.data.label_names
    batch = prepared.collator(artefacts)([rows[place] for place in range(len(rows))])
    probabilities = {name: m.class_logits(model, [batch])[0].softmax(1) for name, model in models.items()}
    return [
        {
            "prompt": texts[place]["text"],
            "truth": names[texts[place]["label"]],
            **{
                name: {"text": names[int(p[place].argmax())], "probability": float(p[place].max())}
                for name, p in probabilities.items()
            },
        }
        for place in range(len(rows))
    ]

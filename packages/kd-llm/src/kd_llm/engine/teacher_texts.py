"""Training rows whose completions the teacher wrote (sequence-level distillation: Kim & Rush 2016, arXiv 1606.07947).

Kept as a file of JSON lines, {"input_ids": [...], "prompt_length": int, "finished": bool, "domain": int}: plain data
that a resumed run reads instead of writing it anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kd_llm.engine.rollouts import Rollout, Rollouts, Sampling
from kdcore.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100
Row = dict[str, Any]


def teacher_rows(
    teacher: nn.Module, rollouts: Rollouts, rows: Sequence[Row], sampling: Sampling, seed: int, n: int = 1
) -> list[Row]:
    """`n` rows for each row (input_ids, prompt_length, domain): its prompt with a completion of the teacher's."""
    prompts = [torch.tensor(row["input_ids"][: row["prompt_length"]]) for row in rows]
    made = rollouts.generate(teacher, prompts, n, sampling, seed)
    return [_row(rollout, rows[place // n].get("domain", 0)) for place, rollout in enumerate(made)]


def _row(rollout: Rollout, domain: int) -> Row:
    return {
        "input_ids": rollout.ids.tolist(),
        "prompt_length": rollout.completion_start,
        "finished": rollout.finished,
        "domain": domain,
    }


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes the file, which appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    os.replace(temporary, path)


def read_rows(path: Path, *, encoder_decoder: bool = False) -> Dataset:
    """The rows as training data: labels are the completion, `example` counts the rows.

    encoder_decoder: `input_ids` are the prompt alone, which the encoder reads, and `labels` the decoder's targets.
    Raises: InputError for a file that is missing or of another form.
    """
    from datasets import Dataset

    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        made = []
        for number, row in enumerate(rows):
            ids, start = row["input_ids"], row["prompt_length"]
            given = ids[:start] if encoder_decoder else ids
            labels = ids[start:] if encoder_decoder else [IGNORED] * start + ids[start:]
            text = {"input_ids": given, "labels": labels, "prompt_length": start}
            made.append({**text, "domain": row["domain"], "example": number})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a file of the teacher's texts ({type(error).__name__}: {error})") from None
    if not made:
        raise InputError(f"{path}: the teacher wrote no text")
    return Dataset.from_list(made)

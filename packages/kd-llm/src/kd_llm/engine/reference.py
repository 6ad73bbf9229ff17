"""A teacher that sees more of the problem than the student: on-policy self-distillation with a reference solution.

    p_ref(. | x, y*, y_<t)      in the place of      p_T(. | x, y_<t)

The prompts differ in length, so teacher and student are aligned on the positions of the response: the batch carries the
teacher's prompts, the response's tokens are put behind them, and the rows that predict the n-th token of a response are
the n-th on both sides. Works for responses of the data set and of the student alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd_llm.engine import rows as r
from kd_llm.engine.objective import HiddenRows, run_body
from kd_llm.engine.teachers import LocalTeacher, _dense
from kdcore.errors import InputError

PROMPT, LENGTH = "reference_ids", "reference_length"
Batch = Mapping[str, Any]


class ReferenceTeacher(LocalTeacher):
    """A `TeacherSource` whose prompts are the batch's `reference_ids` (B, R), `reference_length` (B,) of them used."""

    columns = (PROMPT, LENGTH)

    def __init__(self, model: nn.Module, pad: int):
        super().__init__(model)
        self.pad = pad

    def run(self, batch: Batch, rows: HiddenRows, **inputs: Any) -> tuple[Any, Any]:
        seen = behind_reference(batch, self.pad)
        with torch.no_grad():
            index = r.predicted(seen, True).nonzero()
            ours = rows.index[:, 0].bincount(minlength=len(seen["labels"]))
            theirs = index[:, 0].bincount(minlength=len(seen["labels"]))
            if not torch.equal(ours, theirs):
                raise InputError(
                    f"batch: {ours.tolist()} response tokens for the student, {theirs.tolist()} behind the teacher's "
                    "prompts; allowed: the same, so each row needs a prompt for both"
                )
            found = run_body(self.model, seen, index, True, **inputs)
        return _dense(found), found.output


def behind_reference(batch: Batch, pad: int) -> dict[str, Tensor]:
    """The batch with the teacher's prompts in front of its responses, padded on the right.

    Responses are the labels that are not -100. InputError where the batch has no reference prompts, or is packed.
    """
    if PROMPT not in batch or LENGTH not in batch:
        raise InputError(f"batch: no '{PROMPT}' and '{LENGTH}', the prompts of the teacher")
    if "position_ids" in batch:
        raise InputError("batch: packed (position_ids), allowed: one problem per row")
    rows = []
    for ids, length, labels in zip(batch[PROMPT], batch[LENGTH].tolist(), batch["labels"], strict=True):
        rows.append((ids[:length], labels[labels != r.IGNORE]))
    width = max(len(prompt) + len(response) for prompt, response in rows)
    ids = batch["input_ids"].new_full((len(rows), width), pad)
    labels, mask = torch.full_like(ids, r.IGNORE), torch.zeros_like(ids)
    for row, (prompt, response) in enumerate(rows):
        start, end = len(prompt), len(prompt) + len(response)
        ids[row, :start], ids[row, start:end] = prompt, response
        labels[row, start:end], mask[row, :end] = response, 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class WithReference:
    """A collator that adds the teacher's prompts, from the rows' `reference_ids` (lists of tokens)."""

    def __init__(self, collate: Any, pad: int):
        self.collate, self.pad = collate, pad

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        prompts = [row[PROMPT] for row in rows]
        width = max(map(len, prompts))
        padded = torch.tensor([[*prompt, *[self.pad] * (width - len(prompt))] for prompt in prompts])
        return {**self.collate(rows), PROMPT: padded, LENGTH: torch.tensor([len(prompt) for prompt in prompts])}


def with_reference(prompt: Any, reference: str, template: str) -> Any:
    """A prompt (text, or the messages of a chat) that also shows the reference solution.

    `template` has {prompt} and {reference}; of a chat the last message is filled in.

    >>> with_reference("2+3=", "5", "{reference};{prompt}")
    '5;2+3='
    """
    for name in ("{prompt}", "{reference}"):
        if template.count(name) != 1:
            raise InputError(f"reference_template = {template!r}: allowed: a text with {name} once")
    if isinstance(prompt, str):
        before, after = template.split("{prompt}")
        return before.replace("{reference}", reference) + prompt + after.replace("{reference}", reference)
    return [*prompt[:-1], {**prompt[-1], "content": with_reference(prompt[-1]["content"], reference, template)}]

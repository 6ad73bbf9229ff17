"""Prompts with the true answer, the teacher's and the student's text, as a list."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kdcore.report.text import esc


def texts(items: Sequence[Mapping[str, Any]]) -> str:
    """The list as HTML. An item has `prompt` and `truth`, and for `student` (and `teacher`) {"text": str} with an
    optional "probability". Raises KeyError or ValueError on an item of another form."""
    return f'<ul class="samples texts">{"".join(map(_figure, items))}</ul>'


def _figure(item: Mapping[str, Any]) -> str:
    rows = [("prompt", str(item["prompt"]), None), ("truth", str(item["truth"]), None)]
    for role in ("teacher", "student"):
        answer = item["student"] if role == "student" else item.get("teacher")
        if answer is not None:
            rows.append((role, str(answer["text"]), answer.get("probability")))
    return f'<li class="sample"><dl>{"".join(_row(*row) for row in rows)}</dl></li>'


def _row(role: str, text: str, probability: float | None) -> str:
    chance = ""
    if probability is not None and math.isfinite(probability):
        chance = f'<span class="chance">{100 * float(probability):.0f} %</span>'
    return f"<div><dt>{role}</dt><dd><pre>{esc(text)}</pre>{chance}</dd></div>"

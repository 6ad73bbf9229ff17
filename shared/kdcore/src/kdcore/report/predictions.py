"""Inputs with the truth, the teacher's and the student's prediction, as a list of pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdcore.report.images import data_uri
from kdcore.report.text import esc


@dataclass(frozen=True)
class Guess:
    """A predicted label and its probability (None when the method gives none)."""

    label: str
    probability: float | None


@dataclass(frozen=True)
class Sample:
    """One input as a data URI; `teacher` is None for methods without one."""

    image: str
    truth: str
    teacher: Guess | None
    student: Guess

    @property
    def disagrees(self) -> bool:
        return self.teacher is not None and self.teacher.label != self.student.label


def predictions(items: Sequence[Mapping[str, Any]]) -> str:
    """The list as HTML, from what `predict` gave. Raises KeyError or ValueError on an item of another form."""
    return gallery(sorted(map(_sample, items), key=lambda sample: not sample.disagrees))


def _sample(item: Mapping[str, Any]) -> Sample:
    teacher = item.get("teacher")
    return Sample(
        data_uri(item["image"]), str(item["truth"]), _guess(teacher) if teacher else None, _guess(item["student"])
    )


def _guess(item: Mapping[str, Any]) -> Guess:
    probability = item.get("probability")
    return Guess(str(item["label"]), None if probability is None else float(probability))


def gallery(samples: Sequence[Sample]) -> str:
    """The pictures as a list; disagreements carry a badge."""
    differ = sum(sample.disagrees for sample in samples)
    told = f"Teacher and student disagree on {differ} of {len(samples)} inputs" + (
        "; these come first." if differ else "."
    )
    if not any(sample.teacher for sample in samples):
        told = f"{len(samples)} inputs."
    return f'<p>{told}</p><ul class="samples">{"".join(_figure(sample) for sample in samples)}</ul>'


def _figure(sample: Sample) -> str:
    badge = '<span class="badge">disagree</span>' if sample.disagrees else ""
    rows = _row("teacher", sample.teacher, sample.truth) + _row("student", sample.student, sample.truth)
    return (
        f'<li class="sample{" disagree" if sample.disagrees else ""}">'
        f'<img src="{sample.image}" alt="Input of class {esc(sample.truth)}">'
        f'<dl><div class="truth"><dt>truth</dt><dd>{esc(sample.truth)} {badge}</dd></div>{rows}</dl></li>'
    )


def _row(role: str, guess: Guess | None, truth: str) -> str:
    if guess is None:
        return ""
    kind, sign, spoken = ("right", "✓", "correct") if guess.label == truth else ("wrong", "✗", "wrong")
    mark = f'<span class="{kind}" title="{spoken}" aria-hidden="true">{sign}</span><span class="sr">{spoken}: </span>'
    return f"<div><dt>{role}</dt><dd>{mark}<span>{esc(guess.label)}</span>{_chance(guess.probability)}</dd></div>"


def _chance(probability: float | None) -> str:
    if probability is None or not math.isfinite(probability):
        return ""
    share = min(100.0, max(0.0, 100 * probability))
    bar = f'<span class="bar" aria-hidden="true"><i style="width:{share:.1f}%"></i></span>'
    return f'<span class="chance">{share:.0f} %{bar}</span>'

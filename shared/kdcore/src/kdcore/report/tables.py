"""Summary cards, metric tables, config differences and confusion matrices as HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kdcore.report.images import data_uri
from kdcore.report.read import Confusion, Run
from kdcore.report.text import difference, direction, esc, flatten, metric, short

MAX_TABLE_CLASSES = 40  # above this a confusion matrix is a picture and a list of confusions
_ARROWS = {1: "↑", -1: "↓", 0: ""}
_WORDS = {1: "larger is better", -1: "smaller is better", 0: ""}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def scroll(table: str, label: str) -> str:
    """A table that scrolls sideways inside the page instead of widening it."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{esc(label)}">{table}</div>'


# ---------------------------------------------------------------- one run


def by_role(results: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """`student/x`, `teacher/x` and `teacher_4/x` as x -> {role: value}, and every other metric as it is."""
    paired: dict[str, dict[str, Any]] = {}
    other: dict[str, Any] = {}
    for name, value in results.items():
        role, slash, rest = name.partition("/")
        if slash and (role in ("teacher", "student") or role.startswith("teacher_")):
            paired.setdefault(rest, {})[role] = value
        else:
            other[name] = value
    return paired, other


def cards(results: dict[str, Any], limit: int = 6) -> str:
    """The first few numbers, large: the student's, with the teacher's and the difference below."""
    paired, other = by_role(results)
    items = [_card(name, roles) for name, roles in paired.items() if any(_is_number(v) for v in roles.values())]
    items += [_card_html(name, metric(name, value), "") for name, value in other.items() if _is_number(value)]
    return f'<ul class="cards">{"".join(items[:limit])}</ul>' if items else ""


def _card(name: str, roles: dict[str, Any]) -> str:
    role = "student" if "student" in roles else next(iter(roles))
    below = ""
    if _is_number(roles.get("student")):
        teachers = [other for other, value in roles.items() if other != "student" and _is_number(value)]
        below = " · ".join(
            f"{other} {metric(name, roles[other])}" + (f" ({_verdict(name, roles)})" if other == "teacher" else "")
            for other in teachers
        )
    return _card_html(f"{role} {name}", metric(name, roles[role]), below)


def _card_html(name: str, value: str, below: str) -> str:
    return (
        f'<li class="card"><span class="name">{esc(name)}</span><span class="value">{esc(value)}</span>'
        f'<span class="below">{esc(below)}</span></li>'
    )


def _verdict(name: str, roles: dict[str, Any]) -> str:
    return difference(name, float(roles["student"]), float(roles["teacher"]))


def metrics_table(results: dict[str, Any]) -> str:
    """Teacher, student and difference for the metrics that both have; every other metric below.

    Several teachers, such as one at several numbers of steps, have a column each; the difference is to `teacher`.
    """
    paired, other = by_role(results)
    teachers = list(dict.fromkeys(role for roles in paired.values() for role in roles if role != "student"))
    columns = [*(teachers or ["teacher"]), "student"]
    compared = "teacher" in columns
    rows = []
    for name, roles in paired.items():
        cells = "".join(f"<td>{_value(name, roles.get(role))}</td>" for role in columns)
        if compared:
            both = all(_is_number(roles.get(role)) for role in ("teacher", "student"))
            cells += f"<td>{esc(_verdict(name, roles)) if both else '–'}</td>"
        rows.append(f"<tr>{_name_cell(name)}{cells}</tr>")
    rows += [
        f'<tr>{_name_cell(name)}<td colspan="{len(columns) + compared}" class="single">{_value(name, value)}</td></tr>'
        for name, value in other.items()
    ]
    if not rows:
        return "<p>metrics.json holds no metric.</p>"
    head = "".join(f'<th scope="col">{esc(name)}</th>' for name in ("metric", *columns))
    head += '<th scope="col" title="student minus teacher">difference</th>' if compared else ""
    table = f'<table class="metrics"><thead><tr>{head}</tr></thead>'
    return scroll(f"{table}<tbody>{''.join(rows)}</tbody></table>", "Metrics")


def _name_cell(name: str) -> str:
    arrow = _ARROWS[direction(name)]
    mark = f' <span class="note" title="{_WORDS[direction(name)]}">{arrow}</span>' if arrow else ""
    return f'<th scope="row">{esc(name)}{mark}</th>'


def _value(name: str, value: Any) -> str:
    if value is None:
        return "–"
    return f'<span title="{esc(short(value, 400))}">{esc(metric(name, value))}</span>'


# ---------------------------------------------------------------- several runs


def compare_table(runs: Sequence[Run]) -> str:
    """A row per metric, a column per run, the best value of a row marked."""
    names = list(dict.fromkeys(name for run in runs for name in run.results or {}))
    if not names:
        return "<p>No run has results (metrics.json).</p>"
    head = "".join(f'<th scope="col">{esc(run.label)}</th>' for run in runs)
    rows = []
    for name in names:
        values = [(run.results or {}).get(name) for run in runs]
        best = best_of(name, values)
        cells = "".join(
            f'<td class="best">{_value(name, value)} <span class="badge">best</span></td>'
            if index in best
            else f"<td>{_value(name, value)}</td>"
            for index, value in enumerate(values)
        )
        rows.append(f"<tr>{_name_cell(name)}{cells}</tr>")
    table = f'<table class="metrics"><thead><tr><th scope="col">metric</th>{head}</tr></thead>'
    return scroll(f"{table}<tbody>{''.join(rows)}</tbody></table>", "Metrics of every run")


def best_of(name: str, values: Sequence[Any]) -> set[int]:
    """Indices of the best values; empty when fewer than two compare, all are equal, or no direction is better."""
    known = {index: float(v) for index, v in enumerate(values) if _is_number(v) and math.isfinite(v)}
    if direction(name) == 0 or len(known) < 2 or len(set(known.values())) == 1:
        return set()
    best = max(known.values()) if direction(name) > 0 else min(known.values())
    return {index for index, value in known.items() if value == best}


def config_differences(runs: Sequence[Run]) -> str:
    """The settings that are not the same in every run."""
    flat = [flatten(run.config) for run in runs]
    names = list(dict.fromkeys(name for values in flat for name in values))
    absent = object()
    rows = []
    for name in names:
        values = [values.get(name, absent) for values in flat]
        texts = ["not set" if value is absent else short(value) for value in values]
        if any(value != values[0] or type(value) is not type(values[0]) for value in values):
            cells = "".join(f"<td>{esc(text)}</td>" for text in texts)
            rows.append(f'<tr><th scope="row">{esc(name)}</th>{cells}</tr>')
    if not rows:
        return "<p>The configs are equal.</p>"
    head = "".join(f'<th scope="col">{esc(run.label)}</th>' for run in runs)
    table = f'<table class="config"><thead><tr><th scope="col">setting</th>{head}</tr></thead>'
    return scroll(f"{table}<tbody>{''.join(rows)}</tbody></table>", "Config differences")


# ---------------------------------------------------------------- confusion matrices


def confusion_html(confusion: Confusion, caption: str) -> str:
    """Counts, coloured by the share of their row: a table, or a picture when there are many classes."""
    counts = confusion.counts
    totals = counts.sum(axis=1, keepdims=True)
    share = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    large = len(counts) > MAX_TABLE_CLASSES
    body = _confusion_picture(confusion, share) if large else _confusion_table(confusion, share)
    return f'<figure class="confusion"><figcaption>{esc(caption)}</figcaption>{body}</figure>'


def _confusion_table(confusion: Confusion, share: np.ndarray) -> str:
    classes = confusion.classes
    head = "".join(f'<th scope="col">{esc(label)}</th>' for label in classes)
    rows = []
    for i, truth in enumerate(classes):
        cells = "".join(
            _cell(truth, label, confusion.counts[i, j], share[i, j], i == j) for j, label in enumerate(classes)
        )
        recall = f"{100 * share[i, i]:.0f} %" if confusion.counts[i].sum() > 0 else "–"
        rows.append(f'<tr><th scope="row">{esc(truth)}</th>{cells}<td class="recall">{recall}</td></tr>')
    corner = '<th scope="col"><span class="note">truth ↓ prediction →</span></th>'
    table = (
        f'<table class="heat"><thead><tr>{corner}{head}<th scope="col" class="recall">correct</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )
    return scroll(table, "Confusion matrix")


def _cell(truth: str, label: str, count: float, share: float, diagonal: bool) -> str:
    kinds = [name for name, holds in (("diagonal", diagonal), ("strong", share > 0.5), ("zero", count == 0)) if holds]
    title = f"truth {truth}, predicted {label}: {count:g} ({100 * share:.1f} % of the row)"
    style = f' style="--share:{100 * share:.1f}%"' if share > 0 else ""
    return f'<td class="{" ".join(kinds)}"{style} title="{esc(title)}">{count:g}</td>'


def _confusion_picture(confusion: Confusion, share: np.ndarray) -> str:
    """The shares as the opacity of one colour, and the largest confusions in words."""
    pixels = np.zeros((*share.shape, 4), dtype=np.uint8)
    pixels[..., :3] = (37, 99, 201)
    pixels[..., 3] = np.rint(255 * np.sqrt(share))  # the square root shows rare confusions too
    off = np.where(np.eye(len(share), dtype=bool), -1.0, confusion.counts)
    order = np.argsort(off, axis=None, kind="stable")[::-1][:15]
    rows = []
    for i, j in zip(*np.unravel_index(order, off.shape), strict=True):
        if off[i, j] > 0:
            cells = f"<td>{confusion.counts[i, j]:g}</td><td>{100 * share[i, j]:.1f} %</td>"
            rows.append(f"<tr><td>{esc(confusion.classes[i])}</td><td>{esc(confusion.classes[j])}</td>{cells}</tr>")
    label = f"Confusion matrix of {len(share)} classes: rows are the truth, columns the prediction"
    names = ("truth", "predicted as", "count", "share of truth")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    return f'<img class="heatmap" src="{data_uri(pixels)}" alt="{label}">' + scroll(
        f'<table class="metrics"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>',
        "Largest confusions",
    )

"""Charts as HTML figures: every drawing (raw or weighted, linear or log) is in the page, the style sheet shows one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kdcore.report.curves import Group, Panel, ProfileChart, thin
from kdcore.report.read import Curve
from kdcore.report.svg import COLOURS, HEIGHT, WIDTH, linear_scale, log_scale, plot, x_scale
from kdcore.report.text import esc, number

Data = list[dict[str, Any]]
"""What the page's script needs to show values: one entry per chart."""


def toolbar(weighted: bool) -> str:
    """The switches. Plain radio buttons that the style sheet looks at, so they work without JavaScript."""
    term = _switch("Loss terms", "term", ("raw", "weighted")) if weighted else ""
    return f'<div class="toolbar">{term}{_switch("Vertical axis", "scale", ("linear", "log"))}</div>'


def _switch(legend: str, name: str, options: tuple[str, str]) -> str:
    buttons = "".join(
        f'<input type="radio" name="{name}" id="{name}-{option}"{" checked" if index == 0 else ""}>'
        f'<label for="{name}-{option}">{option}</label>'
        for index, option in enumerate(options)
    )
    return f'<fieldset class="switch"><legend>{legend}</legend>{buttons}</fieldset>'


def legend(labels: Sequence[str]) -> str:
    """Colour and dash pattern of every run."""
    items = "".join(f"<li>{swatch(index)}{esc(label)}</li>" for index, label in enumerate(labels))
    return f'<ul class="legend" aria-label="Runs">{items}</ul>'


def swatch(index: int) -> str:
    """A short piece of the run's line."""
    line = f'<path class="line c{index % COLOURS}" d="M2 4H26"/>'
    return f'<svg class="swatch" viewBox="0 0 28 8" aria-hidden="true">{line}</svg>'


def group_html(group: Group, labels: Sequence[str], data: Data) -> str:
    """The group's charts; appends to `data` what the script shows on hover."""
    x = group.steps
    charts = "".join(figure(panel, x, labels, data) for panel in group.panels)
    return f'<h3>{esc(group.title)}</h3><div class="charts">{charts}</div>'


def figure(panel: Panel, steps: tuple[float, float], labels: Sequence[str], data: Data) -> str:
    """One chart with its caption."""
    modes = ["raw", "weighted"] if any(line.weighted is not None for line in panel.lines) else ["any"]
    lines: list[dict[str, Any]] = [{"run": labels[line.run], "colour": line.run % COLOURS} for line in panel.lines]
    plots, captions = "", ""
    for mode in modes:
        curves = [line.weighted if mode == "weighted" and line.weighted else line.raw for line in panel.lines]
        thinned = [thin(curve) for curve in curves]
        plots += _plots([(line.run, curve) for line, curve in zip(panel.lines, thinned, strict=True)], steps, mode)
        captions += (
            f'<span class="block" data-term="{mode}">{_summary(panel, curves, labels)}{_log_note(curves)}</span>'
        )
        for entry, curve in zip(lines, thinned, strict=True):
            entry[mode] = _points(curve)
    data.append({"lines": lines})
    note = f' <span class="note">{esc(panel.note)}</span>' if panel.note else ""
    return (
        f'<figure class="chart" data-chart="{len(data) - 1}"><figcaption><strong>{esc(panel.title)}</strong>{note}'
        f'{captions}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" '
        f'aria-label="{esc(_spoken(panel, labels))}">{plots}</svg></figure>'
    )


def profile_figure(chart: ProfileChart, data: Data) -> str:
    """One chart over labels, its steps told apart by colour and dashes; appends to `data` as `figure` does."""
    curves = [curve for _, curve in chart.lines]
    plots = _plots(list(enumerate(curves)), (0.0, float(len(chart.x) - 1)), "any", chart.x)
    entries = [
        {"run": f"step {step}", "colour": index % COLOURS, "any": _points(curve)}
        for index, (step, curve) in enumerate(chart.lines)
    ]
    data.append({"lines": entries, "labels": list(chart.x)})
    steps = "".join(f"<li>{swatch(index)}step {number(step)}</li>" for index, (step, _) in enumerate(chart.lines))
    return (
        f'<figure class="chart" data-chart="{len(data) - 1}"><figcaption><strong>{esc(chart.title)}</strong> '
        f'<span class="note">{esc(chart.of)}</span><ul class="last">{steps}</ul>{_log_note(curves)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{esc(_spoken_profile(chart))}">'
        f"{plots}</svg></figure>"
    )


def _spoken_profile(chart: ProfileChart) -> str:
    parts = [f"Line chart of {chart.title} over {chart.x[0]} to {chart.x[-1]}, {chart.of}."]
    for step, curve in chart.lines:
        finite = curve.finite
        told = f"between {number(finite.min())} and {number(finite.max())}" if len(finite) else "no finite value"
        parts.append(f"Step {number(step)}: {told}.")
    return " ".join(parts)


def _plots(
    curves: Sequence[tuple[int, Curve]], steps: tuple[float, float], mode: str, labels: Sequence[str] = ()
) -> str:
    """The linear and the logarithmic drawing; both are linear where no value is positive."""
    x, plain = x_scale(*steps), [curve for _, curve in curves]
    linear = linear_scale(plain)
    return plot(curves, x, linear, f'data-term="{mode}" data-scale="linear"', labels) + plot(
        curves, x, log_scale(plain) or linear, f'data-term="{mode}" data-scale="log"', labels
    )


def _log_note(curves: Sequence[Curve]) -> str:
    """What the logarithmic drawing leaves out; shown with it."""
    if log_scale(curves) is None:
        text = "no value above 0: the axis stays linear"
    elif any((curve.finite <= 0).any() for curve in curves):
        text = "values of 0 or less are not shown"
    else:
        return ""
    return f'<span class="block" data-scale="log">{text}</span>'


def _summary(panel: Panel, curves: Sequence[Curve], labels: Sequence[str]) -> str:
    """The last value (per run), so that the page says it without a pointer."""
    if len(labels) == 1:
        curve = curves[0]
        if not len(curve.finite):
            return "no finite value"
        return f"last {_last(curve)} · min {number(curve.finite.min())} · max {number(curve.finite.max())}"
    items = "".join(
        f'<li title="{esc(labels[line.run])}">{swatch(line.run)}<span class="sr">{esc(labels[line.run])}: </span>'
        f"{_last(curve)}</li>"
        for line, curve in zip(panel.lines, curves, strict=True)
    )
    return f'<ul class="last"><li>last</li>{items}</ul>'


def _last(curve: Curve) -> str:
    return number(float(curve.values[-1]))


def _spoken(panel: Panel, labels: Sequence[str]) -> str:
    """The chart in words, for screen readers."""
    parts = [f"Line chart of {panel.title} over optimiser steps."]
    for line in panel.lines:
        finite, steps = line.raw.finite, line.raw.steps
        who = f"{labels[line.run]}: " if len(labels) > 1 else ""
        if len(finite):
            ends = f"step {number(steps[0])} to {number(steps[-1])}, last {_last(line.raw)}"
            parts.append(f"{who}{ends}, between {number(finite.min())} and {number(finite.max())}.")
        else:
            parts.append(f"{who}no finite value.")
    return " ".join(parts)


def _points(curve: Curve) -> list[list[float | None]]:
    """[steps, values] with six significant digits; null for a gap."""
    values = [float(f"{value:.6g}") if np.isfinite(value) else None for value in curve.values.tolist()]
    return [[int(step) for step in curve.steps.tolist()], values]

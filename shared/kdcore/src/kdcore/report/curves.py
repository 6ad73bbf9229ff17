"""From runs to panels: which curves share a chart, in which order, and thinned to what a page can hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from kdcore.report.read import Curve, Profile, Run, Term

K = TypeVar("K")
MAX_POINTS = 500
MAX_STEPS = 5  # of a profile that are drawn
_TITLES = {"total": "total (weighted sum)", "lr": "learning rate", "samples_per_second": "samples per second"}


@dataclass(frozen=True)
class Line:
    """One run's curve in a chart; `weighted` is None for everything but loss terms whose weight is not always 1."""

    run: int
    raw: Curve
    weighted: Curve | None = None


@dataclass(frozen=True)
class Panel:
    """One chart. `note` says something on the curves that their shape does not, such as a term's weight."""

    title: str
    lines: list[Line]
    note: str = ""


@dataclass(frozen=True)
class Group:
    """Charts under one heading, over the same range of steps."""

    title: str
    panels: list[Panel]

    @property
    def steps(self) -> tuple[float, float]:
        ends = [(line.raw.steps[0], line.raw.steps[-1]) for panel in self.panels for line in panel.lines]
        return float(min(first for first, _ in ends)), float(max(last for _, last in ends))


def thin(curve: Curve, limit: int = MAX_POINTS) -> Curve:
    """At most `limit` points that look the same: of every bucket of points its minimum, its maximum and a gap, if any.

    First and last point, the global extremes and the presence of gaps are kept.
    """
    size = len(curve.steps)
    if size <= limit:
        return curve
    gaps = ~np.isfinite(curve.values)
    per_bucket = 3 if gaps.any() else 2
    kept = {0, size - 1}
    for bucket in np.array_split(np.arange(size), (limit - 2) // per_bucket):
        finite = bucket[~gaps[bucket]]
        if len(finite):
            kept.add(int(finite[curve.values[finite].argmin()]))
            kept.add(int(finite[curve.values[finite].argmax()]))
        if len(finite) < len(bucket):
            kept.add(int(bucket[gaps[bucket]][0]))
    index = np.array(sorted(kept))
    return Curve(curve.steps[index], curve.values[index])


def training_groups(runs: Sequence[Run]) -> list[Group]:
    """One group per stage and player, in the order in which the runs logged them."""
    found = [{(item.stage, item.player): item for item in run.trainings} for run in runs]
    groups = []
    for stage, player in _union(found):
        items = [(index, by_key[stage, player]) for index, by_key in enumerate(found) if (stage, player) in by_key]
        terms = _union(item.terms for _, item in items)
        panels = [
            _term_panel(name, [(run, item.terms[name]) for run, item in items if name in item.terms]) for name in terms
        ]
        scalars = _union([_TITLES, *(item.scalars for _, item in items)])
        for name in scalars:
            lines = [Line(run, item.scalars[name]) for run, item in items if name in item.scalars]
            if lines:
                panels.append(Panel(_TITLES.get(name, name), lines))
        if panels:
            who = f"player {player}" if player != stage else ""
            groups.append(Group(f"stage {stage}" + (f", {who}" if who else ""), panels))
    return groups


def validation_groups(runs: Sequence[Run]) -> list[Group]:
    """One group per stage that was validated."""
    found = [{item.stage: item for item in run.validations} for run in runs]
    groups = []
    for stage in _union(found):
        items = [(index, by_stage[stage].metrics) for index, by_stage in enumerate(found) if stage in by_stage]
        panels = [
            Panel(name, [Line(run, metrics[name]) for run, metrics in items if name in metrics])
            for name in _union(metrics for _, metrics in items)
        ]
        if panels:
            groups.append(Group(f"stage {stage}", panels))
    return groups


@dataclass(frozen=True)
class ProfileChart:
    """One chart over labels instead of steps: `lines` are (step, curve over 0..N-1). `of` says where it is from."""

    title: str
    of: str
    x: tuple[str, ...]
    lines: list[tuple[int, Curve]]


def profile_charts(runs: Sequence[Run]) -> list[ProfileChart]:
    """A chart per name, stage and run, charts of one name side by side."""
    found = [(run, profile) for run in runs for profile in run.profiles]
    order = _union([[(profile.stage, profile.name) for _, profile in found]])
    found.sort(key=lambda item: order.index((item[1].stage, item[1].name)))
    return [_profile_chart(profile, run.label if len(runs) > 1 else "") for run, profile in found]


def _profile_chart(profile: Profile, label: str) -> ProfileChart:
    """The first, the last and some steps between, evenly spread over those that were logged."""
    steps = list(profile.curves)
    places = np.linspace(0, len(steps) - 1, min(MAX_STEPS, len(steps))).round().astype(int)
    x = np.arange(len(profile.x), dtype=np.float64)
    lines = [(steps[place], Curve(x, profile.curves[steps[place]])) for place in places]
    return ProfileChart(profile.name, ", ".join(filter(None, (label, f"stage {profile.stage}"))), profile.x, lines)


def _term_panel(name: str, terms: Sequence[tuple[int, Term]]) -> Panel:
    ratios = [weights for _, term in terms for weights in _weights(term)]
    if not ratios:
        note = ""
    elif np.ptp(ratios) <= 1e-4 * max(1e-12, np.max(np.abs(ratios))):
        note = f"weight {ratios[0]:.4g}"
    else:
        note = f"weight {min(ratios):.4g} to {max(ratios):.4g}"
    one = note == "weight 1"
    return Panel(name, [Line(run, term.raw, None if one else term.weighted) for run, term in terms], note)


def _weights(term: Term) -> list[float]:
    raw, weighted = term.raw.values, term.weighted.values
    known = np.isfinite(raw) & np.isfinite(weighted) & (np.abs(raw) > 1e-12)
    return (weighted[known] / raw[known]).tolist()


def _union(groups: Iterable[Iterable[K]]) -> list[K]:
    """Keys in the order in which they first appear."""
    return list(dict.fromkeys(key for group in groups for key in group))

"""A line chart as SVG text: scales, ticks, paths with gaps. Colours and fonts come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kdcore.report.read import Curve
from kdcore.report.text import esc

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 24  # report.js has the same margins
LETTER = 5.6  # width of a tick label's letter, about
COLOURS = 8  # with their dash patterns, in report.css


@dataclass(frozen=True)
class Scale:
    """Data to pixels, linear or log10. `low` and `high` are in data units."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, values: np.ndarray) -> np.ndarray:
        low, high = self.bounds
        with np.errstate(invalid="ignore", divide="ignore"):
            data = np.log10(values) if self.log else values
        return self.start + (data - low) / (high - low) * (self.end - self.start)

    @property
    def bounds(self) -> tuple[float, float]:
        """`low` and `high` as they are spaced: their logarithms on a log scale."""
        return (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)


def x_scale(low: float, high: float) -> Scale:
    """Steps to pixels; a single step gets a range around it."""
    if low == high:
        low, high = low - 1, high + 1
    return Scale(low, high, LEFT, WIDTH - RIGHT)


def linear_scale(curves: Sequence[Curve]) -> Scale:
    """The range of the curves with a margin; it starts at 0 when the values come near it. [0, 1] without values."""
    values = _finite(curves)
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    if 0 <= low < 0.25 * high:
        return Scale(0.0, 1.05 * high, HEIGHT - BOTTOM, TOP)
    margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return Scale(low - margin, high + margin, HEIGHT - BOTTOM, TOP)


def log_scale(curves: Sequence[Curve]) -> Scale | None:
    """The range of the positive values with a margin; None when there are none."""
    values = _finite(curves)
    values = values[values > 0]
    if not len(values):
        return None
    low, high = float(values.min()), float(values.max())
    margin = 1.12 if high / low > 1.2 else 1.25
    # the bounds keep denormal numbers from closing the range
    return Scale(max(low / margin, 5e-324), max(high * margin, 1e-300), HEIGHT - BOTTOM, TOP, log=True)


def _finite(curves: Sequence[Curve]) -> np.ndarray:
    return np.concatenate([np.empty(0), *(curve.finite for curve in curves)])


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values (1, 2 or 5 times a power of ten apart) in [low, high].

    >>> linear_ticks(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    span = high - low
    if not 1e-300 < span < math.inf:
        return [low]
    unit = 10.0 ** math.floor(math.log10(span / count))
    step = next(unit * factor for factor in (1, 2, 5, 10) if span / (unit * factor) <= count + 0.5)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, -math.floor(math.log10(step)))
    return [round(index * step, digits) + 0.0 for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in [low, high], thinned to about six; 1-2-5 steps or round values when there are few."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    decades = list(range(first, last + 1))
    if len(decades) >= 3:
        every = -(-len(decades) // 6)
        return [10.0**power for power in decades[::every]]
    ticks = [
        factor * 10.0**power
        for power in range(first - 1, last + 1)
        for factor in (1, 2, 5)
        if low <= factor * 10.0**power <= high
    ]
    return ticks if len(ticks) >= 2 else [tick for tick in linear_ticks(low, high) if tick > 0]


def tick_label(value: float) -> str:
    """
    >>> [tick_label(value) for value in (0.0, 0.25, 12000.0, 3e-05, -2e6)]
    ['0', '0.25', '12k', '3e-5', '−2M']
    """
    size, sign = abs(value), "\N{MINUS SIGN}" if value < 0 else ""
    if size == 0:
        return "0"
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if unit <= size < 1000 * unit and (unit > 1e3 or size >= 1e4):
            return f"{sign}{size / unit:.6g}{letter}"
    if 1e-3 <= size < 1e4:
        return f"{sign}{size:.6g}"
    mantissa, exponent = f"{size:.3e}".split("e")
    return f"{sign}{float(mantissa):g}e{int(exponent)}"


def path(curve: Curve, x: Scale, y: Scale) -> str:
    """The `d` of a polyline that is interrupted where a value is not finite; a lone point becomes a dot."""
    xs, ys = x(curve.steps), y(curve.values)
    parts: list[str] = []
    drawn = 0  # points since the last gap
    for px, py in zip(xs.tolist(), ys.tolist(), strict=True):
        if not math.isfinite(py):
            parts, drawn = _close(parts, drawn), 0
            continue
        parts.append(f"{'L' if drawn else 'M'}{px:.1f} {py:.1f}")
        drawn += 1
    return "".join(_close(parts, drawn))


def _close(parts: list[str], drawn: int) -> list[str]:
    return [*parts, "h0"] if drawn == 1 else parts


def axes(x: Scale, y: Scale, labels: Sequence[str] = ()) -> str:
    """Grid lines and tick labels, round steps or the given `labels` of x = 0, 1, ... Hidden from screen readers: the
    chart's label gives the range in words."""
    out = []
    for tick, py in _placed(log_ticks(y.low, y.high) if y.log else linear_ticks(y.low, y.high), y):
        out.append(f'<path class="grid" d="M{LEFT} {py:.1f}H{WIDTH - RIGHT}"/>')
        out.append(f'<text class="tick" x="{LEFT - 6}" y="{py + 3.5:.1f}" text-anchor="end">{tick_label(tick)}</text>')
    out.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    ticks = label_ticks(labels) if labels else [t for t in linear_ticks(x.low, x.high) if float(t).is_integer()]
    for tick, px in _placed(ticks, x):
        out.append(f'<path class="axis" d="M{px:.1f} {HEIGHT - BOTTOM}v4"/>')
        anchor = "end" if px > WIDTH - RIGHT - 8 else "middle"
        text = esc(labels[int(tick)]) if labels else tick_label(tick)
        out.append(f'<text class="tick" x="{px:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{text}</text>')
    return f'<g aria-hidden="true">{"".join(out)}</g>'


def _placed(ticks: Sequence[float], scale: Scale) -> list[tuple[float, float]]:
    return list(zip(ticks, scale(np.array(ticks, dtype=np.float64)).tolist(), strict=True))


def label_ticks(labels: Sequence[str]) -> list[float]:
    """Positions of the labels that fit beside each other: the first and every k-th one.

    >>> label_ticks(["low", "middle", "high"])
    [0.0, 1.0, 2.0]
    """
    room = (WIDTH - RIGHT - LEFT) / max(1, len(labels) - 1)
    every = math.ceil((LETTER * max(map(len, labels)) + 6) / room)
    return [float(index) for index in range(0, len(labels), max(1, every))]


def plot(curves: Sequence[tuple[int, Curve]], x: Scale, y: Scale, attributes: str, labels: Sequence[str] = ()) -> str:
    """One drawing of a chart: axes and a path per (colour index, curve); `labels` of x = 0, 1, ... where it has any."""
    (x0, x1), (y0, y1) = x.bounds, y.bounds
    data = f'data-x0="{x0:.10g}" data-x1="{x1:.10g}" data-y0="{y0:.10g}" data-y1="{y1:.10g}" data-log="{int(y.log)}"'
    lines = "".join(f'<path class="line c{index % COLOURS}" d="{path(curve, x, y)}"/>' for index, curve in curves)
    return f'<g class="plot" {attributes} {data}>{axes(x, y, labels)}{lines}</g>'

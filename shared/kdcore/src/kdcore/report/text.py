"""Strings of the report: escaping, numbers, times, and which way a metric is better."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

_LOWER_PARTS = ("nll", "loss", "error", "flip", "ece", "seconds_per")
_LOWER_WORDS = {"perplexity", "mse", "rmse", "mae", "fid", "lpips", "kl", "divergence", "distance", "latency", "brier"}
_LOWER_WORDS |= {"frechet", "kid", "mmd", "wasserstein"}
_HIGHER_WORDS = {"accuracy", "agreement", "auc", "coverage", "f1", "iou", "map", "miou", "nds", "precision", "psnr"}
_HIGHER_WORDS |= {"density", "pass", "recall", "sensitivity", "specificity", "ssim", "top1", "top5"}
_FRACTION_WORDS = {"accuracy", "agreement", "coverage", "top1", "top5", "recall", "precision", "f1", "iou", "miou"}
_FRACTION_WORDS |= {"pass"}


def esc(value: Any) -> str:
    """Text for HTML content and for quoted attributes."""
    return html.escape(str(value), quote=True)


def script_json(value: Any) -> str:
    """JSON that is safe inside a <script> element: nothing in it can close the element or open a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def words(name: str) -> set[str]:
    """Lower-case words of a metric's name: `student/top1_accuracy` -> {student, top1, accuracy}."""
    return set(re.split(r"[^a-z0-9]+", name.lower()))


def direction(name: str) -> int:
    """+1 when a larger value of the metric is better, -1 when a smaller one is, 0 where its name does not tell."""
    last = name.lower().removeprefix("student/").removeprefix("teacher/")
    if "positive_flip" in last:
        return 1
    if any(part in last for part in _LOWER_PARTS) or words(last) & _LOWER_WORDS:
        return -1
    return 1 if words(last) & _HIGHER_WORDS else 0


def is_fraction(name: str, value: float) -> bool:
    """Whether the metric reads better as a percentage."""
    return 0.0 <= value <= 1.0 and bool(words(name) & _FRACTION_WORDS)


def number(value: float, digits: int = 4) -> str:
    """A number with `digits` significant digits, for people: no float noise, no needless exponent.

    >>> number(0.123456), number(1234567), number(2.5e-07), number(float("nan"))
    ('0.1235', '1,234,567', '2.5e-7', 'not finite')
    """
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    if float(value).is_integer() and abs(value) < 1e9:
        return f"{int(value):,}".replace("-", "\N{MINUS SIGN}")
    if abs(value) >= 10**digits and abs(value) < 1e9:
        text = f"{value:,.0f}"
    else:
        text = re.sub(r"e([+-])0*(\d)", r"e\1\2", f"{value:.{digits}g}").replace("e+", "e")
    return "\N{MINUS SIGN}" + text[1:] if text.startswith("-") else text


def metric(name: str, value: Any) -> str:
    """A metric's value: fractions as a percentage, numbers shortened, anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return short(value)
    if is_fraction(name, value):
        return f"{100 * value:.2f} %"
    return number(value)


def difference(name: str, student: float, teacher: float) -> str:
    """Student minus teacher with its sign; percentage points for fractions."""
    delta = student - teacher
    if not math.isfinite(delta):
        return "not finite"
    if is_fraction(name, student) and is_fraction(name, teacher):
        text = f"{abs(100 * delta):.2f} points"
    else:
        text = number(abs(delta), 3)
    sign = "±" if delta == 0 else "+" if delta > 0 else "\N{MINUS SIGN}"
    return f"{sign}{text}"


def short(value: Any, limit: int = 160) -> str:
    """A config or environment value on one line, cut at `limit` characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def flatten(values: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
    """Nested mappings as one mapping with joined keys; an empty mapping stays as a value.

    >>> flatten({"train": {"epochs": 1}, "seed": 0})
    {'train.epochs': 1, 'seed': 0}
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update({f"{key}{separator}{inner}": item for inner, item in flatten(value, separator).items()})
        else:
            flat[str(key)] = value
    return flat


def moment(seconds: float) -> str:
    """A Unix time as date and minute, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def duration(seconds: float) -> str:
    """
    >>> duration(42), duration(400), duration(7300)
    ('42 s', '6 min 40 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"

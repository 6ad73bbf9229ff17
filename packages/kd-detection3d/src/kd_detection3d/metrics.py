"""Average precision of 3D boxes by the distance of their centres on the ground, as nuScenes defines it.

A prediction is right if the nearest unmatched true box of its class in its frame lies within a threshold; predictions
are matched by falling score over all frames. AP is the area under the precision-recall curve above 10 % of each, scaled
to [0, 1]; mAP averages over thresholds and classes that occur.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

THRESHOLDS = (0.5, 1.0, 2.0, 4.0)  # metres


@dataclass
class Frame:
    """Boxes (N, 7) x, y, z, dx, dy, dz, heading; labels (N,); scores (N,), ones for the truth."""

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray


def match(predicted: Sequence[Frame], truth: Sequence[Frame], label: int, threshold: float) -> tuple[np.ndarray, ...]:
    """All predictions of a class by falling score: scores (P,), whether right (P,), and the pairs' frames and indices.

    Returns (scores, right, pairs) with pairs (matched, 3): frame, index of the prediction, index of the true box.
    """
    rows = [
        (score, frame, index)
        for frame, found in enumerate(predicted)
        for index, score in enumerate(found.scores)
        if found.labels[index] == label
    ]
    rows.sort(key=lambda row: -row[0])
    free = [np.flatnonzero(frame.labels == label).tolist() for frame in truth]
    right, pairs = np.zeros(len(rows), bool), []
    for place, (_, frame, index) in enumerate(rows):
        if free[frame]:
            offsets = truth[frame].boxes[free[frame], :2] - predicted[frame].boxes[index, :2]
            distances = np.hypot(*offsets.T)
            nearest = int(distances.argmin())
            if distances[nearest] < threshold:
                right[place] = True
                pairs.append((frame, index, free[frame].pop(nearest)))
    return np.array([row[0] for row in rows]), right, np.array(pairs, int).reshape(-1, 3)


def average_precision(right: np.ndarray, positives: int) -> float:
    """AP of predictions by falling score; NaN where the class does not occur."""
    if positives == 0:
        return float("nan")
    if not len(right):
        return 0.0
    hits = right.cumsum()
    precision, recall = hits / np.arange(1, len(right) + 1), hits / positives
    curve = np.interp(np.linspace(0, 1, 101), recall, precision, right=0)
    return float(np.maximum(curve[11:] - 0.1, 0).mean() / 0.9)


def detection_scores(
    predicted: Sequence[Frame],
    truth: Sequence[Frame],
    names: Sequence[str],
    thresholds: Sequence[float] = THRESHOLDS,
    *,
    error_threshold: float = 2.0,
) -> dict[str, float]:
    """mAP, AP by class and threshold, and mean errors of matched boxes: `ATE` in metres, `AOE` in radians, `ASE`.

    ASE is 1 - IoU of the boxes after aligning centre and heading. The errors are over matches within `error_threshold`.
    """
    result: dict[str, float] = {}
    classes, errors = [], []
    for label, name in enumerate(names):
        positives = sum(int((frame.labels == label).sum()) for frame in truth)
        values = []
        for threshold in thresholds:
            _, right, _ = match(predicted, truth, label, threshold)
            values.append(average_precision(right, positives))
        _, _, pairs = match(predicted, truth, label, error_threshold)
        if positives:
            classes.append(values)
            result[f"AP/{name}"] = float(np.mean(values))
            errors.extend(_errors(predicted[f].boxes[i], truth[f].boxes[j]) for f, i, j in pairs)
    by_threshold = np.mean(classes, axis=0) if classes else np.full(len(thresholds), np.nan)
    result = {
        "mAP": float(np.mean(by_threshold)),
        **{f"mAP_{threshold:g}m": float(value) for threshold, value in zip(thresholds, by_threshold)},
        **result,
    }
    for name, value in zip(("ATE", "ASE", "AOE"), np.mean(errors, axis=0) if errors else (np.nan,) * 3):
        result[name] = float(value)
    return result


def on_clutter(
    found: Frame, truth: Frame, paint: np.ndarray, *, score: float = 0.3, near: float = 1.0, apart: float = 2.0
) -> int:
    """Boxes of at least `score` within `near` metres of a painted patch and over `apart` metres from every true box.

    paint: (M, >= 2), x and y of the patches.
    """
    centres = found.boxes[found.scores >= score, :2]
    distance = lambda places: np.hypot(*(centres[:, None] - places[None, :, :2]).transpose(2, 0, 1))  # noqa: E731
    if not len(centres) or not len(paint):
        return 0
    false = (distance(truth.boxes) > apart).all(1) if len(truth.boxes) else np.ones(len(centres), bool)
    return int(((distance(np.asarray(paint)) <= near).any(1) & false).sum())


def _errors(found: np.ndarray, true: np.ndarray) -> tuple[float, float, float]:
    shared = np.minimum(found[3:6], true[3:6]).prod()
    iou = shared / (found[3:6].prod() + true[3:6].prod() - shared)
    turn = (found[6] - true[6] + np.pi) % (2 * np.pi) - np.pi
    return float(np.hypot(*(found[:2] - true[:2]))), float(1 - iou), float(abs(turn))


def prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}/{name}": value for name, value in values.items()}

"""Metrics of segmentation from one confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kd_segmentation.engine.batch import IGNORE


def confusion(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Counts (C, C), int64: rows are the truth, columns the prediction; pixels of label 255 are left out."""
    kept = truth != IGNORE
    index = truth[kept].long() * classes + predicted[kept].long()
    return torch.bincount(index, minlength=classes * classes).reshape(classes, classes)


def iou(counts: Tensor) -> Tensor:
    """Intersection over union of each class (C,), float64; NaN for a class that neither side has."""
    counts = counts.double()
    hit = counts.diagonal()
    return hit / (counts.sum(0) + counts.sum(1) - hit)


def summary(counts: Tensor, names: Sequence[str], *, per_class: bool = True) -> dict[str, float]:
    """mIoU over the classes that occur, pixel accuracy, mean accuracy of a class, and IoU by class; fractions."""
    found, counts = iou(counts), counts.double()
    recall = counts.diagonal() / counts.sum(1)
    result = {
        "mIoU": float(found.nanmean()),
        "pixel_accuracy": float(counts.diagonal().sum() / counts.sum()),
        "class_accuracy": float(recall.nanmean()),
    }
    if per_class:
        result.update({f"iou/{name}": float(v) for name, v in zip(names, found, strict=True) if not math.isnan(v)})
    return result


def prefixed(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}/{name}": value for name, value in values.items()}

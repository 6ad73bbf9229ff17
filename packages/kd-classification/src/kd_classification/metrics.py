"""Evaluation of classifiers, by torchmetrics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kd_classification.data import Images

VALIDATION = ("accuracy", "balanced_accuracy", "nll", "ece")
"""Names of `classification_metrics`: what a training can monitor."""


@torch.no_grad()
def predict(model: nn.Module, images: Images, *, batch_size: int = 512) -> tuple[Tensor, Tensor]:
    """(logits (N, K), labels (N,)) of a data set, in its order, on the CPU."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    logits = [model(batch.images.to(device)).float().cpu() for batch in images.loader(batch_size)]
    model.train(was_training)
    return torch.cat(logits), images.labels


def classification_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """accuracy, balanced_accuracy, nll (nats) and ece (15 bins) of logits (N, K) against labels (N,)."""
    from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_confusion_matrix

    classes = logits.shape[1]
    confusion = multiclass_confusion_matrix(logits, labels, classes).double()
    present = confusion.sum(1) > 0
    recall = confusion.diagonal()[present] / confusion.sum(1)[present]
    return {
        "accuracy": float(confusion.diagonal().sum() / confusion.sum()),
        "balanced_accuracy": float(recall.mean()),
        "nll": float(torch.nn.functional.cross_entropy(logits.double(), labels)),
        "ece": float(multiclass_calibration_error(logits, labels, classes, n_bins=15)),
    }


def confusion_matrix(logits: Tensor, labels: Tensor) -> list[list[int]]:
    """Counts, rows truth, columns prediction."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    return multiclass_confusion_matrix(logits, labels, logits.shape[1]).tolist()


def rates(confusion: Any) -> tuple[Tensor, Tensor]:
    """(sensitivity (K,), specificity (K,)) of each class from a confusion matrix (K, K) as above; NaN without cases.

    sensitivity TP / (TP + FN),  specificity TN / (TN + FP)
    """
    counts = torch.as_tensor(confusion, dtype=torch.float64)
    hits, truth, answers, total = counts.diagonal(), counts.sum(1), counts.sum(0), counts.sum()
    return hits / truth, (total - truth - answers + hits) / (total - truth)


def agreement(left: Tensor, right: Tensor) -> float:
    """Share of samples on which two logit tensors (N, K) have the same argmax."""
    return float((left.argmax(1) == right.argmax(1)).double().mean())


def prefixed(prefix: str, metrics: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}/{name}": value for name, value in metrics.items()}

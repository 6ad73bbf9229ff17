"""Evaluation of node and graph classifiers: torchmetrics, the spectrum over a graph, and the time an answer takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def classification_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """accuracy, macro_f1 and nll (nats) of logits (N, K) against labels (N,); auroc where there are two classes."""
    from torchmetrics.functional.classification import binary_auroc, multiclass_accuracy, multiclass_f1_score

    classes = logits.shape[1]
    found = {
        "accuracy": multiclass_accuracy(logits, labels, classes, average="micro"),
        "macro_f1": multiclass_f1_score(logits, labels, classes, average="macro"),
        "nll": torch.nn.functional.cross_entropy(logits.double(), labels),
    }
    if classes == 2 and len(labels.unique()) == 2:
        found["auroc"] = binary_auroc((logits[:, 1] - logits[:, 0]).sigmoid(), labels)
    return {name: float(value) for name, value in found.items()}


def prefixed(prefix: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}/{name}": value for name, value in metrics.items()}


def spectral_energy(z: Tensor, edge_index: Tensor) -> dict[str, float]:
    """How much of a node signal is smooth over the graph and how much is not.

    With L = I - D^-1/2 A D^-1/2, its eigenvalues lambda in [0, 2] and the signal's spectrum s, per class centred:

        low  = || (I - L/2) z ||^2 / ||z||^2 = sum_lambda (1 - lambda/2)^2 |s|^2 / sum |s|^2
        high = ||      L/2  z ||^2 / ||z||^2 = sum_lambda     (lambda/2)^2 |s|^2 / sum |s|^2

    Both filters are exact, without eigenvectors, in memory linear in the edges. The logits z (n, C) lose each node's
    mean first, which softmax does not see. edge_index (2, E) holds both directions and no self loops.
    """
    from torch_geometric.utils import degree

    z = z.double() - z.double().mean(1, keepdim=True)
    source, target = edge_index
    scale = degree(source, len(z), dtype=z.dtype).clamp(min=1).rsqrt()
    weights, shape = scale[source] * scale[target], (len(z), len(z))
    adjacency = torch.sparse_coo_tensor(edge_index, weights, shape, check_invariants=False)
    smooth = torch.sparse.mm(adjacency, z)
    total = z.square().sum().clamp(min=torch.finfo(z.dtype).tiny)
    return {
        "low_energy": float(((z + smooth) / 2).square().sum() / total),
        "high_energy": float(((z - smooth) / 2).square().sum() / total),
    }


def median_milliseconds(call: Callable[[], Any], *, repeats: int = 7, device: torch.device | None = None) -> float:
    """Median wall time of a call after one that is not counted."""
    call()
    seconds = []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)

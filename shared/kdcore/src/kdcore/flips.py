"""Flips between two versions of a model: what the update broke and what it repaired, on the same N samples.

old, new, labels are class ids (N,) in one id space. A negative flip is a sample that the old model had right and the
new one has wrong; a positive flip is the opposite.

    NFR          mean 1[old = y and new != y]                    (positive-congruent training, CVPR 2021)
    relative NFR NFR / ((1 - ER_old) ER_new)                     1 when the new errors ignore what the old model knew
    PFR          mean 1[old != y and new = y]

so that accuracy(new) - accuracy(old) = PFR - NFR. All rates are shares of the N samples given: state which samples
these are (all test samples, or those of the classes that the old model knew).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "error_rate",
    "in_label_space",
    "negative_flip_rate",
    "positive_flip_rate",
    "relative_negative_flip_rate",
]


def error_rate(predictions: Tensor, labels: Tensor) -> float:
    """Share of predictions (N,) that differ from labels (N,), both integer ids. ValueError when they do not fit.

    >>> error_rate(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 0, 0]))
    0.25
    """
    _check(predictions=predictions, labels=labels)
    return _share(predictions != labels)


def negative_flip_rate(old: Tensor, new: Tensor, labels: Tensor) -> float:
    """NFR, in [0, 1], of predictions old (N,) and new (N,) on labels (N,). ValueError when they do not fit.

    >>> old, new = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 1])
    >>> negative_flip_rate(old, new, torch.tensor([0, 1, 0, 0]))
    0.5
    """
    _check(old=old, new=new, labels=labels)
    return _share((old == labels) & (new != labels))


def positive_flip_rate(old: Tensor, new: Tensor, labels: Tensor) -> float:
    """Share of samples, in [0, 1], that old (N,) had wrong and new (N,) has right. ValueError when they do not fit."""
    _check(old=old, new=new, labels=labels)
    return _share((old != labels) & (new == labels))


def relative_negative_flip_rate(old: Tensor, new: Tensor, labels: Tensor) -> float:
    """NFR over the NFR of errors that are independent of the old model's; 0 where that expectation is 0.

    ValueError when the three (N,) id tensors do not fit.

    >>> old, new = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 1])
    >>> round(relative_negative_flip_rate(old, new, torch.tensor([0, 1, 0, 0])), 7)
    0.8888889
    """
    flips = negative_flip_rate(old, new, labels)
    expected = (1 - error_rate(old, labels)) * error_rate(new, labels)
    return flips / expected if expected > 0 else 0.0


def in_label_space(predictions: Tensor, ids: Tensor) -> Tensor:
    """Predictions (N,) of a model whose class k is class ids[k] of another label space, in that space.

    ids is (K,), integers. ValueError when a prediction is not in 0..K-1.

    >>> in_label_space(torch.tensor([1, 0, 1]), torch.tensor([7, 3]))
    tensor([3, 7, 3])
    """
    _check(predictions=predictions)
    if ids.is_floating_point() or ids.ndim != 1 or len(ids) == 0:
        raise ValueError(f"ids has shape {tuple(ids.shape)} and dtype {ids.dtype}; it must be (K,) integer class ids")
    low, high = int(predictions.min()), int(predictions.max())
    if low < 0 or high >= len(ids):
        raise ValueError(f"predictions holds ids {low}..{high}; ids maps 0..{len(ids) - 1}")
    return ids[predictions.long()]


def _share(mask: Tensor) -> float:
    return float(mask.double().mean())


def _check(**named: Tensor) -> None:
    """Non-empty integer (N,) tensors of one length."""
    (first, reference), *_ = named.items()
    for name, ids in named.items():
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(
                f"{name} has dtype {ids.dtype}; it must hold integer class ids (take the argmax of logits)"
            )
        if ids.ndim != 1 or len(ids) == 0:
            raise ValueError(f"{name} has shape {tuple(ids.shape)}; it must be (N,) with N > 0")
        if len(ids) != len(reference):
            raise ValueError(f"{name} has {len(ids)} samples but {first} has {len(reference)}; they must be the same")

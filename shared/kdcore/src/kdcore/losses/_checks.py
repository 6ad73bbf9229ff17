"""Argument checks of the losses: one ValueError that names the argument, what was given and what is allowed.

All checks read shapes, dtypes and Python numbers only, so none of them waits for a GPU. The one exception is the
range of labels, which is checked for tensors that already live on the CPU (and not while torch.compile traces).
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

REDUCTIONS = ("batchmean", "none")


def check_choice(name: str, value: str, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}")


def check_reduction(reduction: str) -> None:
    check_choice("reduction", reduction, REDUCTIONS)


def check_positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} is {value}; it must be a finite number above 0")


def check_float(name: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"{name} has dtype {x.dtype}; it must be floating point")


def check_rank(name: str, x: Tensor, least: int, layout: str) -> None:
    """At least `least` dimensions and no empty one; `layout` is the shape shown to the user."""
    if x.ndim < least or x.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be a non-empty {layout} tensor")


def check_same_shape(layout: str, least: int, **pair: Tensor) -> None:
    """Two floating-point tensors of one shape, given by keyword so that the message can name them."""
    (name_a, a), (name_b, b) = pair.items()
    for name, x in pair.items():
        check_float(name, x)
        check_rank(name, x, least, layout)
    if a.shape != b.shape:
        raise ValueError(
            f"{name_b} has shape {tuple(b.shape)} but {name_a} has {tuple(a.shape)}; both must be one {layout}"
        )


def check_logits(student_logits: Tensor, teacher_logits: Tensor, *, teacher: str = "teacher_logits") -> None:
    """Two (..., C) logit tensors over the same C classes; `teacher` is the second argument's public name."""
    for name, x in (("student_logits", student_logits), (teacher, teacher_logits)):
        check_float(name, x)
        check_rank(name, x, 2, "(..., C)")
    if student_logits.shape[-1] != teacher_logits.shape[-1]:
        raise ValueError(
            f"{teacher} has {teacher_logits.shape[-1]} classes (shape {tuple(teacher_logits.shape)}) but "
            f"student_logits has {student_logits.shape[-1]} (shape {tuple(student_logits.shape)}); "
            "both must score the same classes in the same order: slice or map one of them first"
        )
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"{teacher} has shape {tuple(teacher_logits.shape)} but student_logits has "
            f"{tuple(student_logits.shape)}; both must be one (..., C)"
        )


def check_labels(labels: Tensor, logits: Tensor, *, of: str, classes: int | None) -> None:
    """Integer labels, one a row of `logits` (named `of`); below `classes` unless it is None."""
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels has dtype {labels.dtype}; it must hold integer class ids")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)} but {of} has {tuple(logits.shape)}; "
            f"it must be {tuple(logits.shape[:-1])}, one label a row"
        )
    if classes is not None and labels.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            raise ValueError(f"labels holds ids {low}..{high}; allowed: 0..{classes - 1}, the classes of {of}")


def check_batch_pair(least: int, **pair: Tensor) -> None:
    """Two floating-point (N, ...) tensors over the same N >= least examples; widths may differ."""
    (name_a, a), (name_b, b) = pair.items()
    for name, x in pair.items():
        check_float(name, x)
        check_rank(name, x, 2, "(N, ...)")
    if a.shape[0] != b.shape[0]:
        raise ValueError(
            f"{name_b} has {b.shape[0]} examples but {name_a} has {a.shape[0]}; rows must be the same examples"
        )
    if a.shape[0] < least:
        raise ValueError(f"{name_a} has {a.shape[0]} examples; this term needs at least {least}")

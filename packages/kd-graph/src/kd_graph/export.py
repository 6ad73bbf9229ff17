"""The student outside of Python's PyG: TorchScript, and ONNX with the extra `export`.

torch.jit.load("runs/x/export/student.pt")(features)
onnxruntime.InferenceSession("runs/x/export/student.onnx").run(None, {"x": features})
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import torch
from torch import nn

from kdcore.errors import InputError

KINDS = ("torchscript", "onnx")


def check(kind: str) -> None:
    """InputError where a format is unknown or its packages are not installed."""
    if kind not in KINDS:
        raise InputError(f"export: '{kind}' is unknown; allowed: {', '.join(KINDS)}")
    missing = [name for name in ("onnx", "onnxscript") if kind == "onnx" and importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"export: onnx needs {' and '.join(missing)}: install kd-graph[export]")


def write(student: nn.Module, folder: Path, kind: str, *, num_features: int) -> Path:
    """Writes `folder/student.pt` or `folder/student.onnx` and returns its path.

    student: maps x (n, F) float32 to logits (n, C), n free; F is `num_features`.
    """
    check(kind)
    return (
        to_torchscript(student, folder / "student.pt")
        if kind == "torchscript"
        else to_onnx(student, folder / "student.onnx", num_features=num_features)
    )


def to_torchscript(student: nn.Module, path: Path) -> Path:
    """A scripted module; it opens in C++ and with torch.jit.load, without PyG."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(student.eval()).save(str(path))
    return path


def to_onnx(student: nn.Module, path: Path, *, num_features: int) -> Path:
    """An ONNX graph with input `x` (n, F) and output `logits` (n, C), n free."""
    example = torch.zeros(2, num_features)
    torch.onnx.export(
        student.eval(),
        (example,),
        str(path),
        input_names=["x"],
        output_names=["logits"],
        dynamic_shapes={"x": {0: torch.export.Dim("n")}},
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    return path

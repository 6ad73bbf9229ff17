"""Masks of pruned weights: which entries stay zero, kept through training, files and export.

A mask is bool, True where the weight may differ from zero, and has the shape of the parameter whose name it bears. Its
file is a safetensors file of bits (`numpy.packbits`), with the shapes in the header's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kd_llm.engine.blocks import is_linear, is_transposed, matrix
from kd_llm.engine.sparse import Pattern
from kdcore.errors import InputError

MASKS, SPARSITY = "masks.safetensors", "sparsity.json"
FORMAT = "kd-masks-1"

Masks = dict[str, Tensor]


def masks_of(model: nn.Module, names: Iterable[str]) -> Masks:
    """(W != 0) of the named parameters, on the CPU: to be taken once, right after pruning."""
    return {name: (model.get_parameter(name).detach() != 0).cpu() for name in names}


class MaskedWeights:
    """The masked parameters of a model. `apply` sets what is masked to zero; call it after every optimiser step.

    Moments of an optimiser go on moving masked entries, so neither masked gradients nor a mask applied once is enough.
    Parameters are looked up at each call, so the model may be sharded by FSDP2 afterwards: the masks then follow the
    placements of their weights.
    Raises InputError for a mask without a parameter, or of another shape.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]):
        self._entries: list[tuple[nn.Module, str, str]] = []
        self._masks = dict(masks)
        for name, mask in masks.items():
            owner, _, leaf = name.rpartition(".")
            try:
                module, parameter = model.get_submodule(owner), model.get_parameter(name)
            except AttributeError:
                raise InputError(f"masks: {type(model).__name__} has no parameter '{name}'") from None
            if parameter.shape != mask.shape:
                raise InputError(
                    f"masks: '{name}' has shape {tuple(parameter.shape)}, its mask {tuple(mask.shape)}; masks need "
                    "whole parameters: attach them before the model is sharded, and shard with FSDP2"
                )
            self._entries.append((module, leaf, name))

    @torch.no_grad()
    def apply(self) -> None:
        for module, leaf, name in self._entries:
            weight = getattr(module, leaf)
            weight.mul_(self._mask(name, weight))

    def violations(self) -> int:
        """Number of masked entries that are not zero."""
        return sum(
            int(((getattr(module, leaf).detach() != 0) & ~self._mask(name, getattr(module, leaf))).sum())
            for module, leaf, name in self._entries
        )

    def _mask(self, name: str, weight: Tensor) -> Tensor:
        """The mask where the weight is: its device and, of a sharded weight, its placements."""
        mask = self._masks[name]
        if hasattr(weight, "placements") and not hasattr(mask, "placements"):
            from torch.distributed.tensor import distribute_tensor

            mask = distribute_tensor(mask.to(weight.device), weight.device_mesh, weight.placements)
        elif mask.shape != weight.shape:
            raise InputError(
                f"masks: '{name}' is sharded to shape {tuple(weight.shape)}; shard with FSDP2 (fsdp_version: 2), which "
                "keeps the shape of parameters, or train with DDP"
            )
        self._masks[name] = mask = mask.to(weight.device)
        return mask


# ---------------------------------------------------------------- files


def save_masks(masks: Mapping[str, Tensor], path: Path) -> None:
    """Writes one bit an entry; see the module."""
    from safetensors.torch import save_file

    packed = {name: torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1))) for name, mask in masks.items()}
    shapes = json.dumps({name: list(mask.shape) for name, mask in masks.items()})
    save_file(packed, path, metadata={"format": FORMAT, "shapes": shapes})


def load_masks(path: Path) -> Masks:
    """The masks of a file. Raises InputError that names the file when it is missing, damaged or something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise InputError(f"masks {path}: not a file of masks (format {metadata.get('format')!r})")
            shapes = {name: tuple(shape) for name, shape in json.loads(metadata["shapes"]).items()}
            return {name: _unpacked(file.get_tensor(name), shape) for name, shape in shapes.items()}
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"masks {path}: cannot be read ({' '.join(str(error).split())})") from None


def _unpacked(bits: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    count = int(np.prod(shape))
    if bits.size != (count + 7) // 8:
        raise ValueError(f"{bits.size} bytes for a mask of {count} entries")
    return torch.from_numpy(np.unpackbits(bits, count=count).astype(bool)).view(shape)


def sparsity_report(model: nn.Module, masks: Mapping[str, Tensor], pattern: Pattern) -> dict[str, Any]:
    """What `sparsity.json` holds: the pattern, the share of exact zeros over all pruned weights, and each weight's."""
    weights: dict[str, Any] = {}
    for name in masks:
        weight = model.get_parameter(name)
        weights[name] = {"shape": list(weight.shape), "zeros": int((weight == 0).sum())}
    total = sum(int(np.prod(entry["shape"])) for entry in weights.values())
    zeros = sum(entry["zeros"] for entry in weights.values())
    return {"pattern": str(pattern), "sparsity": zeros / total if total else 0.0, "masks": MASKS, "weights": weights}


# ---------------------------------------------------------------- export


def check_pattern(model: nn.Module, names: Iterable[str], pattern: Pattern) -> None:
    """Raises InputError unless every group of M inputs of the named weights has at most N entries that are not zero."""
    for name in names:
        weight = matrix(model.get_submodule(name.removesuffix(".weight")))
        pattern.check(weight.shape[1], name)
        groups = weight.detach().unflatten(1, (-1, pattern.group))
        worst = int((groups != 0).sum(-1).max())
        if worst > pattern.keep:
            raise InputError(f"'{name}' is not {pattern}: a group of {pattern.group} inputs has {worst} non-zeros")


def to_semi_structured(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Turns the named 2:4 weights into `torch.sparse` semi-structured ones, in place, for inference. Returns model.

    The sparse kernels are CUDA's: a GPU of compute capability 8.0 or more, weights in float16 or bfloat16, at least 32
    rows and 64 columns (`torch.sparse.to_sparse_semi_structured`). A `Conv1D` becomes the `nn.Linear` it computes.
    Such a model is not for saving; save the dense one, whose zeros are exact, and convert after loading.
    Raises InputError: a weight is not 2:4, not on such a GPU, or not in half precision.
    """
    names = list(names)
    check_pattern(model, names, Pattern.parse("2:4"))
    for name in names:
        weight = model.get_parameter(name)
        if not weight.is_cuda or torch.cuda.get_device_capability(weight.device) < (8, 0):
            raise InputError(
                f"'{name}' is on {weight.device}: semi-structured kernels need a CUDA GPU of capability 8.0 or more; "
                "on other devices use the model as it is"
            )
        if weight.dtype not in (torch.float16, torch.bfloat16):
            raise InputError(f"'{name}' is {weight.dtype}: semi-structured kernels need float16 or bfloat16")
    for name in names:
        owner = name.removesuffix(".weight")
        linear = as_linear(model.get_submodule(owner))
        linear.weight = nn.Parameter(
            torch.sparse.to_sparse_semi_structured(linear.weight.detach().contiguous()), requires_grad=False
        )
        model.set_submodule(owner, linear)
    return model


def as_linear(module: nn.Module) -> nn.Linear:
    """The `nn.Linear` that computes what a linear layer computes; a plain one is returned itself."""
    if not is_linear(module):
        raise InputError(f"{type(module).__name__} is not a linear layer")
    if not is_transposed(module):
        return module  # type: ignore[return-value]
    outputs, inputs = matrix(module).shape
    linear = nn.Linear(inputs, outputs, device=module.weight.device, dtype=module.weight.dtype)
    linear.weight = nn.Parameter(matrix(module).detach().contiguous(), module.weight.requires_grad)
    linear.bias = module.bias
    return linear

"""torch.save files of other frameworks: read without running code from them, loaded strictly, written plainly.

A checkpoint here is a state dict, or, as mmengine writes it, a mapping with one under `state_dict` and plain `meta`.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdcore.errors import InputError


def read_checkpoint(path: str | Path, field: str) -> dict[str, Any]:
    """`state_dict` and `meta` of a checkpoint with plain content, never running code from it.

    Raises InputError, which names the config's `field`, where the file is missing or holds anything else.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"{field} = '{path}': no such file")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(
            f"{field} = '{path}': holds more than tensors and plain values ({' '.join(str(error).split())[:200]}); "
            "open it where you trust it and keep its state_dict: "
            "torch.save({'state_dict': checkpoint['state_dict'], 'meta': {}}, path)"
        ) from None
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{field} = '{path}': expected a state dict, or a checkpoint with one under 'state_dict'")
    return {"state_dict": state, "meta": dict(loaded.get("meta") or {}) if "state_dict" in loaded else {}}


def load_strictly(network: nn.Module, path: str | Path, field: str) -> dict[str, Any]:
    """Loads a checkpoint whose names and shapes are the network's and returns its meta; DDP's `module.` may lead them.

    Raises InputError with the first names that do not fit, or as `read_checkpoint`.
    """
    checkpoint = read_checkpoint(path, field)
    own = network.state_dict()
    given = {name.removeprefix("module."): value for name, value in checkpoint["state_dict"].items()}
    wrong = [name for name, value in given.items() if name in own and own[name].shape != value.shape]
    missing, extra = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    if missing or extra or wrong:
        problems = {"missing": missing, "unexpected": extra, "of another shape": wrong}
        said = "; ".join(f"{what}: {_some(names)}" for what, names in problems.items() if names)
        raise InputError(f"{field} = '{path}': does not fit {type(network).__name__}: {said}")
    network.load_state_dict(given)
    return checkpoint["meta"]


def _some(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def plain(value: Any, where: str = "meta") -> Any:
    """`value` with tensors, numbers, text, lists and mappings of text only; InputError names anything else."""
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, where) for item in value]
    if value is None or isinstance(value, str | int | float | bool | Tensor):
        return value
    if hasattr(value, "tolist"):
        return value.tolist()
    raise InputError(f"{where}: a {type(value).__name__} is no plain value")


def plain_state(value: Any, where: str = "checkpoint") -> Any:
    """`plain` with keys and tuples as they are: optimisers number their states."""
    if isinstance(value, Mapping):
        return {key: plain_state(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(plain_state(item, where) for item in value)
    return [plain_state(item, where) for item in value] if isinstance(value, list) else plain(value, where)

"""Content hashes of models and data: what a cache is checked against before it stands in for a teacher."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdcore.errors import InputError


def module_fingerprint(module: nn.Module | Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes of a state dict, in the order of names: "sha256:<hex>"."""
    state = module.state_dict() if isinstance(module, nn.Module) else module
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name]
        if not isinstance(value, Tensor):
            raise InputError(f"state dict entry {name!r}: given {type(value).__name__}, allowed: tensors")
        _update(digest, name, value)
    return f"sha256:{digest.hexdigest()}"


def data_fingerprint(*parts: Any) -> str:
    """sha256 over numbers, strings, bytes, tensors, arrays, lists, dicts, and the contents of files given as `Path`.

    >>> data_fingerprint("wikitext", {"split": "train", "length": 512})[:15]
    'sha256:9693285d'
    """
    digest = hashlib.sha256()
    for part in parts:
        _update(digest, "", part)
    return f"sha256:{digest.hexdigest()}"


def _update(digest: Any, name: str, value: Any) -> None:
    """Feeds a typed, length-delimited form of the value: no two different values give the same bytes."""
    if hasattr(value, "__array__") and not isinstance(value, Tensor):
        value = torch.as_tensor(value)
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        content, tag = flat.numpy().data, f"{value.dtype} {tuple(value.shape)}"
    elif isinstance(value, Path):
        content, tag = value.read_bytes(), "file"
    elif isinstance(value, bytes):
        content, tag = value, "bytes"
    elif isinstance(value, str | int | float | bool | None):
        content, tag = repr(value).encode(), type(value).__name__
    elif isinstance(value, Mapping):
        content, tag = b"", f"mapping {len(value)}"
    elif isinstance(value, Sequence):
        content, tag = b"", f"sequence {len(value)}"
    else:
        allowed = "numbers, strings, bytes, tensors, arrays, lists, dicts, Path"
        raise InputError(f"data_fingerprint: given {type(value).__name__}, allowed: {allowed}")
    digest.update(json.dumps([name, tag, len(content)]).encode())
    digest.update(content)
    if isinstance(value, Mapping):
        for key in sorted(value, key=repr):
            _update(digest, repr(key), value[key])
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for item in value:
            _update(digest, "", item)

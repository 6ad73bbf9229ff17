"""Checkpoints that are whole or absent, and safe to open.

A checkpoint is a folder `step-00000123` with `model.safetensors`, `state.pt` (tensors and plain values, read with
`weights_only=True`), optionally `best.safetensors`, and `manifest.json` with every file's SHA-256. It is written under
a temporary name, flushed to disk and renamed, so that a killed process leaves either a whole checkpoint or none.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdcore.errors import InputError

PREFIX = "step-"
TRAINER_PREFIX = "checkpoint-"  # of another framework's trainer, where a stage runs it: other files, the same manifest


@dataclass
class Checkpoint:
    """`model`: tensors of the distiller without frozen parts. `state`: everything else. `best`: weights or None."""

    step: int
    model: Mapping[str, Tensor]
    state: Mapping[str, Any]
    best: Mapping[str, Tensor] | None = None


def save(folder: Path, checkpoint: Checkpoint, *, keep: int = 2) -> Path:
    """Writes `folder/step-N` atomically and removes all but the newest `keep` checkpoints. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{PREFIX}{checkpoint.step:08d}"
    temporary = folder / f".{final.name}.tmp"
    for stale in folder.glob(f".{PREFIX}*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)
    temporary.mkdir()
    save_file(_plain(checkpoint.model), temporary / "model.safetensors")
    if checkpoint.best is not None:
        save_file(_plain(checkpoint.best), temporary / "best.safetensors")
    torch.save(dict(checkpoint.state), temporary / "state.pt")
    manifest = {"step": checkpoint.step, "files": {p.name: sha256(p) for p in sorted(temporary.iterdir())}}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2))
    for path in temporary.iterdir():
        sync(path)
    sync(temporary)
    if final.exists():
        shutil.rmtree(final)
    os.rename(temporary, final)
    sync(folder)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint. Raises InputError that names the broken file, and the newest older one that is good."""
    check(path, [older for older in checkpoints(path.parent) if older.name < path.name])
    best = path / "best.safetensors"
    try:
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(f"checkpoint {path}: state.pt holds more than tensors and plain values ({error})") from None
    return Checkpoint(
        step=json.loads((path / "manifest.json").read_text())["step"],
        model=load_file(path / "model.safetensors"),
        state=state,
        best=load_file(best) if best.is_file() else None,
    )


def check(path: Path, older: Sequence[Path]) -> None:
    """Raises InputError where a checkpoint is damaged, with the newest of the `older` ones that is good."""
    problem = fault(path)
    if problem:
        good = [one for one in older if not fault(one)]
        hint = f"; {good[-1].name} is good: remove {path.name} to go on from it" if good else "; no older one is good"
        raise InputError(f"checkpoint {path}: {problem}{hint}")


def save_trainer_state(folder: Path, state: Mapping[str, Any], step: int, name: str) -> Path:
    """Writes `folder/checkpoint-N/<name>` with its manifest atomically and returns the checkpoint: another framework's
    state in its own file, of tensors and plain values. Older checkpoints stay."""
    final = folder / f"{TRAINER_PREFIX}{step:08d}"
    temporary = folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    torch.save(state, temporary / name)
    sync(temporary / name)
    manifest = {"step": step, "files": {name: sha256(temporary / name)}}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2))
    shutil.rmtree(final, ignore_errors=True)
    os.rename(temporary, final)
    return final


def trainer_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of another framework's trainer in a folder, oldest first where `save_trainer_state` made them."""
    return sorted(path for path in folder.glob(f"{TRAINER_PREFIX}*") if path.is_dir())


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.is_dir())


def latest(folder: Path) -> Path | None:
    """The newest checkpoint, or None."""
    found = checkpoints(folder)
    return found[-1] if found else None


def last_good(run: Path) -> Path | None:
    """The newest whole checkpoint anywhere in a run directory, for messages about a failed run."""
    folder = run / "checkpoints"
    found = [*folder.glob(f"*/{PREFIX}*"), *folder.glob(f"*/{TRAINER_PREFIX}*")]
    found.sort(key=lambda path: path.stat().st_mtime)
    return next((path for path in reversed(found) if not fault(path)), None)


def fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    if not path.is_dir():
        return "no such checkpoint"
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        step, files = int(manifest["step"]), dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return "manifest.json is missing or unreadable"
    if path.name.startswith(PREFIX) and path.name != f"{PREFIX}{step:08d}":
        return f"manifest.json is of step {step}"
    needed = {} if path.name.startswith(TRAINER_PREFIX) else {"model.safetensors": None, "state.pt": None}
    for name, expected in {**needed, **files}.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if sha256(path / name) != expected:
            return f"{name} is corrupt (its SHA-256 differs from the manifest)"
    return None


def load_weights(path: Path) -> dict[str, Tensor]:
    """A safetensors file; InputError that names it when it is missing or broken."""
    if not path.is_file():
        raise InputError(f"weights {path}: no such file")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"weights {path}: not a readable safetensors file ({error})") from None


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU: safetensors takes neither shared memory (tied weights) nor strided views."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def sha256(path: Path) -> str:
    """Of a file's content, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flushes a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------- random generators


def rng_state() -> dict[str, Any]:
    """State of Python's, numpy's and torch's generators (CPU and every CUDA device) as tensors and plain values."""
    version, internal, gauss = random.getstate()
    generator: Any = np.random.get_state(legacy=True)  # numpy types it as tuple or dict; legacy is the tuple
    name, keys, position, has_gauss, cached = generator
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """The counterpart of `rng_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])

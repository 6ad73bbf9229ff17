"""What a run ran on: interpreter, packages, devices and the state of the user's repository."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any


def describe(distribution: str | None, *, device: str, processes: int) -> dict[str, Any]:
    """The content of environment.json. `distribution` is the package of the method, or None where it has none."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu": gpu,
        "device": device,
        "processes": processes,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "commit": commit(Path.cwd()),
        "packages": packages(distribution),
    }


def packages(distribution: str | None) -> dict[str, str]:
    """Versions of kdcore, of the method's package, and of what both depend on."""
    names = ["kdcore", *([distribution] if distribution else [])]
    for name in tuple(names):
        names += _dependencies(name)
    found = {}
    for name in dict.fromkeys(names):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # optional, or not installed on this platform
            continue
    return found


def _dependencies(distribution: str) -> list[str]:
    try:
        lines = requires(distribution) or []
    except PackageNotFoundError:
        return []
    return [re.split(r"[\s\[<>=!~;(@]", line, maxsplit=1)[0].lower() for line in lines if "extra ==" not in line]


def commit(folder: Path) -> str | None:
    """Commit of the git repository around `folder`, with `-dirty` where tracked files differ; None without one."""
    try:
        head = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}-dirty" if changed else head


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

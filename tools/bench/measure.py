"""What the benchmarks share: interleaved timing, peak memory of this process, and what it runs on."""

from __future__ import annotations

import gc
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

MIB = 2**20


def resident(field: str) -> int:
    """A field of /proc/self/status in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status: no field {field}")


class PeakMemory:
    """`.extra`: bytes by which the block's peak exceeds what was in use before it.

    CPU: the kernel's high-water mark of resident memory, reset through /proc/self/clear_refs. CUDA: torch's allocator.
    """

    def __init__(self, device: str = "cpu"):
        self.device, self.extra = device, 0

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self.before = resident("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        if self.device == "cuda":
            import torch

            self.extra = torch.cuda.max_memory_allocated() - self.before
        else:
            self.extra = resident("VmHWM") - self.before


def in_subprocess(script: str, name: str, options: Sequence[str]) -> Any:
    """What `script --child name` prints as its last line, JSON: a contender's peak memory in a process of its own."""
    command = [sys.executable, script, "--child", name, *options]
    # A fixed threshold, so that glibc gives every freed tensor back and the high-water mark is the tensors' own.
    settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=settings)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def environment(*packages: str) -> dict[str, Any]:
    """Python, torch, processor, accelerator and the versions of the named packages (None where not installed)."""
    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    found |= {"processor": processor(), "cores": os.cpu_count()}
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def processor() -> str:
    """The processor's name as the kernel gives it, else the platform's."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


# ---------------------------------------------------------------- timing


def pick_device(*, threads: int, cpu: bool) -> Any:
    """The GPU where there is one and the CPU is not asked for."""
    import torch

    torch.set_num_threads(threads)
    return torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")


def seconds_per_step(steps: Iterator[None], count: int, device: Any) -> float:
    """Seconds per step of the next `count` steps."""
    import torch

    start = time.perf_counter()
    for _ in range(count):
        next(steps)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def interleaved(
    running: Mapping[str, Iterator[None]], device: Any, *, warmup: int, rounds: int, size: int
) -> dict[str, list[float]]:
    """Seconds per step of every contender in each round, in an order that is drawn anew each round."""
    for steps in running.values():
        seconds_per_step(steps, warmup, device)
    seconds: dict[str, list[float]] = {name: [] for name in running}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(running), len(running)):
            seconds[name].append(seconds_per_step(running[name], size, device))
    return seconds

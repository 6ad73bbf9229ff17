"""Seconds until a field reaches the quality of one that is trained on photographs: distilled against from scratch.

Both arms train the same student field with nerfstudio's Trainer, for the same steps, with the same optimiser, rays and
validations; only training counts, not validation. Per seed: the goal is the PSNR that the student from scratch ends
with on the test views, and the share is the time of the distilled one until it has it over the whole time of the
other. The teacher's training is given beside it and is not part of the share: it exists before.

    python tools/bench/nerf.py --seeds 3 --output tools/bench/results/nerf.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from measure import environment


def train(name: str, overrides: list[str], seed: int, folder: Path, cpu: bool) -> dict[str, Any]:
    """The validations over time of teacher and student of one run."""
    from kdcore import run
    from kdcore.method import load_config

    method, config = load_config(name, [*overrides, f"seed={seed}"])
    metrics = run.train(method, config, folder, quiet=True, cpu=cpu)
    curves = {role: json.loads((folder / role / "curve.json").read_text()) for role in ("teacher", "student")}
    return {"curve": curves["student"], "teacher_curve": curves["teacher"], "metrics": run.scalars(metrics)}


def seconds_to(curve: list[dict[str, float]], goal: float) -> float | None:
    """When a curve first has a PSNR of `goal`, at the resolution of its validations; None where it never has."""
    return next((point["seconds"] for point in curve if point["psnr"] >= goal), None)


def compared(scratch: dict[str, Any], distilled: dict[str, Any]) -> dict[str, Any]:
    """One seed: the goal, and both times to it."""
    last = scratch["curve"][-1]
    reached = seconds_to(distilled["curve"], last["psnr"])
    return {
        "goal_psnr": last["psnr"],
        "scratch_seconds": last["seconds"],
        "distilled_seconds": reached,
        "share": None if reached is None else reached / last["seconds"],
        "distilled_psnr": distilled["curve"][-1]["psnr"],
        "distilled_total_seconds": distilled["curve"][-1]["seconds"],
        "teacher_psnr": distilled["metrics"]["teacher/psnr"],
        "teacher_seconds": distilled["teacher_curve"][-1]["seconds"],
        "curves": {"scratch": scratch["curve"], "distilled": distilled["curve"]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="pvd/small")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="leave an accelerator alone")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the config")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    rows = []
    print(f"{'seed':>4} {'goal dB':>8} {'scratch s':>10} {'distilled s':>12} {'share':>6} {'final dB':>9}")
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            runs = {
                name: train(arguments.config, [*arguments.set, *more], seed, Path(folder) / name, arguments.cpu)
                for name, more in (("scratch", ["method_args.from_scratch=true"]), ("distilled", []))
            }
        row = {"seed": seed, **compared(runs["scratch"], runs["distilled"])}
        rows.append(row)
        reached, share = row["distilled_seconds"], row["share"]
        shown = ("never", "") if reached is None else (f"{reached:.1f}", f"{share:.2f}")
        print(
            f"{seed:4} {row['goal_psnr']:8.2f} {row['scratch_seconds']:10.1f} {shown[0]:>12} {shown[1]:>6} "
            f"{row['distilled_psnr']:9.2f}",
            flush=True,
        )
        write(arguments, rows)


def write(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The result so far, after every seed."""
    shares = [row["share"] for row in rows if row["share"] is not None]
    result = {
        "environment": environment("nerfstudio", "nerfacc", "tinycudann"),
        "config": arguments.config,
        "overrides": arguments.set,
        "threads": arguments.threads,
        "reached": len(shares),
        "median_share": statistics.median(shares) if shares else None,
        "seeds": rows,
    }
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Pictures of the report: one noise through the teacher and the student, at several points of the training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_diffusion import evaluation as ev
from kd_diffusion.data import Data, load_data
from kd_diffusion.engine.timesteps import levels
from kd_diffusion.integrations.pipelines import Opened
from kd_diffusion.snapshots import COUNT, SEED

PATH_STEPS = 50  # of the teacher's path
PATH_SHOWN = 6  # of its predictions, evenly spread
SNAPSHOTS = 4  # shown at most, evenly spread over the training
POINTS = 2000  # of a picture of points
Row = dict[str, Any]


def comparison(
    config: Any,
    artefacts: dict[str, Path],
    count: int,
    *,
    student: Callable[[Opened], ev.Generate],
    data: Data | None = None,
    stage: str | None = None,
) -> list[Row]:
    """Rows `{"caption": what was asked for, "images": {column: uint8 array}}` for the report.

    Columns: the predictions along the teacher's path, its last one, the student's snapshots and the student; all
    from the same noise. Points are drawn as one picture of their density each. `student(teacher)` gives the sampler;
    `data` replaces the run's where the student cannot serve all of it, and `stage` names the one stage whose snapshots
    were asked for the same.
    """
    from kd_diffusion.runs import open_teacher

    data = data or load_data(config.data, config.seed)
    teacher = open_teacher(config, artefacts, data).to(ev.run_device())
    snapshots = _snapshots(artefacts["student"].parent / "snapshots", stage)
    kappa = config.method_args.guidance_scale
    if data.mixture is not None:
        return [_points_row(teacher, student(teacher), data)]
    wanted = ev.requests(teacher, data.asked, COUNT)  # all: the noise of a second step follows that of all samples
    path = _path(teacher, wanted, kappa)
    own = ev.generate(teacher, wanted, student(teacher), seed=SEED, batch_size=COUNT)
    rows = []
    for index in range(min(count, wanted.count)):
        images = {"teacher, its path": strip([frame[index] for frame in path])}
        images[f"teacher, {PATH_STEPS} steps"] = picture(path[-1][index])
        images |= {name: picture(pixels[index]) for name, pixels in snapshots.items()}
        images["student"] = picture(own[index])
        rows.append({"caption": _caption(wanted, data, index), "images": images})
    return rows


def picture(pixels: Tensor) -> np.ndarray:
    """(C, H, W) in [-1, 1] -> uint8 (H, W) or (H, W, 3)."""
    values = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return values[:, :, 0] if values.shape[2] == 1 else values


def strip(frames: list[Tensor]) -> np.ndarray:
    """Pictures side by side with a thin gap."""
    pictures = [picture(frame) for frame in frames]
    gap = np.full((pictures[0].shape[0], 1, *pictures[0].shape[2:]), 255, dtype=np.uint8)
    return np.concatenate([part for image in pictures for part in (image, gap)][:-1], axis=1)


def density(points: Tensor, extent: float, bins: int = 96) -> np.ndarray:
    """(N, 2) -> uint8 (bins, bins): how many points fall where, dark on light, by the root of the count."""
    counts, _, _ = np.histogram2d(points[:, 1], points[:, 0], bins=bins, range=[[-extent, extent]] * 2)
    shade = np.sqrt(counts / max(1.0, float(np.quantile(counts[counts > 0], 0.98)) if counts.any() else 1.0))
    return (255 * (1 - shade.clip(0, 1)))[::-1].astype(np.uint8)


def _path(teacher: Opened, wanted: ev.Requests, kappa: float) -> list[Tensor]:
    """Pixels of the teacher's predictions at a few of its steps, the last one included."""
    steps = min(PATH_STEPS, teacher.process.size)
    shown = sorted({round(k * (steps - 1) / (PATH_SHOWN - 1)) for k in range(PATH_SHOWN)})
    indices = levels(teacher.process, steps)
    frames = []
    for step in shown:

        def function(condition: Any, draw: Any, step: int = step) -> Tensor:
            z = draw.normal((draw.count, *teacher.space.shape))
            return ev.trajectory(teacher, condition, z, indices[: step + 1], kappa)[-1]

        frames.append(ev.generate(teacher, wanted, function, seed=SEED, batch_size=COUNT))
    return frames


def _points_row(teacher: Opened, student: ev.Generate, data: Data) -> Row:
    from kd_diffusion.worlds.mixture import flat

    wanted = ev.Requests({"index": torch.arange(POINTS)}, None, None, POINTS)
    extent = float(data.train.pixels.abs().max()) * 1.05
    images = {"data": density(flat(data.train.pixels[:POINTS]).double(), extent)}
    for name, function in (("teacher, 50 steps", ev.teacher_function(teacher, 50)), ("student", student)):
        points = ev.generate(teacher, wanted, function, seed=SEED, batch_size=POINTS)
        images[name] = density(flat(points).double(), extent)
    return {"caption": f"{POINTS} points", "images": images}


def _snapshots(folder: Path, stage: str | None = None) -> dict[str, Tensor]:
    """Column name -> pixels (8, C, H, W), of the first, the last and some snapshots between; of one stage or of all."""
    files = sorted(folder.glob("*.npy")) if folder.is_dir() else []
    files = [file for file in files if stage in (None, file.stem.rpartition("-")[0])]
    chosen = sorted({round(k * (len(files) - 1) / (SNAPSHOTS - 1)) for k in range(SNAPSHOTS)}) if files else []
    found = {}
    for index in chosen:
        own, _, step = files[index].stem.rpartition("-")
        name = f"step {int(step)}" if own in ("student", stage) else f"{own}, step {int(step)}"
        found[name] = torch.from_numpy(np.load(files[index], allow_pickle=False))
    return found


def _caption(wanted: ev.Requests, data: Data, index: int) -> str:
    if wanted.by_text and wanted.prompts is not None:
        return wanted.prompts[index]
    return "" if wanted.labels is None else data.class_names[int(wanted.labels[index])]

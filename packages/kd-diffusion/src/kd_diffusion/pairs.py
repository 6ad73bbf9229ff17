"""Noise-sample pairs of a teacher, and the distances that a regression on them uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from kd_diffusion import evaluation as ev
from kd_diffusion.data import Part
from kd_diffusion.engine import timesteps
from kd_diffusion.engine.conditions import Condition, take
from kd_diffusion.engine.draws import Draws
from kd_diffusion.integrations.pipelines import Opened
from kdcore.config import Config
from kdcore.errors import InputError


class RegressionConfig(Config):
    weight: float = Field(0.25, gt=0, description="lambda_reg")
    pairs: int = Field(1000, ge=1, description="noise-sample pairs of the teacher, over all conditions")
    teacher_steps: int = Field(18, ge=1, description="steps of the teacher's deterministic sampler for a pair")
    distance: Literal["l2", "features", "lpips"] = Field(
        "lpips", description="on pixels; features: of the classifier that the metrics use"
    )
    filtered: bool = Field(False, description="ablation: only the pairs whose condition is the student's own")


@dataclasses.dataclass
class Pairs:
    """z, y (P, C, H, W), the condition of each pair, and the places of those that may be drawn."""

    z: Tensor
    y: Tensor
    condition: Condition
    places: Tensor


def write_pairs(
    folder: Path, opened: Opened, part: Part, settings: RegressionConfig, *, kappa: float, seed: int, batch: int = 256
) -> None:
    """The teacher's deterministic samples y of noise z, for the conditions of a part; one safetensors file."""
    wanted = ev.requests(opened, part, settings.pairs)
    condition = opened.conditioner.embed(wanted.batch)
    levels = timesteps.levels(opened.process, settings.teacher_steps)
    zs, ys = [], []
    for step, first in enumerate(range(0, wanted.count, batch)):
        rows = slice(first, min(first + batch, wanted.count))
        z = Draws(seed).at("pairs", step).normal((rows.stop - rows.start, *opened.space.shape))
        zs.append(z)
        ys.append(ev.trajectory(opened, take(condition, rows), z, levels, kappa)[-1])
    folder.mkdir(exist_ok=True)
    held = {f"condition.{name}": value.contiguous() for name, value in condition.items()}
    save_file({"z": torch.cat(zs), "y": torch.cat(ys), **held}, folder / "pairs.safetensors")


def read_pairs(folder: Path) -> Pairs:
    """What `write_pairs` wrote."""
    tensors = load_file(folder / "pairs.safetensors")
    condition = {name.removeprefix("condition."): v for name, v in tensors.items() if name.startswith("condition.")}
    return Pairs(tensors["z"], tensors["y"], condition, torch.arange(len(tensors["z"])))


def distance_of(regression: RegressionConfig | None, features: Path | None) -> Callable[[Tensor, Tensor], Tensor]:
    """l(x, y) on pixels -> scalar."""
    if regression is None or regression.distance == "l2":
        return F.mse_loss
    if regression.distance == "features":
        from kd_diffusion.metrics import load_features

        assert features is not None
        net = load_features(features).requires_grad_(False)
        return lambda x, y: F.mse_loss(net.features(x), net.features(y))
    return lpips()


def lpips() -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS (arXiv 1801.03924) of torchmetrics; InputError where its weights cannot be had."""
    try:
        from torchmetrics.functional.image.lpips import _LPIPS

        net = _LPIPS(pretrained=True, net="vgg").eval().requires_grad_(False)
    except (OSError, ImportError, RuntimeError) as error:
        raise InputError(
            f"method_args.regression.distance = 'lpips': its weights cannot be had ({error}); give l2 or features"
        ) from None

    def distance(x: Tensor, y: Tensor) -> Tensor:
        x, y = (v.expand(-1, 3, -1, -1) if v.shape[1] == 1 else v for v in (x, y))
        return net.to(x.device)(x, y).mean()

    return distance

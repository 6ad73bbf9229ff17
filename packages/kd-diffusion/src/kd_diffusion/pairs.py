"""Noise-sample pairs of a teacher, and the distances that a regression on them uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kd_diffusion import evaluation as ev
from kd_diffusion.data import Part
from kd_diffusion.engine import timesteps
from kd_diffusion.engine.conditions import Condition
from kd_diffusion.engine.draws import Draws
from kd_diffusion.integrations.pipelines import Opened
from kd_diffusion.integrations.routed import Router
from kdcore.config import Config
from kdcore.errors import InputError


class RegressionConfig(Config):
    weight: float = Field(0.25, ge=0, description="lambda_reg")
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
    folder: Path,
    opened: Opened,
    part: Part,
    settings: RegressionConfig,
    *,
    kappa: float,
    seed: int,
    device: torch.device | str = "cpu",
    batch: int = 256,
) -> None:
    """The teacher's deterministic samples y of noise z, for conditions drawn from a part; one safetensors file.

    The networks of `opened` are left on `device`.
    """
    # Folders come class by class: the first samples would be those of a few conditions.
    part = part.subset(np.random.default_rng([seed, 43]).permutation(len(part))[: settings.pairs])
    wanted = ev.requests(opened, part, settings.pairs)
    for module in (opened.denoiser, opened.conditioner):
        if isinstance(module, nn.Module):
            module.to(device)
    levels = timesteps.levels(opened.process, settings.teacher_steps)
    found: list[dict[str, Tensor]] = []
    for step, first in enumerate(range(0, wanted.count, batch)):
        rows = slice(first, min(first + batch, wanted.count))
        condition = opened.conditioner.embed({name: value[rows].to(device) for name, value in wanted.batch.items()})
        z = Draws(seed).at("pairs", step, device=device).normal((rows.stop - rows.start, *opened.space.shape))
        y = ev.trajectory(opened, condition, z, levels, kappa)[-1]
        found.append({"z": z, "y": y, **{f"condition.{name}": value for name, value in condition.items()}})
    folder.mkdir(exist_ok=True)
    held = {name: torch.cat([piece[name] for piece in found]).cpu().contiguous() for name in found[0]}
    save_file(held, folder / "pairs.safetensors")


def read_pairs(folder: Path) -> Pairs:
    """What `write_pairs` wrote."""
    tensors = load_file(folder / "pairs.safetensors")
    condition = {name.removeprefix("condition."): v for name, v in tensors.items() if name.startswith("condition.")}
    return Pairs(tensors["z"], tensors["y"], condition, torch.arange(len(tensors["z"])))


def drawn_pairs(folder: Path, regression: RegressionConfig, router: Router, k: int) -> Pairs:
    """The pairs of all conditions; in the ablation only those of student k, and InputError where there are none."""
    pairs = read_pairs(folder)
    if regression.filtered:
        pairs.places = torch.nonzero(router.route(pairs.condition) == k).flatten()
        if len(pairs.places) == 0:
            raise InputError(f"method_args.regression.pairs = {regression.pairs}: none is of student {k}; give more")
    return pairs


def distance_of(regression: RegressionConfig | None, features: Path | None) -> Callable[[Tensor, Tensor], Tensor]:
    """l(x, y) on pixels in [-1, 1] -> scalar."""
    if regression is None or regression.distance == "l2":
        return F.mse_loss
    if regression.distance == "features":
        from kd_diffusion.metrics import load_features

        assert features is not None
        net = load_features(features).requires_grad_(False)
        return lambda x, y: F.mse_loss(net.to(x.device).features(x), net.features(y))
    return lpips()


def lpips() -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS (arXiv 1801.03924) with VGG; images below 256 pixels are enlarged to 224, as is usual for distillation
    (arXiv 2303.01469). InputError where its weights cannot be had: the first use downloads them."""
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        net = LearnedPerceptualImagePatchSimilarity(net_type="vgg").net.eval().requires_grad_(False)
    except (OSError, ImportError, RuntimeError) as error:
        raise InputError(
            f"method_args.regression.distance = 'lpips': its weights cannot be had ({error}); give l2 or features"
        ) from None
    return perceptual(net)


def perceptual(net: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """l(x, y) of a network (x, y) -> (B,) on colour images."""

    def shown(x: Tensor) -> Tensor:
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        return x if min(x.shape[-2:]) >= 256 else F.interpolate(x, (224, 224), mode="bilinear")

    return lambda x, y: net.to(x.device)(shown(x), shown(y)).mean()

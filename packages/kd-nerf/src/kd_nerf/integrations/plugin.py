"""What nerfstudio finds by its entry-point group `nerfstudio.method_configs`: the method `kd-pvd`.

ns-train kd-pvd --pipeline.teacher-checkpoint outputs/lego/nerfacto/... blender-data --data data/lego
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from nerfstudio.configs.base_config import ViewerConfig
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManagerConfig
from nerfstudio.engine.optimizers import OptimizerConfig
from nerfstudio.engine.schedulers import Scheduler, SchedulerConfig
from nerfstudio.plugins.types import MethodSpecification

from kd_nerf.integrations.model import RadianceModelConfig
from kd_nerf.integrations.pipeline import PVDPipelineConfig
from kd_nerf.integrations.settings import FieldSettings
from kd_nerf.integrations.trainer import ResumableTrainerConfig

METHOD_NAME = "kd-pvd"


@dataclass
class AdamWConfig(OptimizerConfig):
    """The defaults are the paper's, but for the rate, which depends on the architecture."""

    _target: type = torch.optim.AdamW
    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-15
    weight_decay: float = 0.01


class FollowingSchedule(Scheduler):
    """A factor on the rate as a function of the share of the budget that is done."""

    def get_scheduler(self, optimizer: torch.optim.Optimizer, lr_init: float) -> Any:
        config = self.config
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(config, step, lr_init))


@dataclass
class FollowingScheduleConfig(SchedulerConfig):
    """Cosine from the first rate to `lr_final`, the paper's schedule, or a constant rate."""

    _target: type = field(default_factory=lambda: FollowingSchedule)
    lr_final: float = 7e-5
    """Rate at the end of cosine."""
    max_steps: int = 30000
    """Steps from the first to the last rate."""
    shape: str = "cosine"
    """cosine or constant."""


def factor(config: FollowingScheduleConfig, step: int, lr_init: float) -> float:
    """The rate of a step over the first one."""

    if config.shape == "constant":
        return 1.0
    last = min(1.0, config.lr_final / lr_init)
    done = min(1.0, step / max(1, config.max_steps))
    return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * done))


def group(lr: float, steps: int, **schedule: Any) -> dict[str, Any]:
    """Optimiser and schedule of one group of parameters, as nerfstudio wants them."""
    return {"optimizer": AdamWConfig(lr=lr), "scheduler": FollowingScheduleConfig(max_steps=steps, **schedule)}


def network_rate(architecture: str) -> float:
    """The paper's rate of the nets: 1e-3 where they are large or read factors, else 1e-2."""
    return 1e-3 if architecture in ("mlp", "vm", "cp") else 1e-2


def trainer_config(architecture: str = "mlp", steps: int = 30000) -> ResumableTrainerConfig:
    """The paper's setting for a student of one architecture."""
    return ResumableTrainerConfig(
        method_name=METHOD_NAME,
        max_num_iterations=steps,
        steps_per_eval_batch=0,
        steps_per_save=2000,
        mixed_precision=True,
        pipeline=PVDPipelineConfig(
            datamanager=VanillaDataManagerConfig(train_num_rays_per_batch=4096, eval_num_rays_per_batch=4096),
            model=RadianceModelConfig(field=FieldSettings(architecture=architecture)),
        ),
        optimizers={"encodings": group(1e-2, steps), "networks": group(network_rate(architecture), steps)},
        viewer=ViewerConfig(num_rays_per_chunk=1 << 15),
        vis="viewer",
    )


METHOD = MethodSpecification(
    config=trainer_config(),
    description="Progressive volume distillation (arXiv 2211.15977): a trained field into another architecture.",
)

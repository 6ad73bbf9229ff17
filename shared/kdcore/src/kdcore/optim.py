"""From configs to torch optimisers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from kdcore.config import OptimizerConfig, ScheduleConfig, TrainConfig
from kdcore.distiller import Player
from kdcore.errors import InputError


def make_optimizer(player: Player, train: TrainConfig) -> torch.optim.Optimizer:
    """The player's optimiser over its trainable parameters; a group's `lr_scale` multiplies the base rate."""
    groups = _groups(player)
    if not any(group["params"] for group in groups):
        raise InputError(f"player '{player.name}': it has no trainable parameter")
    config = player.optimizer or train.optimizer
    if not isinstance(config, OptimizerConfig):
        return config(groups)
    for group in groups:
        group["lr"] = config.lr * group.pop("lr_scale", 1.0)
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.name == "rmsprop":
        return torch.optim.RMSprop(groups, momentum=config.momentum, eps=config.eps, **common)
    # One kernel for all parameters: small networks on a CPU spend a fifth of a step in the loop over them.
    common["fused"] = all(p.is_floating_point() for group in groups for p in group["params"])
    if config.name == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.nesterov, **common)
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(groups, betas=config.betas, eps=config.eps, **common)


def _groups(player: Player) -> list[dict[str, Any]]:
    if player.param_groups is not None:
        return [{**group, "params": list(group["params"])} for group in player.param_groups]
    return [{"params": [p for p in player.module.parameters() if p.requires_grad]}]


def schedule_factor(config: ScheduleConfig, step: int, steps: int, steps_per_epoch: int, base_lr: float = 1.0) -> float:
    """Factor on the base rate at optimiser step `step` (from 0) of `steps`.

    Warm-up over W units: (u + 1) / W for u < W. Then, with r = (u - W) / (U - W):
    cosine m + (1 - m)(1 + cos(pi r)) / 2, linear m + (1 - m)(1 - r), multistep gamma^(milestones passed).
    u counts steps, or epochs with `unit: epoch`; U is the whole budget in the same unit; m is `min_ratio`.
    From `hold_epoch` on the factor is hold_lr / base_lr, with `base_lr` the rate of the parameter group.
    """
    if config.hold_epoch is not None and config.hold_lr is not None and step >= config.hold_epoch * steps_per_epoch:
        return config.hold_lr / base_lr
    per_unit = steps_per_epoch if config.unit == "epoch" else 1
    unit, units = step // per_unit, max(1, math.ceil(steps / per_unit))
    scale = steps_per_epoch / per_unit  # units in an epoch
    warmup = round(config.warmup_epochs * scale)
    if unit < warmup:
        return (unit + 1) / warmup
    ratio = min(1.0, (unit - warmup) / max(1, units - warmup))
    floor = config.min_ratio
    if config.name == "cosine":
        return floor + (1 - floor) * (1 + math.cos(math.pi * ratio)) / 2
    if config.name == "linear":
        return floor + (1 - floor) * (1 - ratio)
    if config.name == "multistep":
        return config.gamma ** sum(unit >= round(epoch * scale) for epoch in config.milestones)
    return 1.0


def make_schedule(
    optimizer: torch.optim.Optimizer, player: Player, train: TrainConfig, steps: int, steps_per_epoch: int
) -> LambdaLR:
    """The schedule over the player's own optimiser steps, placed in the run's budget by `start` and `every`."""
    config = player.schedule or train.schedule

    def factor(base_lr: float) -> Callable[[int], float]:
        return lambda own: schedule_factor(config, player.start + own * player.every, steps, steps_per_epoch, base_lr)

    return LambdaLR(optimizer, [factor(group["lr"]) for group in optimizer.param_groups])

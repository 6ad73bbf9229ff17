"""The accelerator of a run, and clear refusals of what it could not do."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs

from kdcore.config import TrainConfig
from kdcore.errors import InputError

TRACKER_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "mlflow": ("mlflow",)}


def make_accelerator(
    train: TrainConfig, *, cpu: bool = False, seed: int = 0, folder: Path | None = None
) -> Accelerator:
    """The accelerator of a run: batch sizes are totals, data order is seeded, unused parameters are allowed.

    Raises: InputError for a tracker that is not installed, fp16 without an accelerator, DeepSpeed and Megatron-LM, and
    for processes that did not find each other.
    """
    # Without an accelerator, `cpu` is what makes accelerate form a gloo group instead of unrelated processes.
    cpu = cpu or not torch.accelerator.is_available()
    _check_environment(train, cpu)
    precision = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[train.precision]
    accelerator = Accelerator(
        mixed_precision=precision,
        cpu=cpu,
        log_with=list(train.trackers) or None,
        project_dir=folder,
        rng_types=[],  # nothing to synchronise: every order is a function of the seed
        dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, data_seed=seed),
        # Players and zero-weight terms leave parameters without a gradient in some turns.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if wanted > 1 and accelerator.num_processes == 1:
        raise InputError(
            f"WORLD_SIZE = {wanted}: the processes did not find each other, each would train on its own; "
            "start them with `accelerate launch --multi_gpu` (or `--cpu`), or with torchrun"
        )
    return accelerator


def _check_environment(train: TrainConfig, cpu: bool) -> None:
    """What accelerate would skip silently or answer with an error of its own."""
    for tracker in train.trackers:
        packages = TRACKER_PACKAGES[tracker]
        if not any(importlib.util.find_spec(package) for package in packages):
            raise InputError(f"train.trackers: '{tracker}' needs the package {' or '.join(packages)}: not installed")
    if train.precision == "fp16" and cpu:
        raise InputError("train.precision = 'fp16': needs an accelerator, and none is in use; use bf16 or fp32")
    for name in ("DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise InputError(f"accelerate launch: {name} is not supported, allowed: DDP and FSDP")

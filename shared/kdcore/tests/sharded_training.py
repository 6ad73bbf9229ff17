"""The toy run of `toy_training.py` with validation, sharded by FSDP2 when it is launched on several CPU processes.

    python sharded_training.py FOLDER [--resume] [--cut STEP] [--players 2] [--rule]

accelerate turns FSDP on for accelerators only, so the state it keeps is set by hand here.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import toy_training
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from kdcore.cli.session import leave_group
from kdcore.config import TrainConfig
from kdcore.training import TrainSetup

CONFIG = TrainConfig(
    steps=15,
    batch_size=8,
    accumulation=2,
    optimizer={"name": "adamw", "lr": 0.01},
    checkpoint_every=4,
    clip=1.0,
    monitor="score",
    mode="min",
    restore_best=True,
)


def sharded(accelerator):
    if accelerator.num_processes > 1:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, cpu_ram_efficient_loading=False, auto_wrap_policy="no_wrap"
        )
        for state in (PartialState, type(accelerator.state)):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    return accelerator


TRAINED: list[torch.nn.Module] = []


def evaluate(module: torch.nn.Module) -> dict[str, float]:
    assert isinstance(TRAINED[-1], FSDPModule) == (PartialState().num_processes > 1)
    assert not any(isinstance(parameter, DTensor) for parameter in module.parameters())
    data = toy_training.Points(noise=0.0)
    return {"score": float(torch.nn.functional.cross_entropy(module(data.x), data.y))}


def setup(distiller, loader) -> TrainSetup:
    TRAINED.append(distiller)
    return TrainSetup(distiller, loader, evaluate)


def cut_at(step: int) -> None:
    whole = toy_training.Toy.loss

    def loss(self, batch, player: str = "student"):
        if self.progress.step == step:
            raise SystemExit(3)
        return whole(self, batch, player)

    toy_training.Toy.loss = loss


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--cut", type=int)
    parser.add_argument("--players", type=int, default=1)
    parser.add_argument("--rule", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.cut is not None:
        cut_at(given.cut)
    make_accelerator = toy_training.make_accelerator
    toy_training.make_accelerator = lambda *a, **k: sharded(make_accelerator(*a, **k))
    toy_training.TrainSetup = setup
    options = {"dropout": 0.0, "players": given.players, "rule": given.rule}
    toy_training.run(given.folder, resume=given.resume, config=CONFIG, **options)
    leave_group()

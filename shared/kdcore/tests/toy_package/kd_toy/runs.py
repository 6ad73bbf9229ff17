"""What the toy methods share: data, networks, stages, evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kdcore.config import Config, RunConfig
from kdcore.data import seeded_loader
from kdcore.distiller import Distiller
from kdcore.errors import InputError
from kdcore.stages import Artefacts, Procedure, RunContext, Stage
from kdcore.training import TrainSetup, TrainStage

INPUTS, CLASSES = 6, 4


class Network(Config):
    """A network with one hidden layer."""

    width: int = Field(8, ge=1, description="hidden units")


class ToyRun(RunConfig):
    teacher: Network = Field(default_factory=lambda: Network(width=16), description="the teacher, as it is drawn")
    student: Network = Field(default_factory=Network)
    size: int = Field(48, ge=1, description="number of points")


def points(config: ToyRun) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(config.seed)
    x = torch.randn(config.size, INPUTS, generator=generator)
    return x, (x @ torch.randn(INPUTS, CLASSES, generator=generator)).argmax(1)


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(INPUTS, width), nn.ReLU(), nn.Linear(width, CLASSES))


def save(module: nn.Module, folder: Path) -> None:
    save_file(module.state_dict(), folder / "model.safetensors")


def load(folder: Path, width: int) -> nn.Module:
    module = network(width)
    module.load_state_dict(load_file(folder / "model.safetensors"))
    return module.eval()


def stages(config: Any, build: Callable[[nn.Module, nn.Module], Distiller]) -> list[Stage]:
    if config.student.width > config.teacher.width:
        raise InputError(f"student.width = {config.student.width}: more than the teacher's {config.teacher.width}")

    def teacher(context: RunContext) -> Artefacts:
        folder = context.folder / "teacher"
        if context.is_main:
            folder.mkdir(exist_ok=True)
            save(network(config.teacher.width), folder)
        context.accelerator.wait_for_everyone()
        return {"teacher": folder}

    def student(context: RunContext) -> TrainSetup:
        taught = load(context.artefacts["teacher"], config.teacher.width)
        data = list(zip(*points(config)))
        loader = seeded_loader(data, config.train.batch_size, seed=config.seed)
        return TrainSetup(build(taught, network(config.student.width)), loader)

    return [Procedure("teacher", teacher), TrainStage("student", config.train, student, save)]


@torch.no_grad()
def evaluate(config: Any, artefacts: Artefacts) -> dict[str, Any]:
    x, y = points(config)
    guesses = {role: load(artefacts[role], getattr(config, role).width)(x).argmax(1) for role in ("student", "teacher")}
    result: dict[str, Any] = {f"{role}/accuracy": (guess == y).float().mean() for role, guess in guesses.items()}
    result["agreement"] = (guesses["student"] == guesses["teacher"]).float().mean()
    pairs = torch.stack([y, guesses["student"]])
    counts = torch.zeros(CLASSES, CLASSES, dtype=torch.long)
    return {**result, "confusion_matrix": counts.index_put((pairs[0], pairs[1]), torch.tensor(1), accumulate=True)}

"""A small training run that the tests start, kill, resume and launch on several processes.

python toy_training.py FOLDER [--resume] [--steps N] [--players 2] [--dropout P] [--rule] [--say]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Dataset

from kdcore.cli.session import leave_group
from kdcore.config import EMAConfig, RunConfig, TrainConfig
from kdcore.data import seeded_loader
from kdcore.distiller import Distiller, LossTerms, Player, freeze
from kdcore.gradients import project_conflict
from kdcore.losses import soft_target_kl
from kdcore.stages import RunContext, run_stages
from kdcore.training import TrainSetup, TrainStage, make_accelerator

INPUTS, CLASSES = 6, 4


class Points(Dataset):
    """Gaussian points with labels; every reading adds noise from the global generator, like an augmentation."""

    def __init__(self, size: int = 40, noise: float = 0.1):
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(size, INPUTS, generator=generator)
        self.y = torch.randint(CLASSES, (size,), generator=generator)
        self.noise = noise

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int):
        return self.x[index] + self.noise * torch.randn(INPUTS), self.y[index]


class Toy(Distiller):
    """KD on points; with a critic as second player, and optionally the projected gradient of the KD term."""

    def __init__(self, *, players: int = 1, dropout: float = 0.2, rule: bool = False, say: bool = False):
        super().__init__()
        self.teacher = freeze(nn.Sequential(nn.Linear(INPUTS, 16), nn.ReLU(), nn.Linear(16, CLASSES)))
        self.student = nn.Sequential(nn.Linear(INPUTS, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, CLASSES))
        self.critic = nn.Linear(CLASSES, 1) if players == 2 else None
        self.rule, self.say = rule, say

    def players(self) -> list[Player]:
        student = Player("student", self.student, ema=EMAConfig(decay=0.9))
        if self.critic is None:
            return [student]
        return [Player("critic", self.critic), Player("student", self.student, every=2, ema=EMAConfig(decay=0.9))]

    def gradient_rule(self, player: str):
        if not self.rule or player != "student":
            return None
        return lambda terms: [
            a + b for a, b in zip(terms["ce"], project_conflict(terms["ce"], terms["kd"]), strict=True)
        ]

    def loss(self, batch, player: str = "student") -> LossTerms:
        if self.say:
            print("step", self.progress.step, flush=True)
        x, y = batch
        logits = self.student(x)
        if player == "critic":
            assert self.critic is not None
            return LossTerms(critic=(1.0, F.softplus(self.critic(logits.detach())).mean()))
        with torch.no_grad():
            target = self.teacher(x)
        terms = LossTerms(ce=(1.0, F.cross_entropy(logits, y)), kd=(0.5, soft_target_kl(logits, target, 2.0)))
        if self.critic is not None:
            terms["adversarial"] = (0.1, F.softplus(-self.critic(logits)).mean())
        return terms


def run(folder: Path, *, resume: bool = False, config: TrainConfig | None = None, **options) -> Path:
    """Trains the toy into `folder` and returns the file of the student's weights."""
    train = config or TrainConfig(
        steps=30,
        batch_size=8,
        optimizer={"name": "adamw", "lr": 0.01},
        schedule={"name": "cosine", "warmup_epochs": 1},
        checkpoint_every=4,
        log_every=5,
        clip=1.0,
    )
    folder.mkdir(parents=True, exist_ok=True)
    context = RunContext(
        RunConfig(method="toy", train=train),
        folder,
        make_accelerator(train, cpu=True, folder=folder),
        resume=resume,
        quiet=True,
    )

    def build(_: RunContext) -> TrainSetup:
        torch.manual_seed(0)
        return TrainSetup(Toy(**options), seeded_loader(Points(), train.batch_size, seed=1, drop_last=True))

    def save(module: nn.Module, target: Path) -> None:
        save_file(module.state_dict(), target / "model.safetensors")

    if context.is_main:
        (folder / "processes").write_text(str(context.accelerator.num_processes))
    artefacts = run_stages([TrainStage("student", train, build, save)], context)
    return artefacts["student"] / "model.safetensors"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--players", type=int, default=1)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--rule", action="store_true")
    parser.add_argument("--say", action="store_true")
    arguments = vars(parser.parse_args())
    torch.set_num_threads(1)
    run(arguments.pop("folder"), resume=arguments.pop("resume"), **arguments)
    leave_group()

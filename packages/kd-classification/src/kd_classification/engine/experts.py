"""Experts: networks trained on the real data whose weights are kept epoch by epoch, memory-mapped.

One folder an expert: `trajectory.safetensors` with `parameters` (R, P) float32, one row a kept epoch, the parameters of
the network flattened and joined in order, and `epochs` (R,); `expert.json` with the parameters' names and shapes.
Reading some rows touches only these rows of the file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kd_classification.data import Batch
from kd_classification.engine.diff_augment import DiffAugment, cutmix
from kd_classification.engine.synthetic import Preprocessing
from kdcore.config import TrainConfig
from kdcore.data import mix
from kdcore.distiller import Distiller, LossTerms, Player
from kdcore.errors import InputError
from kdcore.stages import Artefacts, RunContext
from kdcore.training import TrainSetup, TrainStage

Keep = Literal["ends", "every"]
TENSORS, META = "trajectory.safetensors", "expert.json"


def flat_parameters(network: nn.Module) -> Tensor:
    """All parameters in order as one vector (P,), a copy without graph."""
    return torch.cat([parameter.detach().reshape(-1) for parameter in network.parameters()])


def as_parameters(flat: Tensor, network: nn.Module) -> dict[str, Tensor]:
    """The vector (P,) as the network's named parameters: views, with the graph to `flat`."""
    named = dict(network.named_parameters())
    parts = flat.split([parameter.numel() for parameter in named.values()])
    return {name: part.view(named[name].shape) for name, part in zip(named, parts, strict=True)}


@torch.no_grad()
def load_parameters(network: nn.Module, flat: Tensor) -> None:
    """Copies the vector (P,) into the network."""
    for parameter, value in zip(network.parameters(), as_parameters(flat, network).values(), strict=True):
        parameter.copy_(value)


def check_stateless(network: nn.Module, field: str = "network") -> None:
    """Raises InputError for a network that is more than its parameters: batch normalisation's statistics change."""
    if any(True for _ in network.buffers()):
        raise InputError(
            f"{field}: has running statistics (batch normalisation); its weights are matched or interpolated, "
            "which needs a network without buffers: instance or group normalisation"
        )


# ---------------------------------------------------------------- training


class ExpertTraining(Distiller):
    """Cross-entropy on augmented real images; keeps the weights of epoch 0 and of the last, or of every epoch.

    `loss` takes a `Batch` of pixels. The kept rows are part of the state, so that a resumed training has them all.
    """

    trajectory: Tensor

    def __init__(
        self,
        network: nn.Module,
        preprocessing: Preprocessing,
        *,
        num_classes: int,
        augment: DiffAugment,
        cutmix_probability: float = 0.0,
        epochs: int,
        keep: Keep = "every",
    ):
        super().__init__()
        self.student, self.preprocessing = network, preprocessing
        self.num_classes, self.augment, self.keep = num_classes, augment, keep
        self.cutmix_probability = cutmix_probability
        start = flat_parameters(network)
        self.register_buffer("trajectory", start.repeat(2 if keep == "ends" else epochs + 1, 1))
        self.register_buffer("epochs", torch.zeros(len(self.trajectory), dtype=torch.long))

    def players(self) -> list[Player]:
        return [Player("expert", self.student)]

    def cross_entropy(self, inputs: Tensor, labels: Tensor) -> Tensor:
        images, targets = cutmix(self.augment(inputs), labels, self.num_classes, self.cutmix_probability)
        return F.cross_entropy(self.student(images), targets)

    def loss(self, batch: Batch, player: str = "expert") -> LossTerms:
        return LossTerms(ce=(1.0, self.cross_entropy(self.preprocessing.inputs(batch.images), batch.labels)))

    def epoch_end(self) -> None:
        done = self.progress.epoch + 1
        row = 1 if self.keep == "ends" else done
        self.trajectory[row] = flat_parameters(self.student)
        self.epochs[row] = done

    def deployed(self) -> nn.Module:
        return self

    def save(self, folder: Path) -> None:
        tensors = {"parameters": self.trajectory.cpu().float().contiguous(), "epochs": self.epochs.cpu()}
        save_file(tensors, folder / TENSORS)
        shapes = {name: list(parameter.shape) for name, parameter in self.student.named_parameters()}
        (folder / META).write_text(json.dumps({"parameters": shapes}, indent=2) + "\n", encoding="utf-8")


@dataclass
class ExpertPool:
    """A stage that trains `count` experts, one `TrainStage` each, into the artefact `experts`.

    `build(seed)` gives the distiller of an expert, its random start drawn, and its loader. A pool that was cut goes on
    with the expert at which it was cut.
    """

    count: int
    train: TrainConfig
    build: Callable[[int], tuple[ExpertTraining, object]]
    name: str = "experts"

    def run(self, context: RunContext) -> Artefacts:
        for index in range(self.count):
            artefact = f"{self.name}/{index:03d}"
            if not (context.folder / artefact / META).is_file():
                stage = self._one(index, artefact)
                stage.run(context)
                if context.is_main:  # a finished expert needs no checkpoint, and a hundred of them are large
                    shutil.rmtree(context.folder / "checkpoints" / stage.name, ignore_errors=True)
        return {self.name: context.folder / self.name}

    def _one(self, index: int, artefact: str) -> TrainStage:
        def setup(context: RunContext) -> TrainSetup:
            distiller, loader = self.build(mix(context.seed, index) % 2**31)
            return TrainSetup(distiller, loader)  # type: ignore[arg-type]

        def save(distiller: nn.Module, folder: Path) -> None:
            assert isinstance(distiller, ExpertTraining)
            distiller.save(folder)

        return TrainStage(f"expert-{index:03d}", self.train, setup, save, artefact=artefact)


# ---------------------------------------------------------------- reading


class Trajectory:
    """A saved expert. `rows(a, b)` reads the weights of the kept epochs a to b - 1 as (b - a, P), nothing else."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        try:
            self._file = safe_open(str(self.folder / TENSORS), framework="pt")
            self._slice = self._file.get_slice("parameters")
            self.epochs: list[int] = self._file.get_tensor("epochs").tolist()
        except (SafetensorError, OSError) as error:
            raise InputError(f"expert {self.folder}: {TENSORS} is missing or broken ({error})") from None

    def __len__(self) -> int:
        return len(self.epochs)

    def rows(self, first: int, end: int) -> Tensor:
        return self._slice[first:end]

    def __getitem__(self, row: int) -> Tensor:
        """One row (P,); -1 is the last."""
        row %= len(self)
        return self.rows(row, row + 1)[0]


def open_pool(folder: Path, network: nn.Module) -> list[Trajectory]:
    """The experts of a pool, in order. Raises InputError for an empty pool or another network."""
    pool = [Trajectory(path) for path in sorted(folder.iterdir()) if path.is_dir()]
    if not pool:
        raise InputError(f"experts {folder}: holds no expert")
    wanted = sum(parameter.numel() for parameter in network.parameters())
    found = pool[0].rows(0, 1).shape[1]
    if found != wanted:
        raise InputError(f"experts {folder}: hold {found} parameters, the network has {wanted}")
    return pool


def step_lengths(trajectory: Trajectory) -> Iterator[float]:
    """||theta_{e+1} - theta_e|| of neighbouring kept epochs."""
    before = trajectory[0]
    for row in range(1, len(trajectory)):
        after = trajectory[row]
        yield float((after - before).norm())
        before = after

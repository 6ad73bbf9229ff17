"""How good a set of images is: train fresh networks on it and test them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_classification.engine.diff_augment import DiffAugment, cutmix
from kdcore.config import TrainConfig
from kdcore.data import seeded
from kdcore.distiller import Player
from kdcore.optim import make_optimizer, make_schedule


def train_network(
    network: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    train: TrainConfig,
    *,
    num_classes: int,
    augment: DiffAugment,
    cutmix_probability: float = 0.0,
) -> nn.Module:
    """Cross-entropy on a set that is in memory: inputs (N, C, H, W), labels (N,); in place, left in eval mode.

    Batches of `train.batch_size` from a new permutation each epoch, the incomplete one included. Orders and
    augmentations come from torch's global generators.
    """
    size = min(train.batch_size, len(inputs))
    per_epoch = -(-len(inputs) // size)
    steps = train.steps or (train.epochs or 0) * per_epoch
    player = Player("student", network)
    optimizer = make_optimizer(player, train)
    schedule = make_schedule(optimizer, player, train, steps, per_epoch)
    network.train()
    order: list[Tensor] = []
    for _ in range(steps):
        order = order or list(torch.randperm(len(inputs), device=inputs.device).split(size))
        index = order.pop()
        images, targets = cutmix(augment(inputs[index]), labels[index], num_classes, cutmix_probability)
        loss = F.cross_entropy(network(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def predictions(network: nn.Module, inputs: Tensor, batch_size: int = 1024) -> Tensor:
    """Logits (N, K) on the CPU."""
    return torch.cat([network(part).float().cpu() for part in inputs.split(batch_size)])


def accuracy(network: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    return float((predictions(network, inputs).argmax(1) == labels.cpu()).double().mean())


def fresh_accuracies(
    make: Callable[[], nn.Module],
    learn: Callable[[nn.Module], nn.Module],
    inputs: Tensor,
    labels: Tensor,
    seeds: list[int],
) -> list[float]:
    """Test accuracy of one fresh network per seed: `make()` draws it, `learn` trains it, both under that seed."""
    found = []
    for seed in seeds:
        with seeded(seed):
            found.append(accuracy(learn(make()), inputs, labels))
    return found

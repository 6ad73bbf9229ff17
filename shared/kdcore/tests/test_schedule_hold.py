"""hold_epoch, hold_lr: a constant rate for weight averaging, the same in every parameter group."""

import pytest
import torch
from torch import nn

from kdcore.config import ScheduleConfig, TrainConfig, parse
from kdcore.distiller import Player
from kdcore.errors import InputError
from kdcore.optim import make_optimizer, make_schedule


def test_held_rate_is_the_same_in_every_group():
    head, backbone = nn.Linear(2, 2), nn.Linear(2, 2)
    groups = [{"params": head.parameters()}, {"params": backbone.parameters(), "lr_scale": 0.2}]
    train = TrainConfig(epochs=4, optimizer={"name": "adamw", "lr": 1e-2}, schedule={"name": "cosine", "unit": "epoch"})
    player = Player("student", head, param_groups=groups)
    player.schedule = ScheduleConfig(name="cosine", unit="epoch", hold_epoch=2, hold_lr=1e-3)
    optimizer = make_optimizer(player, train)
    schedule = make_schedule(optimizer, player, train, steps=12, steps_per_epoch=3)
    rates = []
    for _ in range(12):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx([1e-2, 2e-3])
    assert rates[5] == pytest.approx([1e-2 * (1 + 2**-0.5) / 2, 2e-3 * (1 + 2**-0.5) / 2])
    assert torch.tensor(rates[6:]).flatten().tolist() == pytest.approx([1e-3] * 12)


def test_hold_needs_both_values():
    with pytest.raises(InputError, match="hold_epoch and hold_lr go together"):
        parse(ScheduleConfig, {"hold_epoch": 3})

"""Optimisers, parameter groups and learning-rate schedules against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kdcore.config import OptimizerConfig, ScheduleConfig, TrainConfig
from kdcore.distiller import Player
from kdcore.errors import InputError
from kdcore.optim import make_optimizer, make_schedule, schedule_factor

TRAIN = TrainConfig(epochs=1, optimizer=OptimizerConfig(name="sgd", lr=0.2, momentum=0.5, weight_decay=0.01))


@pytest.mark.parametrize(
    ("config", "kind", "defaults"),
    [
        ({"name": "sgd", "momentum": 0.8, "nesterov": True}, torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
        ({"name": "adam", "betas": (0.5, 0.9), "eps": 1e-6}, torch.optim.Adam, {"betas": (0.5, 0.9), "eps": 1e-6}),
        ({"name": "adamw", "betas": (0.5, 0.9)}, torch.optim.AdamW, {"betas": (0.5, 0.9), "eps": 1e-8}),
        ({"name": "rmsprop", "momentum": 0.1}, torch.optim.RMSprop, {"momentum": 0.1, "eps": 1e-8}),
    ],
)
def test_every_optimiser_gets_its_fields(config, kind, defaults):
    train = TrainConfig(epochs=1, optimizer={**config, "lr": 0.3, "weight_decay": 0.02})
    made = make_optimizer(Player("student", nn.Linear(2, 2)), train)
    assert type(made) is kind
    group = made.param_groups[0]
    assert {name: group[name] for name in ("lr", "weight_decay", *defaults)} == {
        "lr": 0.3,
        "weight_decay": 0.02,
        **defaults,
    }


def test_frozen_parameters_are_left_out_and_nothing_to_train_is_refused():
    net = nn.Linear(2, 2)
    net.bias.requires_grad_(False)
    assert make_optimizer(Player("student", net), TRAIN).param_groups[0]["params"] == [net.weight]
    with pytest.raises(InputError, match="player 'critic': it has no trainable parameter"):
        make_optimizer(Player("critic", net.requires_grad_(False)), TRAIN)
    with pytest.raises(InputError, match="player 'critic'"):
        make_optimizer(Player("critic", nn.ReLU()), TRAIN)


def test_groups_scale_the_rate_and_keep_their_other_options():
    net = nn.Linear(2, 2)
    groups = [{"params": iter([net.weight]), "lr_scale": 0.1, "weight_decay": 0.0}, {"params": [net.bias]}]
    player = Player("student", net, param_groups=groups)
    made = make_optimizer(player, TRAIN)
    assert [group["lr"] for group in made.param_groups] == pytest.approx([0.02, 0.2])
    assert [group["weight_decay"] for group in made.param_groups] == [0.0, 0.01]
    assert all("lr_scale" not in group for group in made.param_groups)
    assert groups[0]["lr_scale"] == 0.1  # the player's own groups are not changed
    make_schedule(made, Player("s", net, schedule=ScheduleConfig(name="linear")), TRAIN, 4, 4)
    made.step()


def test_a_players_own_optimiser_comes_first():
    net = nn.Linear(2, 2)
    assert (
        make_optimizer(Player("s", net, optimizer=OptimizerConfig(name="adam", lr=3e-4)), TRAIN).param_groups[0]["lr"]
        == 3e-4
    )
    made = make_optimizer(Player("s", net, optimizer=lambda groups: torch.optim.Adagrad(groups, lr=0.7)), TRAIN)
    assert isinstance(made, torch.optim.Adagrad)
    assert made.param_groups[0]["lr"] == 0.7


# ---------------------------------------------------------------- schedules


@given(step=st.integers(0, 99), warmup=st.integers(0, 5), floor=st.floats(0, 1))
def test_cosine_and_linear_by_step(step, warmup, floor):
    for name in ("cosine", "linear", "constant"):
        config = ScheduleConfig(name=name, warmup_epochs=warmup, min_ratio=floor)
        factor = schedule_factor(config, step, 100, 10)
        start = 10 * warmup
        r = (step - start) / (100 - start)
        after = {
            "cosine": floor + (1 - floor) * math.cos(math.pi * r / 2) ** 2,
            "linear": 1 - (1 - floor) * r,
            "constant": 1.0,
        }
        assert factor == pytest.approx((step + 1) / start if step < start else after[name], abs=1e-12)


def test_schedule_by_epoch_is_constant_inside_an_epoch():
    config = ScheduleConfig(name="cosine", warmup_epochs=2, unit="epoch")
    factors = [schedule_factor(config, step, 50, 5) for step in range(50)]
    by_epoch = factors[::5]
    assert factors == [by_epoch[step // 5] for step in range(50)]
    assert by_epoch[:2] == [0.5, 1.0]
    assert by_epoch[2:] == pytest.approx([(1 + math.cos(math.pi * r / 8)) / 2 for r in range(8)])


def test_multistep_counts_epochs_in_either_unit():
    for unit in ("step", "epoch"):
        config = ScheduleConfig(name="multistep", milestones=[2, 4], gamma=0.1, unit=unit)
        factors = [schedule_factor(config, step, 30, 5) for step in range(30)]
        assert factors == pytest.approx([1.0] * 10 + [0.1] * 10 + [0.01] * 10)
    half = ScheduleConfig(name="multistep", milestones=[0.5], gamma=0.1)
    assert [schedule_factor(half, step, 10, 10) for step in (4, 5)] == [1.0, 0.1]


def test_fractional_warm_up_and_the_last_epoch_cut_short():
    config = ScheduleConfig(name="linear", warmup_epochs=0.5)
    assert [schedule_factor(config, step, 20, 10) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    by_epoch = ScheduleConfig(name="linear", unit="epoch")
    assert [schedule_factor(by_epoch, step, 12, 5) for step in (0, 5, 11)] == pytest.approx([1, 2 / 3, 1 / 3])


@given(step=st.integers(0, 500), steps=st.integers(1, 200), per_epoch=st.integers(1, 60), warmup=st.floats(0, 5))
def test_factors_stay_between_zero_and_one(step, steps, per_epoch, warmup):
    for name in ("constant", "cosine", "linear", "multistep"):
        for unit in ("step", "epoch"):
            config = ScheduleConfig(name=name, warmup_epochs=warmup, milestones=[1], unit=unit)
            assert 0.0 <= schedule_factor(config, step, steps, per_epoch) <= 1.0


def test_a_player_that_acts_rarely_follows_the_runs_schedule():
    player = Player("s", nn.Linear(1, 1), every=3, schedule=ScheduleConfig(name="linear"))
    made = make_optimizer(player, TRAIN)
    schedule = make_schedule(made, player, TRAIN, 12, 12)
    rates = []
    for _ in range(4):
        rates.append(made.param_groups[0]["lr"])
        made.step()
        schedule.step()
    assert rates == pytest.approx([0.2 * (1 - step / 12) for step in (0, 3, 6, 9)])


def test_a_player_that_starts_later_follows_the_runs_schedule():
    player = Player("s", nn.Linear(1, 1), start=6, schedule=ScheduleConfig(name="linear"))
    made = make_optimizer(player, TRAIN)
    schedule = make_schedule(made, player, TRAIN, 12, 12)
    rates = []
    for _ in range(6):
        rates.append(made.param_groups[0]["lr"])
        made.step()
        schedule.step()
    assert rates == pytest.approx([0.2 * (1 - step / 12) for step in range(6, 12)])

"""Moving averages against their closed forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kdcore.config import EMAConfig
from kdcore.ema import EMA, decay_at
from kdcore.errors import InputError


def module(value: float = 1.0) -> nn.Module:
    built = nn.BatchNorm1d(2).double()
    nn.init.constant_(built.weight, value)
    return built


def follow(config: EMAConfig, values: list[float]) -> float:
    """The average after the module's weight went through `values`; it starts from the first."""
    net = module(values[0])
    ema = EMA(net, config)
    for value in values[1:]:
        nn.init.constant_(net.weight, value)
        ema.update()
    return ema.shadow["weight"][0].item()


def test_constant_decay_is_a_geometric_sum():
    values = [1.0, 4.0, -2.0, 3.0]
    expected = 0.9**3 * 1 + 0.1 * (0.9**2 * 4 + 0.9 * -2 + 3)
    assert follow(EMAConfig(decay=0.9, warmup=False), values) == pytest.approx(expected, rel=1e-12)


def test_warm_up_is_bounded_by_the_decay():
    config = EMAConfig(decay=0.5)
    assert [decay_at(config, t) for t in (1, 2, 7, 8, 9)] == [2 / 11, 3 / 12, 8 / 17, 0.5, 0.5]
    assert decay_at(EMAConfig(decay=0.5, warmup=False), 1) == 0.5


@given(gamma=st.floats(0.1, 20), steps=st.integers(1, 30))
def test_power_law_weights_a_constant_target_exactly(gamma, steps):
    config = EMAConfig(kind="power", gamma=gamma)
    assert decay_at(config, 1) == 0.0  # the initial weights are forgotten at once
    assert follow(config, [5.0] + [2.0] * steps) == pytest.approx(2.0, rel=1e-12)


def test_power_law_of_an_integer_exponent_is_a_polynomial_profile():
    # d_t = ((t - 1) / t)^2: w_ema(T) = sum_t (1 - d_t) (t / T)^2 w_t = sum_t (2 t - 1) / T^2 w_t
    values = [3.0, -1.0, 4.0, 1.0]
    expected = sum((2 * t - 1) * value for t, value in enumerate(values, 1)) / 16
    assert follow(EMAConfig(kind="power", gamma=1.0), [99.0, *values]) == pytest.approx(expected, rel=1e-12)


def test_half_life_counts_samples_and_is_a_share_of_those_seen_at_first():
    config = EMAConfig(kind="halflife", halflife=1000, ramp=0.05)
    assert decay_at(config, 1, batch=100) == 0.0  # nothing seen yet: the initial weights are forgotten
    assert decay_at(config, 21, batch=100) == pytest.approx(0.5)  # 2000 seen, half-life 100
    assert decay_at(config, 201, batch=100) == decay_at(config, 10_000, batch=100) == pytest.approx(0.5**0.1)
    assert decay_at(EMAConfig(kind="halflife", halflife=1000, ramp=None), 1, batch=100) == pytest.approx(0.5**0.1)


@given(batch=st.integers(1, 50))
def test_after_a_half_life_of_samples_half_of_the_start_is_left(batch):
    net = module(1.0)
    ema = EMA(net, EMAConfig(kind="halflife", halflife=4 * batch, ramp=None), batch)
    nn.init.constant_(net.weight, 0.0)
    for _ in range(4):
        ema.update()
    assert ema.shadow["weight"][0].item() == pytest.approx(0.5, rel=1e-12)


def test_applied_is_undone_and_copy_stays():
    net = module(1.0)
    ema = EMA(net, EMAConfig(decay=0.75, warmup=False))
    nn.init.constant_(net.weight, 5.0)
    ema.update()
    with ema.applied():
        assert net.weight.tolist() == [2.0, 2.0]
    assert net.weight.tolist() == [5.0, 5.0]
    with pytest.raises(KeyError), ema.applied():
        raise KeyError
    assert net.weight.tolist() == [5.0, 5.0]
    ema.copy_to_module()
    assert net.weight.tolist() == [2.0, 2.0]
    assert net.weight.requires_grad


def test_only_what_was_trainable_at_the_start_is_averaged():
    net = module(1.0)
    net.bias.requires_grad_(False)
    ema = EMA(net, EMAConfig(decay=0.5, warmup=False))
    assert set(ema.shadow) == {"weight"}
    net.bias.requires_grad_(True)  # unfrozen later: not averaged, and no reason to fail
    net.weight.requires_grad_(False)
    nn.init.constant_(net.bias, 7.0)
    nn.init.constant_(net.weight, 3.0)
    net.running_mean.fill_(9.0)
    ema.update()
    ema.copy_to_module()
    assert net.weight.tolist() == [2.0, 2.0]
    assert net.bias.tolist() == [7.0, 7.0]
    assert net.running_mean.tolist() == [9.0, 9.0]


def test_state_goes_on_where_it_stopped():
    config = EMAConfig(decay=0.99)
    net = module(1.0)
    ema = EMA(net, config)
    nn.init.constant_(net.weight, 2.0)
    ema.update()
    state = {name: value.clone() for name, value in ema.state_dict().items()}
    other = EMA(module(8.0), config)
    other.load_state_dict(state)
    for average in (ema, other):
        nn.init.constant_(average.module.weight, -3.0)
        average.update()
    assert other.updates == 2
    assert torch.equal(ema.shadow["weight"], other.shadow["weight"])
    with pytest.raises(InputError, match="EMA state does not fit"):
        EMA(nn.Linear(2, 2), config).load_state_dict(state)

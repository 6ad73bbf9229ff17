"""LossTerms, Progress, and what a Distiller freezes, saves and loads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kdcore.distiller import Distiller, LossTerms, Progress, freeze, is_frozen
from kdcore.errors import InputError


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=6))
def test_the_total_is_the_weighted_sum(pairs):
    terms = LossTerms({f"t{i}": (w, torch.tensor(v, dtype=torch.float64)) for i, (w, v) in enumerate(pairs)})
    if all(weight == 0 for weight, _ in pairs):
        with pytest.raises(ValueError, match="every term has weight 0"):
            terms.total()
    else:
        assert terms.total().item() == pytest.approx(sum(w * v for w, v in pairs), abs=1e-12)


def test_a_term_of_weight_zero_is_reported_but_not_minimised():
    x = torch.tensor(2.0, requires_grad=True)
    terms = LossTerms(a=(3.0, x * 2), b=(0.0, x / 0 * 0))
    assert list(terms) == ["a", "b"]
    terms.total().backward()
    assert x.grad is not None
    assert x.grad.item() == 6.0
    assert terms["b"][1].isnan()


class Toy(Distiller):
    def __init__(self):
        super().__init__()
        self.teacher = freeze(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout()))
        self.student = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), freeze(nn.BatchNorm1d(2)))
        self.teacher_like = nn.Linear(2, 1)  # a name that starts with a frozen module's is not frozen

    def loss(self, batch, player="student"):
        output = self.student(batch)
        return LossTerms(fit=(1.0, output.square().mean()), seen=(0.0, output.mean()))


def test_frozen_modules_stay_in_eval_mode_and_have_no_gradients():
    toy = Toy()
    toy.train()
    assert toy.student.training
    assert toy.student[1].training
    assert not any(module.training for module in toy.teacher.modules())
    assert not toy.student[2].training
    assert not any(p.requires_grad for p in toy.teacher.parameters())
    assert is_frozen(toy.teacher)
    assert not is_frozen(toy.teacher[0])
    toy.eval()
    assert not toy.student.training


def test_a_checkpoint_leaves_frozen_modules_out():
    toy = Toy()
    state = toy.checkpoint_state()
    assert set(state) == {"student.0.weight", "student.0.bias", "teacher_like.weight", "teacher_like.bias"}
    other = Toy()
    kept = {name: value.clone() for name, value in other.teacher.state_dict().items()}
    other.load_checkpoint_state(state)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in state.items())
    assert all(torch.equal(value, other.teacher.state_dict()[name]) for name, value in kept.items())


def test_a_checkpoint_without_frozen_modules_is_the_state_dict():
    class Plain(Distiller):
        def __init__(self):
            super().__init__()
            self.student = nn.Linear(2, 2)

    assert Plain().checkpoint_state().keys() == Plain().state_dict().keys()


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_names_that_do_not_fit_are_bad_input(change):
    state = Toy().checkpoint_state()
    if change == "missing":
        del state["student.0.bias"]
    else:
        state["critic.weight"] = torch.ones(1)
    name = "student.0.bias" if change == "missing" else "critic.weight"
    with pytest.raises(InputError, match=rf"checkpoint does not fit Toy: .*'{name}'"):
        Toy().load_checkpoint_state(state)


def test_forward_is_the_loss_with_terms_of_weight_zero_cut_off():
    terms = Toy()(torch.ones(4, 2))
    assert terms["fit"][1].requires_grad
    assert not terms["seen"][1].requires_grad
    assert terms["seen"][0] == 0.0


def test_defaults():
    toy = Toy()
    (player,) = toy.players()
    assert (player.name, player.module, player.every) == ("student", toy, 1)
    assert toy.deployed() is toy.student
    assert toy.gradient_rule("student") is None

    class Empty(Distiller):
        pass

    with pytest.raises(NotImplementedError, match="Empty does not implement loss"):
        Empty().loss(None)


def test_progress_is_a_share_of_the_budget():
    assert Progress(step=3, steps=12).fraction == 0.25
    assert Progress(step=20, steps=12).fraction == 1.0
    assert Progress(steps=0).fraction == 0.0

"""The two kinds of failure, and suggestions for misspelt names."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcore.errors import InputError, NonFiniteLoss, RunFailed, did_you_mean


def test_what_carries_what():
    assert issubclass(InputError, ValueError)
    assert not issubclass(RunFailed, ValueError)
    assert RunFailed("stopped").checkpoint is None
    error = NonFiniteLoss(12, "critic", "hinge", float("inf"), Path("step-00000010"))
    assert str(error) == "step 12: loss term 'hinge' of player 'critic' is inf"
    assert (error.step, error.player, error.term, error.checkpoint) == (12, "critic", "hinge", Path("step-00000010"))


@pytest.mark.parametrize(
    "error",
    [InputError("field"), RunFailed("stopped", Path("x")), NonFiniteLoss(12, "critic", "hinge", 0.5, Path("x"))],
    ids=lambda error: type(error).__name__,
)
def test_errors_travel_between_processes(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_the_nearest_name_is_suggested_and_else_all_are_listed():
    assert did_you_mean("epoch", ["lr", "epochs"]) == "; did you mean 'epochs'?"
    assert did_you_mean("zzz", ["b", "a"]) == "; allowed: a, b"
    assert did_you_mean("zzz", []) == ""


@given(st.lists(st.text(min_size=1), min_size=1, max_size=5))
def test_a_name_that_is_allowed_is_its_own_suggestion(names):
    assert did_you_mean(names[0], names) == f"; did you mean '{names[0]}'?"

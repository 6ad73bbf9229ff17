"""Flip rates: numbers by hand, identities, extremes, messages."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcore import flips

OLD, NEW, LABELS = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 0])
ids = st.integers(0, 3)
triples = st.lists(st.tuples(ids, ids, ids), min_size=1, max_size=40).map(lambda rows: torch.tensor(rows).unbind(1))


def test_rates_by_hand():
    # right by old: samples 0, 1, 3; right by new: sample 0; so 1 and 3 flip, and nothing is repaired
    assert flips.negative_flip_rate(OLD, NEW, LABELS) == 0.5
    assert flips.error_rate(OLD, LABELS) == 0.25
    assert flips.error_rate(NEW, LABELS) == 0.75
    assert flips.relative_negative_flip_rate(OLD, NEW, LABELS) == pytest.approx(0.5 / 0.5625, abs=1e-15)
    assert flips.positive_flip_rate(OLD, NEW, LABELS) == 0.0
    assert flips.positive_flip_rate(NEW, OLD, LABELS) == 0.5


@given(triple=triples)
@settings(deadline=None)
def test_accuracy_gain_is_positive_minus_negative_flips(triple):
    old, new, labels = triple
    gain = flips.error_rate(old, labels) - flips.error_rate(new, labels)
    difference = flips.positive_flip_rate(old, new, labels) - flips.negative_flip_rate(old, new, labels)
    assert gain == pytest.approx(difference, abs=1e-12)
    assert flips.positive_flip_rate(old, new, labels) == flips.negative_flip_rate(new, old, labels)


@given(triple=triples)
@settings(deadline=None)
def test_bounds(triple):
    old, new, labels = triple
    rate = flips.negative_flip_rate(old, new, labels)
    assert 0 <= rate <= min(1 - flips.error_rate(old, labels), flips.error_rate(new, labels)) + 1e-12
    assert flips.negative_flip_rate(old, old, labels) == 0
    assert flips.relative_negative_flip_rate(old, labels, labels) == 0  # no error at all: 0, not 0 / 0


def test_relative_rate_of_independent_errors_is_one():
    # 30 % of the old and 20 % of the new answers are wrong, on a grid where the two are independent
    old_wrong, new_wrong = torch.meshgrid(torch.arange(10) < 3, torch.arange(10) < 2, indexing="ij")
    labels = torch.zeros(100, dtype=torch.long)
    rate = flips.relative_negative_flip_rate(old_wrong.flatten().long(), new_wrong.flatten().long(), labels)
    assert rate == pytest.approx(1.0, abs=1e-12)


def test_models_with_different_label_spaces():
    # the old model tells classes 7 and 3 of the new space apart
    old = flips.in_label_space(torch.tensor([0, 1, 1]), torch.tensor([7, 3]))
    assert old.tolist() == [7, 3, 3]
    assert flips.negative_flip_rate(old, torch.tensor([7, 5, 3]), torch.tensor([7, 3, 5])) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((OLD, NEW[:3], LABELS), r"new has 3 samples but old has 4"),
        ((OLD, NEW, LABELS.float()), r"labels has dtype torch.float32; it must hold integer class ids"),
        ((OLD == 0, NEW, LABELS), r"old has dtype torch.bool"),
        ((OLD.view(2, 2), NEW, LABELS), r"old has shape \(2, 2\); it must be \(N,\)"),
        ((OLD[:0], NEW[:0], LABELS[:0]), r"old has shape \(0,\)"),
    ],
)
def test_messages(arguments, message):
    with pytest.raises(ValueError, match=message):
        flips.negative_flip_rate(*arguments)


def test_messages_of_the_label_map():
    with pytest.raises(ValueError, match=r"predictions holds ids 0..2; ids maps 0..1"):
        flips.in_label_space(torch.tensor([0, 2]), torch.tensor([7, 3]))
    with pytest.raises(ValueError, match=r"ids has shape \(2,\) and dtype torch.float32"):
        flips.in_label_space(torch.tensor([0]), torch.tensor([7.0, 3.0]))

"""Offsets that make the predicted classes as frequent as they are known to be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kd_graph.engine.decision import share_offsets


@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(0, 40))
def test_classes_are_predicted_as_often_as_asked(seed, classes, more):
    generator = torch.Generator().manual_seed(seed)
    count = classes + more
    logits = 3 * torch.randn(count, classes, generator=generator) + 4 * torch.randn(classes, generator=generator)
    wanted = torch.bincount(torch.randint(classes, (count,), generator=generator), minlength=classes)
    offsets = share_offsets(logits, wanted / count)
    assert offsets.dtype == logits.dtype
    assert torch.bincount((logits + offsets).argmax(1), minlength=classes).tolist() == wanted.tolist()
    assert offsets.sum().item() == pytest.approx(0, abs=1e-4)


def test_two_classes_in_numbers():
    logits = torch.tensor([[3.0, 0], [2, 0], [1, 0], [9, 0]])
    assert share_offsets(logits, torch.tensor([0.5, 0.5])).tolist() == [-1.25, 1.25]  # between margins 3 and 2
    assert share_offsets(logits, torch.tensor([1.0, 0.0])).tolist() == [0, 0]  # they already are


def test_graphs_that_score_alike_cannot_be_told_apart():
    offsets = share_offsets(torch.zeros(6, 2), torch.tensor([0.5, 0.5]))
    assert offsets.isfinite().all()

"""How many samples a batch is counted as, whatever it is."""

from types import SimpleNamespace

import pytest
import torch

from kdcore.termlog import samples_in


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        (torch.zeros(3, 2), 3),
        ([torch.zeros(4), torch.zeros(5)], 4),
        ({"x": torch.zeros(2)}, 2),
        (SimpleNamespace(num_graphs=7), 7),
        (SimpleNamespace(x=torch.zeros(3)), 0),
        ([], 0),
    ],
)
def test_samples_of_a_batch(batch, count):
    assert samples_in(batch) == count

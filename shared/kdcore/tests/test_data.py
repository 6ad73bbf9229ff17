"""Data order and augmentation depend on (seed, epoch, index) alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from kdcore.data import SeededDataset, SeededSampler, seeded, seeded_loader, set_epoch


class Noisy(Dataset):
    """index, and a number from each global generator: an augmentation."""

    def __init__(self, size: int = 10):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int):
        return index, torch.rand(1, dtype=torch.float64).item(), random.random(), np.random.rand()


class NoisyBatches(Noisy):
    """Reads a whole batch at once, with randomness."""

    def __getitems__(self, indices):
        return [(index, *torch.rand(3, dtype=torch.float64).tolist()) for index in indices]


def epoch_of(loader, epoch: int) -> list:
    set_epoch(loader, epoch)
    return [[column.tolist() for column in batch] for batch in loader]


def samples(batches) -> dict:
    """index -> what its sample looked like."""
    return {row[0]: row[1:] for batch in batches for row in zip(*batch, strict=True)}


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 40), seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 1000))
def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch_only(size, seed, epoch):
    sampler = SeededSampler(size, seed)
    list(sampler)
    sampler.set_epoch(epoch)
    torch.rand(1)
    order = list(sampler)
    again = SeededSampler(size, seed)
    again.set_epoch(epoch)
    assert order == list(again)
    assert sorted(order) == [(epoch, index) for index in range(size)]
    assert len(sampler) == size


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = set()
    for seed in range(5):
        sampler = SeededSampler(50, seed)
        for epoch in range(5):
            sampler.set_epoch(epoch)
            orders.add(tuple(index for _, index in sampler))
    assert len(orders) == 25
    assert [index for _, index in SeededSampler(4, shuffle=False)] == [0, 1, 2, 3]


def test_repeated_samples_come_in_a_row_each_with_a_seed_of_its_own():
    keys = list(SeededSampler(10, seed=3, repeats=3))
    plain = [index for _, index in SeededSampler(10, seed=3)]
    assert [index % 10 for _, index in keys] == [index for index in plain[:4] for _ in range(3)][:10]
    assert [index // 10 for _, index in keys] == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    once = samples(epoch_of(seeded_loader(Noisy(), 4, seed=1), 0))
    batches = epoch_of(seeded_loader(Noisy(), 4, seed=1, repeats=2), 0)
    rows = [row for batch in batches for row in zip(*batch, strict=True)]
    assert len(rows) == 10
    for one, two in zip(rows[::2], rows[1::2], strict=True):
        assert one[0] == two[0]
        assert one[1:] == once[one[0]]  # the first copy is the sample as it would be alone
        assert one[1] != two[1]


def test_starting_an_epoch_draws_nothing_from_the_global_generators():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    epoch_of(seeded_loader(Noisy(), 4), 0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert str(np.random.get_state()) == str(before[2])


def test_augmentation_is_seeded_per_sample_and_epoch():
    small, large = seeded_loader(Noisy(), 3, seed=1), seeded_loader(Noisy(), 5, seed=1, shuffle=False)
    first, same, later = samples(epoch_of(small, 0)), samples(epoch_of(large, 0)), samples(epoch_of(small, 1))
    assert first == same  # neither the batch size nor the order matters
    assert len({row for rows in (first, later) for row in rows.values()}) == 20
    assert samples(epoch_of(seeded_loader(Noisy(), 3, seed=2), 0)) != first


@pytest.mark.parametrize("data", [Noisy(), NoisyBatches()], ids=["items", "batches"])
def test_workers_change_nothing(data):
    alone, workers = seeded_loader(data, 4, seed=1), seeded_loader(data, 4, seed=1, num_workers=2)
    for epoch in (0, 1, 0):  # the workers persist over epochs
        assert epoch_of(alone, epoch) == epoch_of(workers, epoch)


@pytest.mark.parametrize("data", [Noisy(), NoisyBatches()], ids=["items", "batches"])
def test_skipped_batches_leave_the_rest_of_an_epoch_as_it_was(data):
    loader = seeded_loader(data, 3, seed=4)
    whole = epoch_of(loader, 2)
    set_epoch(loader, 2)
    rest = skip_first_batches(loader, 2)
    assert epoch_of(rest, 2) == whole[2:]


def test_a_subset_of_augmented_data_is_seeded_per_sample():
    subset = Subset(Noisy(20), [3, 5, 7, 11])
    one, two = seeded_loader(subset, 1, seed=1), seeded_loader(subset, 4, seed=1)
    assert samples(epoch_of(one, 0)) == samples(epoch_of(two, 0))
    nested = seeded_loader(Subset(subset, [0, 2]), 2, seed=1)
    assert set(samples(epoch_of(nested, 0))) == {3, 7}


def test_data_that_reads_batches_is_read_in_batches():
    class Batches(TensorDataset):
        calls = 0

        def __getitems__(self, indices):
            Batches.calls += 1
            return self.tensors[0][torch.tensor(indices)]

    data = SeededDataset(Batches(torch.arange(10) ** 2), seed=3)
    assert data.__getitems__([(0, 2), (0, 9)]).tolist() == [4, 81]
    assert data[(5, 3)][0].item() == 9
    assert len(data) == 10
    loader = seeded_loader(data.dataset, 4, collate=lambda batch: batch)
    assert sorted(torch.cat(list(loader)).tolist()) == [i**2 for i in range(10)]
    assert Batches.calls == 1 + 3


def test_drop_last_and_collate():
    assert len(seeded_loader(Noisy(10), 4, drop_last=True)) == 2
    assert len(seeded_loader(Noisy(10), 4)) == 3
    assert next(iter(seeded_loader(Noisy(10), 4, shuffle=False, collate=lambda items: [i[0] for i in items]))) == [
        0,
        1,
        2,
        3,
    ]


def test_seeded_restores_the_generators_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(KeyError), seeded(3):
        raise KeyError(torch.rand(4))
    assert torch.equal(torch.get_rng_state(), before)
    with seeded(3):
        first = torch.rand(1), random.random(), np.random.rand()
    with seeded(3):
        assert (torch.rand(1), random.random(), np.random.rand()) == first


def test_set_epoch_reaches_samplers_inside_a_prepared_loader():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    loader = Accelerator(cpu=True).prepare(seeded_loader(Noisy(), 4, seed=1))
    assert samples(epoch_of(loader, 3)) == samples(epoch_of(seeded_loader(Noisy(), 4, seed=1), 3))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    set_epoch(DataLoader(Noisy(), batch_size=2), 3)  # nothing inside takes an epoch

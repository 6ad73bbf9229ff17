"""DomainMixture: what is drawn, that processes share it without overlap, and that a state gives it again."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader

from kd_llm.engine.mixture import DomainMixture, by_domain, rounded_counts
from kdcore.data import SeededSampler, seeded_loader, set_epoch
from kdcore.errors import InputError


def datasets(**sizes):
    return {name: [(name, i) for i in range(size)] for name, size in sizes.items()}


def mixture(seed=0, size=40, sizes=None, **options):
    return DomainMixture(datasets(**(sizes or {"a": 7, "b": 50, "c": 23})), seed, size=size, **options)


def test_a_small_domain_is_read_in_order_and_in_cycles():
    small = mixture(size=20)
    small.set_weights([1.0, 0.0, 0.0])
    small.draw()
    assert [place for _, place in small.slots()] == [*range(7), *range(7), *range(6)]
    counts = Counter(small[i] for i in range(20))
    assert set(counts.values()) == {2, 3}
    small.draw()
    assert [place for _, place in small.slots()][:3] == [6, 0, 1], "the next interval goes on where this one stopped"


def test_counts_follow_the_shares():
    m, shares, n = mixture(size=20_000), [0.5, 0.3, 0.2], 20_000
    m.set_weights(shares)
    m.draw()
    found = Counter(domain for domain, _ in m.slots())
    for domain, share in enumerate(shares):
        assert abs(found[domain] - n * share) < 4 * (n * share * (1 - share)) ** 0.5


def test_without_shares_the_corpus_is_sampled_as_it_is():
    m = mixture(size=8000)
    assert m.weights == [7 / 80, 50 / 80, 23 / 80]
    m.draw()
    found = Counter(domain for domain, _ in m.slots())
    assert abs(found[0] - 700) < 4 * (8000 * 0.0875 * 0.9125) ** 0.5


@settings(deadline=None, max_examples=60)
@given(raw=st.lists(st.floats(0.01, 1), min_size=1, max_size=6), size=st.integers(1, 200))
def test_rounded_counts_sum_to_the_size_and_are_next_to_exact(raw, size):
    shares = [value / sum(raw) for value in raw]
    counts = rounded_counts(shares, size)
    assert sum(counts) == size
    assert all(abs(count - share * size) < 1 for count, share in zip(counts, shares, strict=True))


def test_rounded_mixture_has_exact_counts_at_random_slots():
    m = mixture(size=40, counts="rounded")
    m.set_weights([0.25, 0.5, 0.25])
    m.draw()
    domains = [domain for domain, _ in m.slots()]
    assert Counter(domains) == {0: 10, 1: 20, 2: 10}
    assert domains != sorted(domains)


def test_seeds_and_intervals_draw_differently_and_the_same_seed_alike():
    def drawn(seed, intervals=2):
        m = mixture(seed)
        found = []
        for _ in range(intervals):
            m.draw()
            found.append(m.slots())
        return found

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert [d for d, _ in drawn(1)[0]] != [d for d, _ in drawn(1)[1]]


def test_state_gives_the_interval_again_and_all_that_follow():
    straight, shares = mixture(3), [[0.2, 0.5, 0.3], [0.6, 0.2, 0.2], [0.1, 0.1, 0.8]]
    seen, states = [], []
    for weights in shares:
        straight.set_weights(weights)
        straight.draw()
        seen.append(straight.slots())
        states.append(json.loads(json.dumps(straight.state_dict())))
    for start, state in enumerate(states):
        resumed = mixture(3)
        resumed.load_state_dict(state)
        assert resumed.slots() == seen[start]
        for following in range(start + 1, 3):
            resumed.set_weights(shares[following])
            resumed.draw()
            assert resumed.slots() == seen[following]
        assert resumed.state_dict() == states[-1]


def test_a_state_before_the_first_interval():
    fresh = mixture()
    fresh.load_state_dict(json.loads(json.dumps(mixture().state_dict())))
    with pytest.raises(InputError, match="no interval has been drawn"):
        fresh[0]


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_one_draw_without_overlap(processes):
    m = mixture(size=60)
    m.draw()
    sampler = SeededSampler(len(m), seed=5)
    sampler.set_epoch(1)
    dealt = []
    for process in range(processes):
        batches = BatchSamplerShard(BatchSampler(sampler, 5, drop_last=False), processes, process)
        dealt += [index for batch in batches for _, index in batch]
    assert sorted(dealt) == list(range(60))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_reads_each_interval_even_with_workers_that_stay(workers):
    m = mixture(size=24)
    loader = seeded_loader(m, 6, seed=1, num_workers=workers, collate=list)
    for epoch in range(3):
        m.set_weights([1.0, 0.0, 0.0] if epoch % 2 else [0.0, 0.5, 0.5])
        m.draw()
        set_epoch(loader, epoch)
        read = [sample for batch in loader for sample in batch]
        assert sorted(read) == sorted(m[i] for i in range(24))
        assert {name for name, _ in read} == ({"a"} if epoch % 2 else {"b", "c"})


def test_it_is_a_plain_map_style_data_set():
    m = mixture()
    m.draw()
    batch = next(iter(DataLoader(m, batch_size=4, collate_fn=list)))
    assert batch == [m[i] for i in range(4)]


def test_domains_of_a_data_set_with_a_domain_column():
    from datasets import Dataset

    rows = Dataset.from_dict({"input_ids": [[i] for i in range(6)], "domain": [1, 0, 1, 1, 0, 1]})
    parts = by_domain(rows, ["x", "y"], limit=3)
    assert parts["x"]["input_ids"] == [[1], [4]]
    assert parts["y"]["input_ids"] == [[0], [2], [3]]
    with pytest.raises(InputError, match="domain 'z' has no example"):
        by_domain(rows, ["x", "y", "z"])
    with pytest.raises(InputError, match="has no domains"):
        by_domain(rows.remove_columns("domain"), ["x"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [0.5, 0.5]}, "allowed: 3 shares"),
        ({"weights": [0.5, 0.6, -0.1]}, "allowed: 3 shares"),
        ({"weights": [0.5, 0.3, 0.1]}, "sum to 1"),
        ({"weights": [float("nan"), 0.5, 0.5]}, "sum to 1"),
    ],
)
def test_bad_shares_are_named(change, message):
    with pytest.raises(InputError, match=message):
        mixture().set_weights(change["weights"])


def test_bad_mixtures_are_named():
    with pytest.raises(InputError, match="domain 'b': has no sample"):
        DomainMixture(datasets(a=1, b=0), size=4)
    with pytest.raises(InputError, match="at least one domain"):
        DomainMixture({}, size=4)
    with pytest.raises(InputError, match="size = 0"):
        mixture(size=0)
    with pytest.raises(InputError, match="counts = 'x'"):
        mixture(counts="x")


@pytest.mark.parametrize("other", [{"seed": 9}, {"size": 41}, {"sizes": {"a": 7, "b": 50, "c": 24}}])
def test_the_state_of_another_mixture_is_refused(other):
    m = mixture()
    m.draw()
    name = next(iter(other))
    with pytest.raises(InputError, match=f"mixture: '{name}' was .* in the checkpoint"):
        mixture(**other).load_state_dict(m.state_dict())


def test_reading_does_not_touch_the_global_generators():
    before = torch.get_rng_state()
    m = mixture()
    m.draw()
    m[0]
    assert torch.equal(before, torch.get_rng_state())

"""DomainMixture: a training set whose shares of domains may change between intervals of training.

Training is cut into intervals of `size` samples. For each interval the whole list of samples is drawn up front, from
the shares that hold then; so no prefetching loader mixes two intervals. With N domains of n_i samples, shares r and
positions p (where each domain stands):

    domain of slot s  ~ Categorical(r)             generator seeded by (seed, interval): the same on every process
    sample of slot s  = the next one of its domain, p_i <- p_i + 1, from the beginning again after the last

As a map-style data set it has `size` items, the slots of the current interval: one epoch of a loader is one interval,
a sampler's permutation is the shuffle, and a loader that deals one global order to its processes gives them disjoint
slots. Slots lie in shared memory, so that workers that outlive an interval see the next one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kdcore.data import mix
from kdcore.errors import InputError


class DomainMixture(Dataset[Any]):
    """See the module. `draw` starts an interval; before the first one there are no slots.

    datasets: name -> map-style data set of the domain, in the order that shares have; read from its beginning on.
    size: samples of an interval, over all processes: steps x batch size x accumulation.
    counts: "categorical", or "rounded": round(r_i size) samples of domain i (largest remainders), at random slots.
    Raises InputError: no domain, an empty one, size < 1.
    """

    def __init__(
        self,
        datasets: Mapping[str, Any],
        seed: int = 0,
        *,
        size: int,
        counts: Literal["categorical", "rounded"] = "categorical",
    ):
        if not datasets:
            raise InputError("datasets: empty; a mixture needs at least one domain")
        for name, dataset in datasets.items():
            if len(dataset) == 0:
                raise InputError(f"domain '{name}': has no sample")
        if size < 1:
            raise InputError(f"size = {size}: an interval needs at least one sample")
        if counts not in ("categorical", "rounded"):
            raise InputError(f"counts = {counts!r}: allowed: 'categorical', 'rounded'")
        self.names, self.datasets = list(datasets), list(datasets.values())
        self.sizes = [len(dataset) for dataset in self.datasets]
        self.seed, self.size, self.counts = seed, size, counts
        self.weights = self.natural
        self.interval = -1
        self.positions = [0] * len(self.names)
        self._begin = list(self.positions)
        self._domains = torch.zeros(size, dtype=torch.int64).share_memory_()
        self._places = torch.zeros(size, dtype=torch.int64).share_memory_()

    @property
    def natural(self) -> list[float]:
        """The shares of the corpus as it is: n_i / sum n."""
        total = sum(self.sizes)
        return [size / total for size in self.sizes]

    def set_weights(self, weights: Sequence[float]) -> None:
        """The shares of the next interval. Raises InputError unless they are N finite shares >= 0 that sum to 1."""
        weights = [float(weight) for weight in weights]
        if (
            len(weights) != len(self.names)
            or not all(math.isfinite(weight) and weight >= 0 for weight in weights)
            or abs(sum(weights) - 1) > 1e-6
        ):
            raise InputError(f"weights = {weights}: allowed: {len(self.names)} shares >= 0 that sum to 1")
        self.weights = weights

    def draw(self) -> None:
        """Starts the next interval: draws its slots from `weights` and moves the positions on."""
        self.interval += 1
        self._begin = list(self.positions)
        self._fill()

    def _fill(self) -> None:
        generator = torch.Generator().manual_seed(mix(self.seed, self.interval))
        domains = self._drawn(generator)
        self._domains.copy_(domains)
        for domain, size in enumerate(self.sizes):
            slots = (domains == domain).nonzero().squeeze(1)
            self._places[slots] = (self._begin[domain] + torch.arange(len(slots))) % size
            self.positions[domain] = (self._begin[domain] + len(slots)) % size

    def _drawn(self, generator: torch.Generator) -> Tensor:
        """The domain of every slot, (size,) int64."""
        shares = torch.tensor(self.weights, dtype=torch.float64)
        if self.counts == "categorical":
            return torch.multinomial(shares, self.size, replacement=True, generator=generator)
        counts = torch.tensor(rounded_counts(self.weights, self.size))
        domains = torch.arange(len(shares)).repeat_interleave(counts)
        return domains[torch.randperm(self.size, generator=generator)]

    # ------------------------------------------------------------ reading

    def slots(self) -> list[tuple[int, int]]:
        """(domain, sample of the domain) of every slot of the interval. InputError before the first `draw`."""
        self._check_drawn()
        return list(zip(self._domains.tolist(), self._places.tolist(), strict=True))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, slot: int) -> Any:
        self._check_drawn()
        return self.datasets[int(self._domains[slot])][int(self._places[slot])]

    def _check_drawn(self) -> None:
        if self.interval < 0:
            raise InputError("DomainMixture: no interval has been drawn; call draw() first")

    # ------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Plain values that give the current interval again, and so all that follow.

        `begin` are the positions at the interval's start; (seed, interval) is the state of the generator.
        """
        return {
            "names": list(self.names),
            "sizes": list(self.sizes),
            "size": self.size,
            "counts": self.counts,
            "seed": self.seed,
            "interval": self.interval,
            "weights": list(self.weights),
            "begin": list(self._begin),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to the interval of a state: the same slots, in the same order. InputError for another mixture's."""
        own = self.state_dict()
        for name in ("names", "sizes", "size", "counts", "seed"):
            if state[name] != own[name]:
                raise InputError(f"mixture: '{name}' was {state[name]!r} in the checkpoint and is {own[name]!r} now")
        self.set_weights(state["weights"])
        self.interval, self._begin = int(state["interval"]), [int(place) for place in state["begin"]]
        self.positions = list(self._begin)
        if self.interval >= 0:
            self._fill()


def rounded_counts(weights: Sequence[float], size: int) -> list[int]:
    """Whole numbers that sum to `size`, each r_i size rounded down or up; the largest remainders go up.

    >>> rounded_counts([0.5, 0.3, 0.2], 7)
    [4, 2, 1]
    """
    exact = [weight * size for weight in weights]
    counts = [math.floor(value) for value in exact]
    order = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in order[: size - sum(counts)]:
        counts[i] += 1
    return counts


def by_domain(rows: Any, names: Sequence[str], *, limit: int | None = None) -> dict[str, Any]:
    """Rows of a Hugging Face data set with a `domain` column, by domain; `limit` of each at most.

    Raises InputError: no such column, or a domain without a row.
    """
    if "domain" not in rows.column_names:
        raise InputError("data: has no domains; choose data.name 'stdlib', or give data.columns.domain")
    places: list[list[int]] = [[] for _ in names]
    for place, domain in enumerate(rows["domain"]):
        places[domain].append(place)
    for name, found in zip(names, places, strict=True):
        if not found:
            raise InputError(f"data: domain '{name}' has no example")
    return {name: rows.select(found[:limit]) for name, found in zip(names, places, strict=True)}

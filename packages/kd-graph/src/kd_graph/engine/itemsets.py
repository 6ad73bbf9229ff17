"""Frequent itemsets, exactly: every set of items that at least `threshold` transactions contain.

Vertical mining: an item is the bit set of the transactions that hold it, a set's support the number of ones in the
intersection. Depth first over items in ascending support, so that a set is reached once and an infrequent prefix ends
its branch (a superset is never more frequent).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from kdcore.errors import InputError

ItemSet = tuple[int, ...]


class TooMany(Exception):
    """More frequent sets than allowed; `found` is a lower bound."""

    def __init__(self, found: int):
        super().__init__(f"more than {found} frequent sets")
        self.found = found


def bit_sets(transactions: Sequence[Collection[int]]) -> dict[int, int]:
    """Item -> bit set of the transactions that hold it; an item counts once a transaction."""
    bits: dict[int, int] = {}
    for number, transaction in enumerate(transactions):
        for item in set(transaction):
            bits[item] = bits.get(item, 0) | 1 << number
    return bits


def frequent_sets(
    transactions: Sequence[Collection[int]],
    threshold: int,
    *,
    max_size: int | None = None,
    most: int | None = None,
) -> dict[ItemSet, int]:
    """Sorted tuple of items -> support, for every non-empty set with support >= threshold (and at most `max_size`).

    Raises InputError for a threshold below 1, TooMany beyond `most` sets.

    >>> frequent_sets([{1, 2}, {1, 2, 3}, {1}], 2)
    {(1,): 3, (1, 2): 2, (2,): 2}
    """
    if threshold < 1:
        raise InputError(f"threshold = {threshold}: allowed: a count of 1 or more")
    items = sorted(
        ((item, bits) for item, bits in bit_sets(transactions).items() if bits.bit_count() >= threshold),
        key=lambda pair: (pair[1].bit_count(), pair[0]),
    )
    found: dict[ItemSet, int] = {}

    def grow(prefix: ItemSet, candidates: Sequence[tuple[int, int]]) -> None:
        for index, (item, bits) in enumerate(candidates):
            own = (*prefix, item)
            found[tuple(sorted(own))] = bits.bit_count()
            if most is not None and len(found) > most:
                raise TooMany(len(found))
            if max_size is None or len(own) < max_size:
                rest = ((other, bits & theirs) for other, theirs in candidates[index + 1 :])
                grow(own, [pair for pair in rest if pair[1].bit_count() >= threshold])

    grow((), items)
    return dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))


def fitting_threshold(
    transactions: Sequence[Collection[int]], threshold: int, *, most: int, max_size: int | None = None
) -> int:
    """The lowest threshold, not below the given one, with at most `most` frequent sets. One item's support always is
    enough to come down to the items alone, so the search ends."""
    low, high = threshold, len(transactions) + 1
    while low < high:
        middle = (low + high) // 2
        try:
            frequent_sets(transactions, middle, max_size=max_size, most=most)
            high = middle
        except TooMany:
            low = middle + 1
    return low


def exclude_shared(found: Mapping[int, Mapping[ItemSet, int]]) -> dict[int, dict[ItemSet, int]]:
    """Per class, the sets that are frequent in no other class."""
    return {
        own: {
            items: support
            for items, support in sets.items()
            if not any(items in others for other, others in found.items() if other != own)
        }
        for own, sets in found.items()
    }


def closed_sets(found: Mapping[ItemSet, int]) -> dict[ItemSet, int]:
    """The sets of `found` without a superset in it of the same support. `expand_closed` gives the others back, provided
    that `found` has every non-empty subset of its sets."""
    covered: set[ItemSet] = set()
    for items, support in found.items():
        for leave in range(len(items)):
            subset = items[:leave] + items[leave + 1 :]
            if found.get(subset) == support:
                covered.add(subset)
    return {items: support for items, support in found.items() if items not in covered}


def expand_closed(closed: Mapping[ItemSet, int]) -> dict[ItemSet, int]:
    """Every non-empty subset of the closed sets, with the largest support of a set that holds it."""
    found: dict[ItemSet, int] = {}
    for items, support in sorted(closed.items(), key=lambda pair: -pair[1]):
        pending = [items]
        while pending:
            own = pending.pop()
            if own in found:  # and with it all its subsets
                continue
            found[own] = support
            pending += [own[:leave] + own[leave + 1 :] for leave in range(len(own)) if len(own) > 1]
    return dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))

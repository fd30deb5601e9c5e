"""Partitions: advanced, split and coalesced, no slot is ever lost or in two of them."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lte_ray.data.partition import (
    Partition,
    Partitions,
    advance,
    are_disjoint,
    coalesce,
    density,
    initial_partitions,
    is_continuation,
    slots,
    split,
    to_partitions,
)


@st.composite
def disjoint_partitions(draw: st.DrawFn) -> Partitions:
    """Draws some of the partitions that result from splitting all slots, each advanced by its own number of batches."""
    partitions = [Partition(0, 1)]
    for pick in draw(st.lists(st.integers(0, 50), max_size=7)):
        (first, stride), parts = partitions.pop(pick % len(partitions)), 2 + pick % 2
        partitions += [Partition(first + i * stride, parts * stride) for i in range(parts)]
    taken = draw(st.lists(st.integers(0, 40), min_size=len(partitions), max_size=len(partitions)))
    kept = draw(st.integers(1, len(partitions)))
    return to_partitions(Partition(n + k * s, s) for (n, s), k in zip(partitions[:kept], taken, strict=False))


def below(partitions: Partitions, end: int) -> list[int]:
    """Returns all slots of the partitions below `end`, by the definition."""
    return sorted(slot for first, stride in partitions for slot in range(first, end, stride))


@given(disjoint_partitions())
def test_slots_come_in_ascending_order(partitions: Partitions) -> None:
    """They are those of the definition, each once."""
    assert list(itertools.takewhile(lambda slot: slot < 300, slots(partitions))) == below(partitions, 300)


@given(disjoint_partitions(), st.integers(0, 60), st.integers(0, 60))
def test_advancing_takes_the_smallest_slots(partitions: Partitions, first: int, second: int) -> None:
    """The rest is what the iterator would yield next; advancing twice equals advancing once by the sum."""
    left = advance(partitions, first)
    assert list(itertools.islice(slots(left), 30)) == list(itertools.islice(slots(partitions), first, first + 30))
    assert advance(left, second) == advance(partitions, first + second)
    assert is_continuation(left, partitions)


def test_advancing_far_costs_no_more() -> None:
    """10^15 batches of three partitions, exactly: a loop over them would not end."""
    far = advance([(0, 2), (1, 4), (3, 4)], 10**15)
    assert far == (Partition(10**15, 2), Partition(10**15 + 1, 4), Partition(10**15 + 3, 4))
    assert advance(initial_partitions(2, 3), 10**15) == (Partition(2 + 3 * 10**15, 3),)


@given(disjoint_partitions())
def test_a_split_keeps_every_slot_once(partitions: Partitions) -> None:
    """Both parts are non-empty, and together contain all slots."""
    kept, given_ = split(partitions)
    assert kept and given_
    assert below((*kept, *given_), 400) == below(partitions, 400)
    assert are_disjoint((*kept, *given_)) and is_continuation((*kept, *given_), partitions)
    assert min(kept)[0] == min(partitions)[0] or len(partitions) > 1


def test_one_partition_is_split_and_every_other_of_several_is_given_up() -> None:
    """Sorted by stride, so that the parts differ by at most the densest partition."""
    assert split([(5, 3)]) == ((Partition(5, 6),), (Partition(8, 6),))
    assert split([(0, 8), (1, 2), (2, 8), (6, 8), (4, 8)]) == (
        (Partition(1, 2), Partition(2, 8), Partition(6, 8)),
        (Partition(0, 8), Partition(4, 8)),
    )
    with pytest.raises(ValueError, match="no partitions to split"):
        split([])


@given(disjoint_partitions(), st.integers(0, 30))
def test_coalescing_changes_no_slot(partitions: Partitions, batches: int) -> None:
    """The same slots, before and after advancing; nothing is left to coalesce."""
    whole = coalesce(partitions)
    assert below(whole, 400) == below(partitions, 400) and len(whole) <= len(partitions)
    assert below(advance(whole, batches), 400) == below(advance(partitions, batches), 400)
    assert coalesce(whole) == whole
    pairs = itertools.permutations(whole, 2)
    assert not [(a, b) for a, b in pairs if a.stride == b.stride and b.start - a.start == a.stride / 2]


@given(st.integers(1, 3), st.lists(st.integers(0, 9), max_size=6))
def test_coalescing_undoes_splits(stride: int, picks: list[int]) -> None:
    """However a partition was halved, its parts become one again."""
    partitions = [Partition(1, stride)]
    for pick in picks:
        partitions += [partition for part in split([partitions.pop(pick % len(partitions))]) for partition in part]
    assert coalesce(partitions) == (Partition(1, stride),)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 8)), max_size=3))
def test_disjoint_means_that_no_slot_is_shared(partitions: list[tuple[int, int]]) -> None:
    """Compared with all slots of one period (the strides' common multiple, 840) after the last start."""
    found = [slot for first, stride in partitions for slot in range(first, 20 + 840, stride) if slot >= 20]
    assert are_disjoint(partitions) == (len(set(found)) == len(found))


@given(disjoint_partitions())
def test_split_partitions_are_disjoint(partitions: Partitions) -> None:
    """However often and wherever partitions were split."""
    assert are_disjoint(partitions) and density(partitions) <= 1


def test_density_is_the_share_of_slots() -> None:
    """The sum of 1 / stride, exactly."""
    assert density([(0, 2), (1, 4), (3, 8)]) == Fraction(7, 8)
    assert density([]) == 0


def test_a_continuation_is_a_subset_of_equal_density() -> None:
    """Not earlier slots, not other slots, not fewer, no slot twice."""
    assert is_continuation([(6, 4), (4, 4)], [(2, 2)])
    for partitions in ([(0, 2)], [(3, 2)], [(4, 4)], [(4, 4), (8, 4)], [(4, 2), (5, 2)], []):
        assert not is_continuation(partitions, [(2, 2)])


@pytest.mark.parametrize("wrong", [(0,), (0, 0), (-1, 2), (0, 1, 2), (0.0, 1), (True, 1), ("0", 1)])
def test_invalid_partitions_are_refused(wrong: Any) -> None:
    """It takes two integers, the first at least 0, the second at least 1."""
    with pytest.raises(ValueError, match="isn't a partition: it needs a start of at least 0 and a stride of at least 1"):
        to_partitions([(0, 1), wrong])


def test_impossible_counts_are_refused() -> None:
    """Negative batches, batches without partitions, heads that don't exist."""
    with pytest.raises(ValueError, match="can't take -1 batches from 1 partitions"):
        advance([(0, 1)], -1)
    with pytest.raises(ValueError, match="can't take 1 batches from 0 partitions"):
        advance([], 1)
    assert advance([], 0) == () and list(slots([])) == []
    for head, heads in ((3, 3), (-1, 3)):
        with pytest.raises(ValueError, match=f"head {head} of {heads} heads has no partition at the start"):
            initial_partitions(head, heads)

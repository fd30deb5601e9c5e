"""Lanes of batches: taken, split and joined, no slot is ever lost or in two lanes."""

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
def disjoint_lanes(draw: st.DrawFn) -> Partitions:
    """Some of the lanes that splitting all slots gives, each advanced by its own number of batches."""
    lanes = [Partition(0, 1)]
    for pick in draw(st.lists(st.integers(0, 50), max_size=7)):
        (first, stride), parts = lanes.pop(pick % len(lanes)), 2 + pick % 2
        lanes += [Partition(first + i * stride, parts * stride) for i in range(parts)]
    taken = draw(st.lists(st.integers(0, 40), min_size=len(lanes), max_size=len(lanes)))
    kept = draw(st.integers(1, len(lanes)))
    return to_partitions(Partition(n + k * s, s) for (n, s), k in zip(lanes[:kept], taken, strict=False))


def below(lanes: Partitions, end: int) -> list[int]:
    """All slots of these lanes below `end`, by the definition."""
    return sorted(slot for first, stride in lanes for slot in range(first, end, stride))


@given(disjoint_lanes())
def test_slots_come_in_ascending_order(lanes: Partitions) -> None:
    """They are those of the definition, each once."""
    assert list(itertools.takewhile(lambda slot: slot < 300, slots(lanes))) == below(lanes, 300)


@given(disjoint_lanes(), st.integers(0, 60), st.integers(0, 60))
def test_advancing_takes_the_smallest_slots(lanes: Partitions, first: int, second: int) -> None:
    """What is left is what the iterator would give next; twice in a row is once by the sum."""
    left = advance(lanes, first)
    assert list(itertools.islice(slots(left), 30)) == list(itertools.islice(slots(lanes), first, first + 30))
    assert advance(left, second) == advance(lanes, first + second)
    assert is_continuation(left, lanes)


def test_advancing_far_costs_no_more() -> None:
    """10^15 batches of three lanes, exactly: a loop would not end."""
    far = advance([(0, 2), (1, 4), (3, 4)], 10**15)
    assert far == (Partition(10**15, 2), Partition(10**15 + 1, 4), Partition(10**15 + 3, 4))
    assert advance(initial_partitions(2, 3), 10**15) == (Partition(2 + 3 * 10**15, 3),)


@given(disjoint_lanes())
def test_a_split_keeps_every_slot_once(lanes: Partitions) -> None:
    """Both parts hold something; together they hold what there was."""
    kept, given_ = split(lanes)
    assert kept and given_
    assert below((*kept, *given_), 400) == below(lanes, 400)
    assert are_disjoint((*kept, *given_)) and is_continuation((*kept, *given_), lanes)
    assert min(kept)[0] == min(lanes)[0] or len(lanes) > 1


def test_one_lane_is_split_and_of_several_every_other_is_given() -> None:
    """The densest first, so that the parts differ by at most the densest lane."""
    assert split([(5, 3)]) == ((Partition(5, 6),), (Partition(8, 6),))
    assert split([(0, 8), (1, 2), (2, 8), (6, 8), (4, 8)]) == (
        (Partition(1, 2), Partition(2, 8), Partition(6, 8)),
        (Partition(0, 8), Partition(4, 8)),
    )
    with pytest.raises(ValueError, match="no partitions to split"):
        split([])


@given(disjoint_lanes(), st.integers(0, 30))
def test_joining_changes_no_slot(lanes: Partitions, batches: int) -> None:
    """The same slots, before and after some are taken; nothing is left to join."""
    whole = coalesce(lanes)
    assert below(whole, 400) == below(lanes, 400) and len(whole) <= len(lanes)
    assert below(advance(whole, batches), 400) == below(advance(lanes, batches), 400)
    assert coalesce(whole) == whole
    pairs = itertools.permutations(whole, 2)
    assert not [(a, b) for a, b in pairs if a.stride == b.stride and b.start - a.start == a.stride / 2]


@given(st.integers(1, 3), st.lists(st.integers(0, 9), max_size=6))
def test_joining_undoes_splits(stride: int, picks: list[int]) -> None:
    """However one lane was halved, its parts become one again."""
    lanes = [Partition(1, stride)]
    for pick in picks:
        lanes += [lane for part in split([lanes.pop(pick % len(lanes))]) for lane in part]
    assert coalesce(lanes) == (Partition(1, stride),)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 8)), max_size=3))
def test_disjoint_means_that_no_slot_is_shared(lanes: list[tuple[int, int]]) -> None:
    """Against all slots of one period (the strides' common multiple, 840) from where all lanes have begun."""
    found = [slot for first, stride in lanes for slot in range(first, 20 + 840, stride) if slot >= 20]
    assert are_disjoint(lanes) == (len(set(found)) == len(found))


@given(disjoint_lanes())
def test_split_lanes_are_disjoint(lanes: Partitions) -> None:
    """However often and wherever lanes were split."""
    assert are_disjoint(lanes) and density(lanes) <= 1


def test_density_is_the_share_of_slots() -> None:
    """The sum of 1 / stride, exactly."""
    assert density([(0, 2), (1, 4), (3, 8)]) == Fraction(7, 8)
    assert density([]) == 0


def test_what_continues_lanes_is_part_of_them_and_as_dense() -> None:
    """Not from before, not off the lane, not less, not a slot twice."""
    assert is_continuation([(6, 4), (4, 4)], [(2, 2)])
    for lanes in ([(0, 2)], [(3, 2)], [(4, 4)], [(4, 4), (8, 4)], [(4, 2), (5, 2)], []):
        assert not is_continuation(lanes, [(2, 2)])


@pytest.mark.parametrize("wrong", [(0,), (0, 0), (-1, 2), (0, 1, 2), (0.0, 1), (True, 1), ("0", 1)])
def test_what_is_no_lane_is_refused(wrong: Any) -> None:
    """Two whole numbers, the first at least 0, the second at least 1."""
    with pytest.raises(ValueError, match="isn't a partition: it needs a start of at least 0 and a stride of at least 1"):
        to_partitions([(0, 1), wrong])


def test_impossible_counts_are_refused() -> None:
    """Batches below 0, batches of nothing, heads that aren't there."""
    with pytest.raises(ValueError, match="can't take -1 batches from 1 partitions"):
        advance([(0, 1)], -1)
    with pytest.raises(ValueError, match="can't take 1 batches from 0 partitions"):
        advance([], 1)
    assert advance([], 0) == () and list(slots([])) == []
    for head, heads in ((3, 3), (-1, 3)):
        with pytest.raises(ValueError, match=f"head {head} of {heads} heads has no partition at the start"):
            initial_partitions(head, heads)

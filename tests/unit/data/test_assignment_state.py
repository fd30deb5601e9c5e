"""Assignment state: saved, restored, and resumed with another number of heads."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lte_ray.data.assignment import PartitionAssignor
from lte_ray.data.partition import Partition, Partitions, advance, are_disjoint, density, initial_partitions
from lte_ray.errors import StorageError
from lte_ray.messages import Assignment
from tests.support.assignment_world import new_assignor


def busy() -> PartitionAssignor:
    """Returns an assignor with something in each field of its state."""
    assignor = new_assignor(4)
    assignor.remove_head(3)
    assignor.add_head(4, {0, 1, 2})
    assignor.commit(1, [(9, 4)])
    for head in (5, 6):
        assignor.add_head(head, {0, 1, 2})
    assignor.commit(0, [(0, 8)], 0, Assignment(assignor.pending_changes(0, {0, 1, 2})[1], (Partition(4, 8),)))
    return assignor


def test_the_state_goes_through_json() -> None:
    """A restored assignor continues the same way."""
    assignor = busy()
    state = json.loads(json.dumps(assignor.state()))
    assert all(state[name] for name in ("merged", "grants", "waiting", "asked", "honoured"))
    again = PartitionAssignor.from_state(state)
    for one in (assignor, again):
        one.remove_head(0)
        one.add_head(9, {1, 2})
    assert again.state() == assignor.state()
    assert [again.pending_changes(head, {1, 2}) for head in (1, 2)] == [
        assignor.pending_changes(head, {1, 2}) for head in (1, 2)
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("merged"), "it has no 'merged'"),
        (lambda s: s["merged"].update({"0": [[0, 0]]}), "isn't a partition"),
        (lambda s: s["merged"].update({"0": [[1, 8]]}), "a batch of the data twice"),
        (lambda s: s["merged"].pop("2"), "or omit one: every 8 from"),
        (lambda s: s["merged"].update({"x": []}), "invalid literal"),
        (lambda s: s.update(latest="9"), "'9' isn't an integer"),
        (lambda s: s.update(free=3), "not iterable"),
        (lambda s: s.update(merged=[]), "no attribute"),
    ],
)
def test_a_damaged_state_is_one_error(change: Any, message: str) -> None:
    """The error says what is wrong and what to use instead."""
    state = copy.deepcopy(busy().state())
    change(state)
    with pytest.raises(
        StorageError, match=rf"assignment of the data to heads can't be read: .*{message}.*Use the checkpoint before this"
    ):
        PartitionAssignor.from_state(state)


def test_partitions_that_overlap_or_leave_gaps_are_refused() -> None:
    """Slots with two owners, or with none."""
    for heads in ({}, {0: [(0, 2)]}, {0: [(0, 1)], 1: [(1, 2)]}, {0: [(0, 2)], 1: [(2, 2)]}):
        with pytest.raises(ValueError, match="contain a batch of the data twice, or omit one"):
            PartitionAssignor(heads)  # type: ignore[arg-type]


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 50))
def test_after_a_barrier_data_are_repartitioned_as_if_there_had_never_been_other_heads(old: int, new: int, rounds: int) -> None:
    """With all heads equally far, slot g goes to head g mod num_heads from there on."""
    assignor = new_assignor(old)
    for head in range(old):
        assignor.commit(head, advance(initial_partitions(head, old), rounds))
    owners = PartitionAssignor.repartitioned(assignor.state(), new).owners()
    first = old * rounds
    for head in range(new):
        assert owners[head] == advance(initial_partitions(head, new), len(range(head, first, new)))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=7), st.integers(1, 9))
def test_heads_that_are_not_equally_far_are_repartitioned_without_gaps(taken: list[int], new: int) -> None:
    """Each head gets partitions, deterministically; the same number of heads keeps its own."""
    assignor = new_assignor(len(taken))
    for head, batches in enumerate(taken):
        assignor.commit(head, advance(initial_partitions(head, len(taken)), batches))
    state = assignor.state()
    made = PartitionAssignor.repartitioned(state, new)
    found: dict[int, Partitions] = made.owners()
    lanes = [lane for lanes in found.values() for lane in lanes]
    assert sorted(found) == list(range(new))
    assert are_disjoint(lanes) and density(lanes) == 1
    left = [lane for lanes in assignor.owners().values() for lane in lanes]
    assert sorted(slot for n, s in lanes for slot in range(n, 150, s)) == sorted(m for n, s in left for m in range(n, 150, s))
    assert made.state() == PartitionAssignor.repartitioned(state, new).state()
    if new == len(taken):
        assert found == assignor.owners()


def test_repartitioning_keeps_numbers_increasing_and_forgets_waiting_heads() -> None:
    """Numbers continue to increase; all heads restart, so nothing is in flight."""
    assignor = busy()
    state = PartitionAssignor.repartitioned(assignor.state(), 3).state()
    assert state["latest"] == assignor.state()["latest"] > 0
    assert not any(state[name] for name in ("grants", "waiting", "asked", "honoured", "free"))
    assignor = new_assignor(3)
    assignor.commit(0, [(6, 3)])
    assignor.remove_head(2)
    assert PartitionAssignor.repartitioned(assignor.state(), 2).owners() == {
        0: (Partition(2, 3), Partition(6, 3)),
        1: (Partition(1, 3),),
    }
    with pytest.raises(ValueError, match="can't be distributed over 0 heads"):
        PartitionAssignor.repartitioned(assignor.state(), 0)

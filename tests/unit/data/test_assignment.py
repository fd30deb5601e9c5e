"""Assignment of the data: whatever happens to heads, each batch is merged exactly once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lte_ray.data.assignment import PartitionAssignor
from lte_ray.data.partition import Partition, advance, initial_partitions
from lte_ray.messages import Assignment
from tests.support.assignment_world import EVENTS, AssignmentWorld, new_assignor


@settings(max_examples=300)
@given(
    st.integers(1, 5),
    st.lists(st.tuples(st.sampled_from([*EVENTS[:5] * 2, *EVENTS[5:]]), st.integers(0, 9), st.integers(0, 9)), max_size=80),
)
@example(1, [("add", 0, 0), ("direct", 0, 0), ("commit", 0, 0), ("crash", 0, 0)])
def test_each_batch_is_merged_once_whatever_happens(num_heads: int, events: list[tuple[str, int, int]]) -> None:
    """Any order of steps, merges, refusals, kills, restarts, drops, new heads, repartitions and coordinator crashes."""
    world = AssignmentWorld(num_heads)
    for event in events:
        world.play(*event)
    world.settle()
    assert (
        not world.assignor.unassigned and not world.assignor.state()["waiting"]
    )  # every partition has an owner, and every head some
    assert set(world.assignor.owners()) == set(world.heads)
    lowest = min(p.start for partitions in world.assignor.owners().values() for p in partitions)
    assert lowest > 0
    assert sorted(slot for slot in world.merged if slot < lowest) == list(range(lowest))


def test_a_restarted_head_begins_after_what_was_merged() -> None:
    """It repeats unmerged steps, and keeps an assignment that was in flight."""
    assignor = new_assignor(3)
    assignor.commit(1, advance(initial_partitions(1, 3), 4))
    assert assignor.start_head(1) == (Partition(13, 3),)
    assignor.remove_head(2)
    assert assignor.unassigned == (Partition(2, 3),)
    (assignment,), revocation = assignor.pending_changes(0, {0, 1})
    assert (assignment.partitions, revocation) == ((Partition(2, 3),), 0)
    assert assignor.pending_changes(0, {0, 1}) == ((assignment,), 0)  # until it is acknowledged
    assert assignor.start_head(0) == (Partition(0, 3), Partition(2, 3))
    done = Assignment(
        assignment.id, ()
    )  # its lanes are among those; but its number is to come back, or an older state would grant them
    assert assignor.pending_changes(0, {0, 1}) == ((done,), 0)
    assert assignor.start_head(0) == (Partition(0, 3), Partition(2, 3))
    assert assignor.pending_changes(0, {0, 1}) == ((done,), 0)
    assignor.commit(0, [(2, 3), (3, 3)], assignment.id)
    assert assignor.pending_changes(0, {0, 1}) == ((), 0)


def test_an_assignment_counts_once_a_merged_contribution_includes_it() -> None:
    """A contribution from before the assignment leaves it in flight."""
    assignor = new_assignor(2)
    assignor.remove_head(1)
    (assignment,), _ = assignor.pending_changes(0, {0})
    assignor.commit(0, [(4, 2)])
    assert assignor.pending_changes(0, {0})[0] == (assignment,)
    assignor.commit(0, [(6, 2), (5, 2)], assignment_id=assignment.id)
    assert assignor.pending_changes(0, {0})[0] == ()
    assert assignor.start_head(0) == (Partition(5, 1),)


def test_a_new_head_gets_half_of_the_partitions_of_another() -> None:
    """The head with the most partitions gives up half, once its contribution is merged, and only once."""
    assignor = new_assignor(3)
    assignor.remove_head(2)
    (assignment,), _ = assignor.pending_changes(0, {0, 1})
    assignor.commit(0, [(3, 3), (2, 3)], assignment_id=assignment.id)
    assignor.add_head(7, {0, 1})
    assert not assignor.has_partitions(7) and assignor.start_head(7) == ()
    assert assignor.pending_changes(1, {0, 1}) == ((), 0)
    _, revocation = assignor.pending_changes(0, {0, 1})
    assert revocation > assignment.id
    given_up = Assignment(revocation, (Partition(9, 3),))
    assignor.commit(0, [(5, 3)], assignment.id, given_up)
    assert assignor.pending_changes(0, {0, 1, 7}) == ((), 0)
    assert assignor.has_partitions(7) and assignor.start_head(7) == (Partition(9, 3),)
    assignor.commit(0, [(8, 3)], assignment.id, given_up)  # a head tells of its last answer again and again
    assert assignor.start_head(7) == (Partition(9, 3),) and not assignor.unassigned


def test_revocations_go_by_density_and_number() -> None:
    """Of heads with one partition each, the densest is revoked first, then that of the lowest number."""
    assignor = PartitionAssignor({3: (Partition(0, 4),), 2: (Partition(2, 4),), 5: (Partition(1, 2),)})
    for head in (8, 9):
        assignor.add_head(head, {2, 3, 5})
        assignor.add_head(head, {2, 3, 5})
    revoked = {head: assignor.pending_changes(head, {2, 3, 5})[1] for head in (2, 3, 5)}
    assert revoked[5] == 1 and revoked[2] == 2 and revoked[3] == 0


def test_unassigned_partitions_are_distributed_to_new_heads_first() -> None:
    """Each goes to the live head with the fewest when it asks; waiting heads share what becomes unassigned."""
    assignor = new_assignor(5)
    for head in (3, 4):
        assignor.remove_head(head)
    assert assignor.pending_changes(1, {0, 1, 2}) == ((), 0)
    assert [assignment.partitions for assignment in assignor.pending_changes(0, {0, 1, 2})[0]] == [(Partition(3, 5),)]
    assert assignor.pending_changes(2, {0, 1, 2})[0] == ()
    assert [assignment.partitions for assignment in assignor.pending_changes(1, {0, 1, 2})[0]] == [(Partition(4, 5),)]
    for head in (6, 7):
        assignor.add_head(head, {2})
    assignor.remove_head(0)
    assert (assignor.start_head(6), assignor.start_head(7)) == ((Partition(0, 5),), (Partition(3, 5),))
    assignor.start_head(1)
    assignor.add_head(8, {2})
    assignor.remove_head(1)  # two lanes, and one head that waits
    assert assignor.start_head(8) == (Partition(1, 5), Partition(4, 5)) and not assignor.unassigned


def test_a_revocation_outlives_its_head_s_restart_but_not_its_answer() -> None:
    """Unmerged answers don't count; the new incarnation gets the revocation again. If the head is gone, another gets one."""
    assignor = new_assignor(2)
    assignor.add_head(2, {0, 1})
    revocation = assignor.pending_changes(0, {0, 1})[1]
    assert assignor.start_head(0) == (Partition(0, 2),)
    assert assignor.pending_changes(0, {0, 1})[1] == revocation > 0
    assert assignor.pending_changes(1, {1})[1] > revocation  # while head 0 is down
    assignor.commit(0, [(0, 4)], 0, Assignment(revocation, (Partition(2, 4),)))
    assert assignor.pending_changes(0, {0, 1})[1] == 0
    assert assignor.start_head(2) == (Partition(2, 4),)


def test_revocations_after_a_crash_are_newer_than_those_that_heads_answered() -> None:
    """An earlier state doesn't contain the revocation, and a head that answered it must not ignore the next one."""
    assignor = new_assignor(2)
    assignor.commit(0, [(0, 4)], 0, Assignment(9, (Partition(2, 4),)))
    assert assignor.unassigned == (Partition(2, 4),)
    for head in (3, 4):
        assignor.add_head(head, {0})
    assert assignor.pending_changes(0, {0})[1] > 9


def test_nothing_remains_of_a_removed_head() -> None:
    """Neither partitions, revocations nor its turn to wait; a later head with its number gets no old revocation."""
    assignor = new_assignor(2)
    assignor.commit(0, [(0, 4)], 0, Assignment(1, (Partition(2, 4),)))
    assignor.remove_head(1)
    for head in (2, 3, 4):
        assignor.add_head(head, {0})
    assert assignor.pending_changes(0, {0})[1]
    for head in (4, 3, 0):
        assignor.remove_head(head)
    assert assignor.start_head(2) == (Partition(1, 2), Partition(2, 4))
    assignor.commit(2, [(1, 2), (2, 4)], assignor.pending_changes(2, set())[0][-1].id)
    assert assignor.unassigned == (Partition(0, 4),)
    assert assignor.state() == {"merged": {"2": [[1, 2], [2, 4]]}, "free": [[0, 4]], "latest": assignor.state()["latest"]} | {
        name: type(value)() for name, value in assignor.state().items() if name in ("grants", "waiting", "asked", "honoured")
    }


def test_contributions_that_do_not_follow_are_refused() -> None:
    """Going backwards, foreign or missing partitions, a head without any: each has one reason, and changes nothing."""
    assignor = new_assignor(2)
    assignor.commit(0, [(4, 2)])
    before = assignor.state()
    wrong: list[tuple[int, Any, Assignment | None]] = [
        (0, [(2, 2)], None),
        (0, [(5, 2)], None),
        (0, [(4, 4)], None),
        (0, [(4, 4)], Assignment(1, (Partition(8, 4),))),
        (2, [(4, 2)], None),
        (2, [], None),
    ]
    for head, partitions, revoked in wrong:
        with pytest.raises(ValueError, match=rf"head {head} trained on data that aren't its own: it has .* left, but what is"):
            assignor.commit(head, partitions, 0, revoked)
        assert assignor.state() == before
    assert assignor.mismatch(0, [(4, 4)], 0, Assignment(1, (Partition(6, 4),))) == ""
    with pytest.raises(ValueError, match="every 2 from 5 left, but what is merged says every 2 from 4"):
        assignor.commit(0, [(5, 2)])

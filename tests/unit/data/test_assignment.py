"""The ledger of the data: whatever happens to heads, each batch is merged exactly once."""

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
@example(1, [("admit", 0, 0), ("order", 0, 0), ("commit", 0, 0), ("crash", 0, 0)])
def test_each_batch_is_merged_once_whatever_happens(num_heads: int, events: list[tuple[str, int, int]]) -> None:
    """Steps, merges, refusals, kills, restarts, drops, new heads, resumes with other heads and crashes, in any order."""
    world = AssignmentWorld(num_heads)
    for event in events:
        world.play(*event)
    world.settle()
    assert (
        not world.assignor.unassigned and not world.assignor.state()["waiting"]
    )  # every partition has an owner, and every head some
    assert set(world.assignor.owners()) == set(world.heads)
    lowest = min(lane.start for lanes in world.assignor.owners().values() for lane in lanes)
    assert lowest > 0
    assert sorted(slot for slot in world.merged if slot < lowest) == list(range(lowest))


def test_a_restarted_head_begins_behind_what_was_merged() -> None:
    """Steps that no merged contribution holds are taken again; a grant that was on its way is not lost."""
    book = new_assignor(3)
    book.commit(1, advance(initial_partitions(1, 3), 4))
    assert book.start_head(1) == (Partition(13, 3),)
    book.remove_head(2)
    assert book.unassigned == (Partition(2, 3),)
    (grant,), request = book.pending_changes(0, {0, 1})
    assert (grant.partitions, request) == ((Partition(2, 3),), 0)
    assert book.pending_changes(0, {0, 1}) == ((grant,), 0)  # until it is acknowledged
    assert book.start_head(0) == (Partition(0, 3), Partition(2, 3))
    done = Assignment(
        grant.id, ()
    )  # its lanes are among those; but its number is to come back, or an older state would grant them
    assert book.pending_changes(0, {0, 1}) == ((done,), 0)
    assert book.start_head(0) == (Partition(0, 3), Partition(2, 3))
    assert book.pending_changes(0, {0, 1}) == ((done,), 0)
    book.commit(0, [(2, 3), (3, 3)], grant.id)
    assert book.pending_changes(0, {0, 1}) == ((), 0)


def test_a_grant_counts_when_a_merged_contribution_holds_it() -> None:
    """A contribution from before the grant leaves it on its way."""
    book = new_assignor(2)
    book.remove_head(1)
    (grant,), _ = book.pending_changes(0, {0})
    book.commit(0, [(4, 2)])
    assert book.pending_changes(0, {0})[0] == (grant,)
    book.commit(0, [(6, 2), (5, 2)], assignment_id=grant.id)
    assert book.pending_changes(0, {0})[0] == ()
    assert book.start_head(0) == (Partition(5, 1),)


def test_a_new_head_gets_half_of_the_lanes_of_another() -> None:
    """The one with the most lanes is asked, and what it gave away counts once its contribution is merged, and only once."""
    book = new_assignor(3)
    book.remove_head(2)
    (grant,), _ = book.pending_changes(0, {0, 1})
    book.commit(0, [(3, 3), (2, 3)], assignment_id=grant.id)
    book.add_head(7, {0, 1})
    assert not book.has_partitions(7) and book.start_head(7) == ()
    assert book.pending_changes(1, {0, 1}) == ((), 0)
    _, request = book.pending_changes(0, {0, 1})
    assert request > grant.id
    given = Assignment(request, (Partition(9, 3),))
    book.commit(0, [(5, 3)], grant.id, given)
    assert book.pending_changes(0, {0, 1, 7}) == ((), 0)
    assert book.has_partitions(7) and book.start_head(7) == (Partition(9, 3),)
    book.commit(0, [(8, 3)], grant.id, given)  # a head tells of its last answer again and again
    assert book.start_head(7) == (Partition(9, 3),) and not book.unassigned


def test_equal_heads_are_asked_by_density_and_number() -> None:
    """Of heads with one lane each, the one with the densest is asked, then the lowest number."""
    book = PartitionAssignor({3: (Partition(0, 4),), 2: (Partition(2, 4),), 5: (Partition(1, 2),)})
    for head in (8, 9):
        book.add_head(head, {2, 3, 5})
        book.add_head(head, {2, 3, 5})
    asked = {head: book.pending_changes(head, {2, 3, 5})[1] for head in (2, 3, 5)}
    assert asked[5] == 1 and asked[2] == 2 and asked[3] == 0


def test_free_lanes_are_spread_and_go_to_new_heads_first() -> None:
    """Each goes to the live head with the fewest, when its turn comes; heads that wait share what becomes free."""
    book = new_assignor(5)
    for head in (3, 4):
        book.remove_head(head)
    assert book.pending_changes(1, {0, 1, 2}) == ((), 0)
    assert [grant.partitions for grant in book.pending_changes(0, {0, 1, 2})[0]] == [(Partition(3, 5),)]
    assert book.pending_changes(2, {0, 1, 2})[0] == ()
    assert [grant.partitions for grant in book.pending_changes(1, {0, 1, 2})[0]] == [(Partition(4, 5),)]
    for head in (6, 7):
        book.add_head(head, {2})
    book.remove_head(0)
    assert (book.start_head(6), book.start_head(7)) == ((Partition(0, 5),), (Partition(3, 5),))
    book.start_head(1)
    book.add_head(8, {2})
    book.remove_head(1)  # two lanes, and one head that waits
    assert book.start_head(8) == (Partition(1, 5), Partition(4, 5)) and not book.unassigned


def test_a_request_outlives_its_head_s_restart_but_not_its_answer() -> None:
    """What wasn't merged was never given; the new incarnation is asked again. If the head is gone, another is asked."""
    book = new_assignor(2)
    book.add_head(2, {0, 1})
    request = book.pending_changes(0, {0, 1})[1]
    assert book.start_head(0) == (Partition(0, 2),)
    assert book.pending_changes(0, {0, 1})[1] == request > 0
    assert book.pending_changes(1, {1})[1] > request  # while head 0 is down
    book.commit(0, [(0, 4)], 0, Assignment(request, (Partition(2, 4),)))
    assert book.pending_changes(0, {0, 1})[1] == 0
    assert book.start_head(2) == (Partition(2, 4),)


def test_requests_after_a_crash_are_newer_than_what_heads_have_answered() -> None:
    """A ledger from an earlier state doesn't know the request; a head that answered it must not ignore the next."""
    book = new_assignor(2)
    book.commit(0, [(0, 4)], 0, Assignment(9, (Partition(2, 4),)))
    assert book.unassigned == (Partition(2, 4),)
    for head in (3, 4):
        book.add_head(head, {0})
    assert book.pending_changes(0, {0})[1] > 9


def test_of_a_dropped_head_nothing_is_left() -> None:
    """Whether it owned lanes, was asked for some, or waited; a head that gets its number later is asked nothing old."""
    book = new_assignor(2)
    book.commit(0, [(0, 4)], 0, Assignment(1, (Partition(2, 4),)))
    book.remove_head(1)
    for head in (2, 3, 4):
        book.add_head(head, {0})
    assert book.pending_changes(0, {0})[1]
    for head in (4, 3, 0):
        book.remove_head(head)
    assert book.start_head(2) == (Partition(1, 2), Partition(2, 4))
    book.commit(2, [(1, 2), (2, 4)], book.pending_changes(2, set())[0][-1].id)
    assert book.unassigned == (Partition(0, 4),)
    assert book.state() == {"merged": {"2": [[1, 2], [2, 4]]}, "free": [[0, 4]], "latest": book.state()["latest"]} | {
        name: type(value)() for name, value in book.state().items() if name in ("grants", "waiting", "asked", "honoured")
    }


def test_contributions_that_do_not_follow_are_told() -> None:
    """Backwards, others' lanes, lanes forgotten, a head that owns nothing: one reason each, and nothing is changed."""
    book = new_assignor(2)
    book.commit(0, [(4, 2)])
    before = book.state()
    wrong: list[tuple[int, Any, Assignment | None]] = [
        (0, [(2, 2)], None),
        (0, [(5, 2)], None),
        (0, [(4, 4)], None),
        (0, [(4, 4)], Assignment(1, (Partition(8, 4),))),
        (2, [(4, 2)], None),
        (2, [], None),
    ]
    for head, lanes, released in wrong:
        with pytest.raises(ValueError, match=rf"head {head} trained on data that aren't its own: it has .* left, but what is"):
            book.commit(head, lanes, 0, released)
        assert book.state() == before
    assert book.mismatch(0, [(4, 4)], 0, Assignment(1, (Partition(6, 4),))) == ""
    with pytest.raises(ValueError, match="every 2 from 5 left, but what is merged says every 2 from 4"):
        book.commit(0, [(5, 2)])

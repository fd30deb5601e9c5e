"""When to merge: barrier, quorum with and without a deadline, and each arrival."""

from __future__ import annotations

import dataclasses

import pytest

from lte_ray.config import MergeConfig
from lte_ray.engine.coordinator.coordinator import Coordinator
from lte_ray.errors import ConfigError
from lte_ray.merging import Arrival, Average, Barrier, ComposedPolicy, Quorum, Roster, Wait, make_policy
from lte_ray.merging.policies.trigger import make_trigger
from tests.support.numerics import assert_near
from tests.support.plans import make_contribution, random_flat
from tests.support.policies import PLAN, make_coordinator, make_pending, make_roster


def send(coordinator: Coordinator, head: int, sequence: int = 1) -> list[tuple[int, ...]]:
    """Lets a head contribute; returns the heads of each merge that followed."""
    event_result = coordinator.receive(
        make_contribution(head, sequence), random_flat(PLAN.contribution.size, 10 * sequence + head)
    )
    return [merge.heads for merge in event_result.merges]


def living(roster: Roster, *heads: int) -> Roster:
    return dataclasses.replace(roster, live=frozenset(heads))


def test_the_settings_choose() -> None:
    """--when, --quorum and --deadline."""
    assert isinstance(make_trigger(MergeConfig()), Barrier)
    assert isinstance(make_trigger(MergeConfig(when="arrival")), Arrival)
    quorum = make_trigger(MergeConfig(when="quorum", quorum=3, deadline=2.5))
    assert isinstance(quorum, Quorum)
    assert (quorum.size, quorum.deadline) == (3, 2.5)


@pytest.mark.parametrize(("name", "value"), [("quorum", 2), ("deadline", 1.5)])
@pytest.mark.parametrize("when", ["barrier", "arrival"])
def test_a_quorum_that_doesnt_count_is_a_config_error(name: str, value: float, when: str) -> None:
    """It would be ignored silently."""
    with pytest.raises(ConfigError, match=f"--{name} is {value}, but it only counts with --when quorum, not {when}."):
        MergeConfig(when=when, **{name: value})  # type: ignore[arg-type]


def test_barrier_takes_all_or_waits_for_those_missing() -> None:
    """It lists missing heads by number, or many by their count."""
    pending, roster = make_pending(3), make_roster(3)
    assert Barrier().ready(pending, roster) == pending
    assert Barrier().ready(pending[::2], roster) == Wait("for heads [1]")
    assert Barrier().ready(pending[:2], living(roster, 0, 1)) == pending[:2]
    assert Barrier().ready([], living(roster)) == Wait("for a head to join")
    assert Barrier().ready(pending, make_roster(20)) == Wait("for 17 of 20 heads")


@pytest.mark.parametrize(
    ("size", "live", "there", "ready"),
    [
        (0, 4, 1, False), (0, 4, 2, True), (0, 5, 2, False), (0, 5, 3, True), (0, 1, 1, True),
        (3, 4, 2, False), (3, 4, 3, True), (3, 2, 2, True), (9, 4, 3, False), (9, 4, 4, True), (1, 4, 1, True),
    ],
)  # fmt: skip
def test_quorum_takes_what_is_there_once_it_is_enough(size: int, live: int, there: int, ready: bool) -> None:
    """The first k; 0 is half of the live heads; never more than are live."""
    pending = make_pending(there)
    found = Quorum(size).ready(pending, living(make_roster(9), *range(live)))
    assert found == pending if ready else isinstance(found, Wait) and found.until is None


def test_a_quorum_of_nothing_waits() -> None:
    """Also when the last head has left."""
    assert Quorum(2).ready([], make_roster(3)) == Wait("for 2 of 2 contributions")
    assert isinstance(Quorum(2).ready([], living(make_roster(3))), Wait)


def test_a_deadline_is_after_the_first_contribution() -> None:
    """When called again at the deadline, it merges what is pending."""
    pending = make_pending(2)  # which arrived at 0 and 1
    quorum = Quorum(3, deadline=1.5)
    assert quorum.ready(pending, make_roster(4, now=1.0)) == Wait("for 1 of 3 contributions", until=1.5)
    assert quorum.ready(pending, make_roster(4, now=1.5)) == pending


def test_a_deadline_merges_by_the_coordinators_clock() -> None:
    """The coordinator calls the policy at the requested time, and the late head's contribution starts another quorum."""
    now = [10.0]
    coordinator, _ = make_coordinator(ComposedPolicy(Average(), Quorum(3, deadline=2.0)), heads=3, now=now)
    assert send(coordinator, 1) == []
    assert coordinator.wakes_at == 12.0
    now[0] = 11.0
    assert send(coordinator, 0) == []
    assert coordinator.wakes_at == 12.0
    now[0] = 12.0
    assert [m.heads for m in coordinator.tick().merges] == [(0, 1)]
    assert coordinator.wakes_at is None
    now[0] = 13.0
    assert send(coordinator, 2) == []
    assert coordinator.wakes_at == 15.0


def test_arrival_takes_one_at_a_time_in_order() -> None:
    """The first one to arrive comes first."""
    pending = make_pending(3)
    late = dataclasses.replace(pending[0], arrived=9.0)
    assert Arrival().ready([late, *pending[1:]], make_roster(3)) == [pending[1]]
    assert Arrival().ready([], make_roster(3)) == Wait("for a contribution")


def test_each_arrival_is_a_version() -> None:
    """Each version merges one head with its own weight."""
    coordinator, _ = make_coordinator(make_policy(MergeConfig(when="arrival")), heads=3)
    assert [send(coordinator, head) for head in (2, 0, 1)] == [[(2,)], [(0,)], [(1,)]]
    assert coordinator.version == 3


@pytest.mark.parametrize("heads", [1, 2, 5])
def test_n_arrivals_are_one_barrier_merge_where_nobody_trains_between(heads: int) -> None:
    """Each has weight 1/N: the bases agree up to rounding, and with one head bit for bit."""
    one_by_one, _ = make_coordinator(make_policy(MergeConfig(when="arrival")), heads)
    at_once, _ = make_coordinator(make_policy(MergeConfig()), heads)
    for sequence in (1, 2):
        for head in range(heads):
            send(one_by_one, head, sequence)
            send(at_once, head, sequence)
    assert_near(one_by_one.base, at_once.base, 1e-14 if heads > 1 else 0.0)  # the order of some float64 sums
    assert (one_by_one.version, at_once.version) == (2 * heads, 2)


def test_a_head_that_leaves_completes_barrier_and_quorum() -> None:
    """The remaining heads are then enough."""
    for policy in (make_policy(MergeConfig()), make_policy(MergeConfig(when="quorum", quorum=2))):
        coordinator, _ = make_coordinator(policy, heads=2)
        assert send(coordinator, 0) == []
        assert [m.heads for m in coordinator.leave(1).merges] == [(0,)]

"""Where a run goes on when its coordinator is lost: at the newest version that came to any process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from lte_ray.engine.coordinator.recovery import recover
from lte_ray.messages import CommittedPosition, HeadReport, RecoveryReport


def report(
    version: int, held: dict[int, int], heads: dict[int, HeadReport], ledger: dict[str, Any] | None = None
) -> RecoveryReport:
    """What a process knows: its newest version, what that holds of every head (contributions' numbers), and its heads."""
    standings = {head: CommittedPosition(sequence=sequence, version=version) for head, sequence in held.items()}
    return RecoveryReport(version, f"base {version}" if version >= 0 else None, standings, ledger or {}, heads)


def own(*sequences: int, limit: int = 10, **values: Any) -> HeadReport:
    """A head whose factors after these contributions its process still has."""
    return HeadReport(5, limit, factors={s: f"factors {s}" if s else None for s in sequences}, **values)


def test_the_newest_version_counts_whoever_has_it() -> None:
    """With the references that it holds, each from its own head's process, which may not have heard of that version."""
    found = recover([report(3, {0: 2, 1: 1}, {0: own(1, 2)}), report(5, {0: 2, 1: 3}, {1: own(2, 3, limit=14)})])
    assert found is not None
    assert (found.version, found.base) == (5, "base 5")
    assert {head: held.sequence for head, held in found.positions.items()} == {0: 2, 1: 3}
    assert found.references == {0: "factors 2", 1: "factors 3"}
    assert found.step_limits == {0: 10, 1: 14}
    assert (found.restart_heads, found.heads_without_factors) == (frozenset(), frozenset())


def test_a_merge_that_came_to_nobody_never_was() -> None:
    """Version 4, say, held both heads' second contributions: each goes on with what version 3 holds, and sends it again."""
    reports = [report(3, {0: 1, 1: 1}, {0: own(1, 2)}), report(3, {0: 1, 1: 1}, {1: own(1, 2)})]
    found = recover(reports)
    assert found is not None
    assert found.references == {0: "factors 1", 1: "factors 1"}


def test_a_head_that_died_with_the_coordinator_is_unknown() -> None:
    """What was merged of it stays in the base; nobody has its factors. One of which nothing was merged has none."""
    found = recover([report(4, {0: 2, 1: 3, 2: 0}, {0: own(2)})])
    assert found is not None
    assert found.references == {0: "factors 2"}
    assert found.heads_without_factors == {1}


def test_a_head_whose_process_lacks_the_version_s_factors_is_unknown() -> None:
    """It knows another contribution's only."""
    found = recover([report(4, {0: 2}, {0: own(3)})])
    assert found is not None
    assert (found.references, found.heads_without_factors) == ({}, {0})


def test_factors_that_are_reset_are_known_to_be_none() -> None:
    """With B' = 0 there is no reference, and nothing is missing."""
    found = recover([report(4, {0: 2}, {0: HeadReport(5, 10, factors={2: None})})])
    assert found is not None
    assert (found.references, found.heads_without_factors) == ({}, frozenset())


def test_who_followed_forgotten_orders_must_start_anew() -> None:
    """Lanes that were granted or asked for after the ledger that is left: numbers above its latest."""
    heads = {0: own(1, assignment_id=3), 1: own(1, assignment_id=2), 2: own(1, revoked=3), 3: own(1)}
    found = recover([report(4, dict.fromkeys(range(4), 1), heads, {"latest": 2})])
    assert found is not None
    assert found.restart_heads == {0, 2}


def test_where_nobody_has_a_base_there_is_nothing_to_go_on_from() -> None:
    """The checkpoint has to do, or the start."""
    assert recover([]) is None
    assert recover([report(-1, {}, {0: own(0)}), report(-1, {}, {})]) is None
    assert recover([replace(report(7, {0: 1}, {}), base=None)]) is None
    found = recover([replace(report(7, {0: 1}, {}), base=None), report(6, {0: 1}, {0: own(1)})])
    assert found is not None
    assert found.version == 6


@given(st.lists(st.tuples(st.integers(-1, 6), st.booleans()), max_size=6))
def test_recovery_falls_back_no_further_than_it_must(processes: list[tuple[int, bool]]) -> None:
    """In whatever order reports come, the version is the largest of those whose base somebody has."""
    reports = [
        replace(report(version, {0: max(version, 0)}, {}), base="base" if version >= 0 and whole else None)
        for version, whole in processes
    ]
    there = [version for version, whole in processes if version >= 0 and whole]
    for found in (recover(reports), recover(reports[::-1])):
        assert (found.version if found else None) == max(there, default=None)

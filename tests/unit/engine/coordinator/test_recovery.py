"""Where a run continues when its coordinator is lost: at the newest version that any process received."""

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
    """The report of a process: its newest version, the last contribution of each head in it, and its own heads."""
    standings = {head: CommittedPosition(sequence=sequence, version=version) for head, sequence in held.items()}
    return RecoveryReport(version, f"base {version}" if version >= 0 else None, standings, ledger or {}, heads)


def known(*sequences: int, limit: int = 10, **values: Any) -> HeadReport:
    """A head whose process still has its factors after these contributions."""
    return HeadReport(5, limit, factors={s: f"factors {s}" if s else None for s in sequences}, **values)


def test_the_newest_version_of_any_process_counts() -> None:
    """Each reference comes from its own head's process, which may not know that version."""
    recovered = recover([report(3, {0: 2, 1: 1}, {0: known(1, 2)}), report(5, {0: 2, 1: 3}, {1: known(2, 3, limit=14)})])
    assert recovered is not None
    assert (recovered.version, recovered.base) == (5, "base 5")
    assert {head: held.sequence for head, held in recovered.positions.items()} == {0: 2, 1: 3}
    assert recovered.references == {0: "factors 2", 1: "factors 3"}
    assert recovered.step_limits == {0: 10, 1: 14}
    assert (recovered.restart_heads, recovered.heads_without_factors) == (frozenset(), frozenset())


def test_of_two_processes_with_the_newest_version_one_that_knows_its_momentum_counts() -> None:
    """The other may have lost its copy; an older version's momentum isn't this one's."""
    reports = [report(5, {0: 2}, {0: known(2)}), replace(report(5, {0: 2}, {}), momentum="momentum 5")]
    for each in (reports, reports[::-1]):
        recovered = recover([replace(report(4, {0: 1}, {}), momentum="momentum 4"), *each])
        assert recovered is not None
        assert (recovered.version, recovered.momentum, recovered.references) == (5, "momentum 5", {0: "factors 2"})


def test_a_merge_that_no_process_received_is_undone() -> None:
    """If version 4 held both heads' second contributions, both continue from version 3 and send them again."""
    reports = [report(3, {0: 1, 1: 1}, {0: known(1, 2)}), report(3, {0: 1, 1: 1}, {1: known(1, 2)})]
    recovered = recover(reports)
    assert recovered is not None
    assert recovered.references == {0: "factors 1", 1: "factors 1"}


def test_the_factors_of_a_head_that_died_with_the_coordinator_are_unknown() -> None:
    """Head 1 was merged, but no process has its factors. Head 2 was never merged, so it has none."""
    recovered = recover([report(4, {0: 2, 1: 3, 2: 0}, {0: known(2)})])
    assert recovered is not None
    assert recovered.references == {0: "factors 2"}
    assert recovered.heads_without_factors == {1}


def test_factors_of_another_contribution_do_not_count() -> None:
    """The process has those of a later contribution only."""
    recovered = recover([report(4, {0: 2}, {0: known(3)})])
    assert recovered is not None
    assert (recovered.references, recovered.heads_without_factors) == ({}, {0})


def test_no_factors_are_missing_where_b_is_reset() -> None:
    """With B' = 0 with_base is no reference."""
    recovered = recover([report(4, {0: 2}, {0: HeadReport(5, 10, factors={2: None})})])
    assert recovered is not None
    assert (recovered.references, recovered.heads_without_factors) == ({}, frozenset())


def test_heads_that_followed_lost_assignments_must_restart() -> None:
    """Their assignments or revocations have numbers above the latest in the recovered state."""
    heads = {
        0: known(1, assignment_id=3),
        1: known(1, assignment_id=2),
        2: known(1, revocation_id=3),
        3: known(1),
    }
    recovered = recover([report(4, dict.fromkeys(range(4), 1), heads, {"latest": 2})])
    assert recovered is not None
    assert recovered.restart_heads == {0, 2}


def test_without_a_base_nothing_is_recovered() -> None:
    """The run then continues from a checkpoint, or from its start."""
    assert recover([]) is None
    assert recover([report(-1, {}, {0: known(0)}), report(-1, {}, {})]) is None
    assert recover([replace(report(7, {0: 1}, {}), base=None)]) is None
    recovered = recover([replace(report(7, {0: 1}, {}), base=None), report(6, {0: 1}, {0: known(1)})])
    assert recovered is not None
    assert recovered.version == 6


@given(st.lists(st.tuples(st.integers(-1, 6), st.booleans()), max_size=6))
def test_recovery_loses_no_version_that_a_process_has(processes: list[tuple[int, bool]]) -> None:
    """For any order of reports, the version is the largest whose base a process has."""
    reports = [
        replace(report(version, {0: max(version, 0)}, {}), base="base" if version >= 0 and has_base else None)
        for version, has_base in processes
    ]
    with_base = [version for version, has_base in processes if version >= 0 and has_base]
    for recovered in (recover(reports), recover(reports[::-1])):
        assert (recovered.version if recovered else None) == max(with_base, default=None)

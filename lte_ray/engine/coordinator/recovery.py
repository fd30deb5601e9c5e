"""Where a run goes on when its coordinator is lost: the newest version that came to any head.

A version that came to a head can't be unmade: that head may have trained on it. One that came to nobody can: the contributions
in it are still with their heads, which haven't heard of their verdict, and are sent again. So each is merged exactly once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lte_ray.messages import CommittedPosition, RecoveryReport


@dataclass(frozen=True)
class Recovered:
    """The version to go on from, with handles to its base and to the factors that it holds of each head.

    `astray` are heads that have taken over, or given away, data by orders that are forgotten, and those that are about to begin
    from a version that may be forgotten: they must start anew.
    `unknown` are heads of whose factors nobody knows: they start with B = 0, and what was merged stays in the base.
    """

    version: int
    base: Any
    positions: Mapping[int, CommittedPosition]
    assignment_state: Mapping[str, Any]
    references: Mapping[int, Any]
    granted: Mapping[int, int]
    astray: frozenset[int]
    unknown: frozenset[int]


def recover(reports: Sequence[RecoveryReport]) -> Recovered | None:
    """The newest version that the reports know of; None if none of them has a base."""
    known = [report for report in reports if report.base is not None and report.version >= 0]
    if not known:
        return None
    newest = max(known, key=lambda report: report.version)
    latest = int(newest.assignment_state.get("latest", 0))
    heads = {head: own for report in reports for head, own in report.heads.items()}
    references, unknown = {}, set()
    for head, held in newest.positions.items():
        if not held.sequence:
            continue
        if head in heads and held.sequence in heads[head].factors:
            factors = heads[head].factors[held.sequence]
            if factors is not None:
                references[head] = factors
        else:
            unknown.add(head)
    return Recovered(
        version=newest.version,
        base=newest.base,
        positions=newest.positions,
        assignment_state=newest.assignment_state,
        references=references,
        granted={head: own.limit for head, own in heads.items() if own.step >= 0},
        astray=frozenset(head for head, own in heads.items() if own.step < 0 or max(own.assignment_id, own.revoked) > latest)
        & {head for report in known for head in report.heads},
        unknown=frozenset(unknown),
    )


def heads_in_checkpoint(found: Recovered, standings: Mapping[str, Mapping[str, Any]]) -> frozenset[int]:
    """Heads of whose factors nobody knows, but a checkpoint with these standings holds what the version does."""
    return frozenset(
        head for head in found.unknown if standings.get(str(head), {}).get("sequence") == found.positions[head].sequence
    )

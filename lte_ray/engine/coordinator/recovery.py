"""Where a run continues when its coordinator is lost: at the newest version that any head received.

A version that a head received can't be undone: the head may have trained on it. A version that no head received can: the heads
still have the contributions in it, haven't received their results, and send them again. So each is merged exactly once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lte_ray.messages import CommittedPosition, RecoveryReport


@dataclass(frozen=True)
class Recovered:
    """The version to continue from.

    Attributes:
        version: its number.
        base: handle to the base.
        positions: what it holds of each head.
        assignment_state: which head owns which batches at it.
        references: by head, handles to the factors that it holds.
        step_limits: up to which step each head may go.
        restart_heads: heads that must start again: they have taken over or given away data by assignments that are lost, or are
            about to begin from a version that may be lost.
        heads_without_factors: heads whose factors no process knows: they start with B = 0, and what was merged stays in the
            base.
        momentum: handle to the momentum of the outer steps; None if no process knows any.
    """

    version: int
    base: Any
    positions: Mapping[int, CommittedPosition]
    assignment_state: Mapping[str, Any]
    references: Mapping[int, Any]
    step_limits: Mapping[int, int]
    restart_heads: frozenset[int]
    heads_without_factors: frozenset[int]
    momentum: Any = None


def recover(reports: Sequence[RecoveryReport]) -> Recovered | None:
    """The newest version that the reports know of; None if none of them has a base."""
    with_base = [report for report in reports if report.base is not None and report.version >= 0]
    if not with_base:
        return None
    newest = max(with_base, key=lambda report: (report.version, report.momentum is not None))
    heads = {head: each for report in reports for head, each in report.heads.items()}
    references, without_factors = {}, set()
    for head, position in newest.positions.items():
        if not position.sequence:
            continue
        if head in heads and position.sequence in heads[head].factors:
            factors = heads[head].factors[position.sequence]
            if factors is not None:
                references[head] = factors
        else:
            without_factors.add(head)
    latest = int(newest.assignment_state.get("latest", 0))
    restart = {head for head, each in heads.items() if each.step < 0 or max(each.assignment_id, each.revocation_id) > latest}
    return Recovered(
        version=newest.version,
        base=newest.base,
        positions=newest.positions,
        assignment_state=newest.assignment_state,
        references=references,
        step_limits={head: each.limit for head, each in heads.items() if each.step >= 0},
        restart_heads=frozenset(restart & {head for report in with_base for head in report.heads}),
        heads_without_factors=frozenset(without_factors),
        momentum=newest.momentum,
    )


def heads_in_checkpoint(recovered: Recovered, standings: Mapping[str, Mapping[str, Any]]) -> frozenset[int]:
    """The heads without factors for which a checkpoint with these `standings` holds what the version holds."""
    return frozenset(
        head
        for head in recovered.heads_without_factors
        if standings.get(str(head), {}).get("sequence") == recovered.positions[head].sequence
    )

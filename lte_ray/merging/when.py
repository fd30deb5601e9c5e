"""When to merge: what of the pending contributions is merged now, or what to wait for.

How they are merged is the policy's part (`lte_ray.merging.scheduled` puts the two together).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from lte_ray.config import MergeConfig
from lte_ray.merging.policy import Pending, Roster, Wait

NAMED = 8
"""Heads that a reason lists by number; of more it gives the count."""


class When(Protocol):
    """Chooses the contributions that one merge takes."""

    def ready(self, pending: Sequence[Pending], roster: Roster) -> Sequence[Pending] | Wait:
        """The contributions to merge now, at least one, in the order of their heads; or what to wait for."""
        ...


class Barrier:
    """All live heads have contributed: the paper's way."""

    def ready(self, pending: Sequence[Pending], roster: Roster) -> Sequence[Pending] | Wait:
        lacking = len(roster.live) - len(pending)
        if lacking > NAMED:  # at least so many are missing; to name them would cost a pass over all at every arrival
            return Wait(f"for {lacking} of {len(roster.live)} heads")
        missing = roster.live - {p.head for p in pending}
        if missing or not pending:
            return Wait(f"for heads {sorted(missing)}")
        return pending


class Quorum:
    """The first `size` contributions are there, or `deadline` seconds have passed since the first of them arrived.

    Args:
        size: contributions to merge at; 0: half of the live heads, rounded up. Where fewer heads live, that many.
        deadline: seconds; 0: none.
    """

    def __init__(self, size: int = 0, deadline: float = 0.0) -> None:
        self.size, self.deadline = size, deadline

    def ready(self, pending: Sequence[Pending], roster: Roster) -> Sequence[Pending] | Wait:
        live = len(roster.live)
        needed = min(self.size or (live + 1) // 2, live)
        if not pending:
            return Wait(f"for {needed} of {needed} contributions")
        if len(pending) >= needed:
            return pending
        until = min(p.arrived for p in pending) + self.deadline if self.deadline else None
        if until is not None and roster.now >= until:
            return pending
        return Wait(f"for {needed - len(pending)} of {needed} contributions", until)


class Arrival:
    """Each contribution is merged on its own, in the order of their arrival."""

    def ready(self, pending: Sequence[Pending], roster: Roster) -> Sequence[Pending] | Wait:
        if not pending:
            return Wait("for a contribution")
        return [min(pending, key=lambda p: (p.arrived, p.head))]


def make_when(merge: MergeConfig) -> When:
    """What `--when`, `--quorum` and `--deadline` say."""
    if merge.when == "quorum":
        return Quorum(merge.quorum, merge.deadline)
    return Arrival() if merge.when == "arrival" else Barrier()

"""When to merge: what of the pending contributions is merged now, or what to wait for.

How they are merged is the policy's part (`lte_ray.merging.policies.trigger` puts the two together).

A whole policy, made of *when* to merge and *how* to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from lte_ray.config import MergeConfig
from lte_ray.merging.policy import Decision, Discard, Merge, MergeChange, Pending, Roster, Try, Wait

NAMED = 8
"""Heads that a reason lists by number; of more it gives the count."""


class MergeTrigger(Protocol):
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


def make_when(merge: MergeConfig) -> MergeTrigger:
    """What `--when`, `--quorum` and `--deadline` say."""
    if merge.when == "quorum":
        return Quorum(merge.quorum, merge.deadline)
    return Arrival() if merge.when == "arrival" else Barrier()


@runtime_checkable
class MergeRule(Protocol):
    """How to merge, for an object that leaves *when* to the run's ``--when``."""

    def merge(self, pending: Sequence[Pending], roster: Roster) -> Merge | MergeChange | Discard | Try:
        """What becomes of these contributions: at least one, sorted by head.

        Weights (a dict of head -> weight) or a change (a flat tensor in `roster.layout`) may be returned as they are.
        """
        ...


class ComposedPolicy:
    """Asks `how` once `when` says which contributions are due.

    Args:
        how: an object with a `merge` method, or a function of the same two arguments.
        when: by default when all live heads have contributed.
        name: what errors call it.
    """

    def __init__(
        self, how: MergeRule | Callable[[Sequence[Pending], Roster], Any], when: MergeTrigger | None = None, name: str = ""
    ) -> None:
        self.how, self.when = how, when or Barrier()
        self.name = name or getattr(how, "__name__", type(how).__name__)

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        due = self.when.ready(pending, roster)
        if isinstance(due, Wait):
            return due
        merge: Any = getattr(self.how, "merge", self.how)
        decision: Decision = as_decision(merge(due, roster), due)
        return decision

    def state(self) -> dict[str, Tensor]:
        """What `how` keeps from one merge to the next; empty if it keeps nothing."""
        return state_of(self.how)

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Takes over what `state` gave."""
        load_state_of(self.how, tensors)


def as_decision(given: Any, due: Sequence[Pending]) -> Any:
    """Weights as `Merge`, a tensor as `MergeChange` of all that were due; the rest as it is, for the coordinator to judge."""
    if isinstance(given, Mapping):
        return Merge(given)
    if isinstance(given, Tensor):
        return MergeChange(given, [p.head for p in due])
    return given


def state_of(policy: Any) -> dict[str, Tensor]:
    """A policy's `state()`, or nothing if it has none. The tensors may be the policy's own: copy what is kept."""
    return policy.state() if callable(getattr(policy, "state", None)) else {}


def load_state_of(policy: Any, tensors: dict[str, Tensor]) -> None:
    """Gives a policy what `state_of` gave."""
    if callable(getattr(policy, "load_state", None)):
        policy.load_state(tensors)

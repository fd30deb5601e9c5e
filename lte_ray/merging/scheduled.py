"""A whole policy, made of *when* to merge and *how* to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from lte_ray.merging.policy import Decision, Discard, Merge, MergeChange, Pending, Roster, Try, Wait
from lte_ray.merging.when import Barrier, When


@runtime_checkable
class MergeRule(Protocol):
    """How to merge, for an object that leaves *when* to the run's ``--when``."""

    def merge(self, pending: Sequence[Pending], roster: Roster) -> Merge | MergeChange | Discard | Try:
        """What becomes of these contributions: at least one, sorted by head.

        Weights (a dict of head -> weight) or a change (a flat tensor in `roster.layout`) may be returned as they are.
        """
        ...


class Scheduled:
    """Asks `how` once `when` says which contributions are due.

    Args:
        how: an object with a `merge` method, or a function of the same two arguments.
        when: by default when all live heads have contributed.
        name: what errors call it.
    """

    def __init__(
        self, how: MergeRule | Callable[[Sequence[Pending], Roster], Any], when: When | None = None, name: str = ""
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

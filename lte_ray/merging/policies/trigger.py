"""When to merge (`MergeTrigger`), and complete policies that combine a trigger with a rule: how to merge (`MergeRule`).

A trigger selects the pending contributions to merge now, or says what to wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from lte_ray.config import MergeConfig
from lte_ray.merging.policy import Decision, Discard, Merge, MergeChange, Pending, Roster, Try, Wait

MAX_LISTED_HEADS = 8
"""Most heads that a reason lists by number; if there are more, it gives their count."""


class MergeTrigger(Protocol):
    """Selects the contributions for one merge."""

    def ready(self, pending: Sequence[Pending], roster: Roster) -> Sequence[Pending] | Wait:
        """Returns the contributions to merge now, at least one, in the order of their heads; or what to wait for."""
        ...


class Barrier:
    """Merges when all live heads have contributed, as in the paper."""

    def ready(self, pending: Sequence[Pending], roster: Roster) -> Sequence[Pending] | Wait:
        lacking = len(roster.live) - len(pending)
        if lacking > MAX_LISTED_HEADS:  # at least; naming them would take a pass over all heads at every arrival
            return Wait(f"for {lacking} of {len(roster.live)} heads")
        missing = roster.live - {p.head for p in pending}
        if missing or not pending:
            return Wait(f"for heads {sorted(missing)}" if missing else "for a head to join")
        return pending


class Quorum:
    """Merges when `size` contributions are pending, or `deadline` seconds after the first of them arrived.

    Args:
        size: contributions to wait for, at most the number of live heads; 0: half of the live heads, rounded up.
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
    """Merges each contribution by itself, in the order of arrival."""

    def ready(self, pending: Sequence[Pending], roster: Roster) -> Sequence[Pending] | Wait:
        if not pending:
            return Wait("for a contribution")
        return [min(pending, key=lambda p: (p.arrived, p.head))]


def make_trigger(merge: MergeConfig) -> MergeTrigger:
    """Returns the trigger that `--when`, `--quorum` and `--deadline` specify."""
    if merge.when == "quorum":
        return Quorum(merge.quorum, merge.deadline)
    return Arrival() if merge.when == "arrival" else Barrier()


@runtime_checkable
class MergeRule(Protocol):
    """How to merge; *when* is decided by the run's ``--when``."""

    def merge(self, pending: Sequence[Pending], roster: Roster) -> Merge | MergeChange | Discard | Try:
        """Decides about these contributions: at least one, sorted by head.

        May return weights (a dict of head -> weight) or a change (a flat tensor in `roster.layout`) as they are.
        """
        ...


class ComposedPolicy:
    """Applies a rule to the contributions that a trigger selects.

    Args:
        rule: an object with a `merge` method, or a function of the same two arguments.
        trigger: by default `Barrier`.
        name: the policy's name in errors.
    """

    def __init__(
        self, rule: MergeRule | Callable[[Sequence[Pending], Roster], Any], trigger: MergeTrigger | None = None, name: str = ""
    ) -> None:
        self.rule, self.trigger = rule, trigger or Barrier()
        self.name = name or getattr(rule, "__name__", type(rule).__name__)

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        due = self.trigger.ready(pending, roster)
        if isinstance(due, Wait):
            return due
        merge: Any = getattr(self.rule, "merge", self.rule)
        decision: Decision = to_decision(merge(due, roster), due)
        return decision

    def state(self) -> dict[str, Tensor]:
        """Returns the rule's state between merges; empty if it has none."""
        return get_policy_state(self.rule)

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restores what `state` returned."""
        load_policy_state(self.rule, tensors)


def to_decision(result: Any, due: Sequence[Pending]) -> Any:
    """Converts weights to a `Merge` and a tensor to a `MergeChange` of all due contributions; keeps other results."""
    if isinstance(result, Mapping):
        return Merge(result)
    if isinstance(result, Tensor):
        return MergeChange(result, [p.head for p in due])
    return result


def get_policy_state(policy: Any) -> dict[str, Tensor]:
    """Returns a policy's `state()`, empty if it has none. The tensors may be the policy's own: copy them to keep them."""
    return policy.state() if callable(getattr(policy, "state", None)) else {}


def load_policy_state(policy: Any, tensors: dict[str, Tensor]) -> None:
    """Restores what `get_policy_state` returned; does nothing for a policy without state."""
    if callable(getattr(policy, "load_state", None)):
        policy.load_state(tensors)

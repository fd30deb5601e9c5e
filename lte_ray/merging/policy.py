"""The plug-in point: a merge policy looks at what is pending and decides; the coordinator executes.

A policy is any object with a `decide` method. The shortest useful one::

    class FirstTwo:
        def decide(self, pending, roster):
            if not pending or len(pending) < min(2, len(roster.live)):
                return Wait("for a second head")
            return Merge({p.head: 1 / roster.num_heads for p in pending})
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class Pending:
    """A contribution that waits for a decision, as a policy sees it. A head has at most one.

    Attributes:
        head: its number, from 0.
        version: the base version that it trained on.
        lag: how many versions the base has moved on since.
        steps, samples: what the head trained since its last accepted contribution.
        loss: mean training loss over those steps.
        change: computes its whole change, dense and flat in the base layout (a new tensor as large as the base; the
            weight is not applied). Costs one matrix product a layer, so call it only where weights can't say it.
    """

    head: int
    version: int
    lag: int
    steps: int
    samples: int
    loss: float
    change: Callable[[], Tensor] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Roster:
    """Who takes part: `num_heads` as configured, the `live` heads that may still contribute, and the base `version`."""

    num_heads: int
    live: frozenset[int]
    version: int


@dataclass(frozen=True)
class Wait:
    """Merge nothing yet; `reason` says what for."""

    reason: str = ""


@dataclass(frozen=True)
class Merge:
    """Merge these heads' contributions: base += sum of weight x change. Heads that aren't named stay pending."""

    weights: Mapping[int, float]


@dataclass(frozen=True)
class MergeChange:
    """Merge `change` (flat, in the base layout), which stands for the contributions of `heads`."""

    change: Tensor = field(repr=False)
    heads: Collection[int]


@dataclass(frozen=True)
class Discard:
    """Refuse these heads' contributions because of `reason`. Nothing is lost: what they hold rides in their next one."""

    heads: Collection[int]
    reason: str


Decision = Wait | Merge | MergeChange | Discard


@runtime_checkable
class MergePolicy(Protocol):
    """Decides what becomes of the pending contributions."""

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        """Called whenever a contribution arrives, a head leaves, and after each merge or discard that it decided.

        `pending` is sorted by head, so a decision that depends on nothing else is the same in every run.
        """
        ...

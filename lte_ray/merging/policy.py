"""The plug-in point: a merge policy looks at what is pending and decides; the coordinator executes.

A policy is any object with a `decide` method. The shortest useful one::

    class FirstTwo:
        def decide(self, pending, roster):
            if not pending or len(pending) < min(2, len(roster.live)):
                return Wait("for a second head")
            return Merge({p.head: 1 / roster.num_heads for p in pending})

Most policies only say *how* to merge: an object with a `merge` method, or a plain function, of the same two arguments. When
to merge is then the run's `--merge-when` (see `lte_ray.merging.policies.trigger`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

from torch import Tensor

from lte_ray.layout import Layout
from lte_ray.merging.low_rank import Share, add_contributions, dense_change, dense_part, squared_norm


@dataclass(frozen=True)
class Pending:
    """A contribution that waits for a decision, as a policy sees it. A head has at most one.

    Attributes:
        head: its number, from 0.
        version: the base version that it trained on.
        lag: how many versions the base has moved on since.
        steps: local steps that the head trained since its last accepted contribution.
        samples: samples of those steps.
        loss: mean training loss over those steps.
        arrived: when it arrived, on the clock of `Roster.now`.
        share: its factors and its reference, for `combine`.
    """

    head: int
    version: int
    lag: int
    steps: int
    samples: int
    loss: float
    arrived: float = field(compare=False)
    share: Share = field(repr=False, compare=False)

    def change(self) -> Tensor:
        """Its whole change, dense and flat in the base layout: a new tensor as large as the base.

        Costs one matrix product a layer, so call it only where weights can't say it.
        """
        return dense_change(self.share)

    def part(self, name: str) -> Tensor:
        """Its change of one entry of the base layout, dense, in the shape in which the entry is stored."""
        return dense_part(self.share, name)

    def norm(self) -> float:
        """The Euclidean norm of its whole change, computed from the factors."""
        return math.sqrt(squared_norm(self.share))


@dataclass(frozen=True)
class Roster:
    """Who takes part, and where the run stands.

    Attributes:
        num_heads: as configured.
        live: the heads that may still contribute.
        version: of the base.
        now: seconds on the coordinator's clock.
        layout: of the base, which a `MergeChange` is laid out in.
    """

    num_heads: int
    live: frozenset[int]
    version: int
    now: float
    layout: Layout = field(repr=False)


@dataclass(frozen=True)
class Wait:
    """Merge nothing yet; `reason` says what for.

    `until` is when the policy wants to be asked again if nothing happens before (on the clock of `Roster.now`).
    """

    reason: str = ""
    until: float | None = None


@dataclass(frozen=True)
class Merge:
    """Merge these heads' contributions: base += sum of weight x change. Heads that aren't named stay pending."""

    weights: Mapping[int, float]


@dataclass(frozen=True)
class MergeChange:
    """Merge `change` (flat, in the base layout), which stands for the contributions of `heads`.

    Running statistics (BatchNorm's) are averaged whatever it says of them.
    """

    change: Tensor = field(repr=False)
    heads: Collection[int]


@dataclass(frozen=True)
class Discard:
    """Refuse these heads' contributions because of `reason`. Nothing is lost: what they hold rides in their next one."""

    heads: Collection[int]
    reason: str


@dataclass(frozen=True)
class Try:
    """Evaluate the base that `merge` would give, then do what `judge` says of the values (by the worker's own names).

    Nothing else is decided meanwhile, and no head sees that base before. `judge` gives `merge` itself to keep it, or a
    `Discard` of its heads.
    """

    merge: Merge | MergeChange
    judge: Callable[[Mapping[str, float]], Merge | MergeChange | Discard] = field(compare=False)


Decision = Wait | Merge | MergeChange | Discard | Try


@runtime_checkable
class MergePolicy(Protocol):
    """Decides what becomes of the pending contributions.

    A policy that keeps something from one merge to the next (momentum) may also have `state() -> dict[str, Tensor]` and
    `load_state(tensors)`, so that checkpoints hold it.
    """

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        """Called whenever a contribution arrives, a head leaves or a `Wait.until` has come, and after each merge or discard.

        `pending` is sorted by head, so a decision that depends on nothing else is the same in every run.
        """
        ...


def combine(pending: Sequence[Pending], weights: Mapping[int, float], out: Tensor | None = None) -> Tensor:
    """The sum of weight x change over the heads of `weights`, dense and flat in the base layout.

    One product a layer for all heads together. Added to `out` in place, if given.
    """
    chosen = [replace(p.share, weight=weights[p.head]) for p in pending if p.head in weights]
    if out is None:
        first = pending[0].share
        out = first.contribution.new_zeros(first.plan.base.size)
    add_contributions(out, chosen)
    return out

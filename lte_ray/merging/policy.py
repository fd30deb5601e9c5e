"""The plug-in point: a merge policy looks at the pending contributions and decides; the coordinator executes.

A policy is any object with a `decide` method. The shortest useful one::

    class FirstTwo:
        def decide(self, pending, roster):
            if not pending or len(pending) < min(2, len(roster.live)):
                return Wait("for a second head")
            return Merge({p.head: 1 / roster.num_heads for p in pending})

Most policies decide only *how* to merge: they are an object with a `merge` method, or a plain function, of the same two
arguments. *When* to merge is then the run's `--when` (see `lte_ray.merging.policies.trigger`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

from torch import Tensor

from lte_ray.layout import Layout
from lte_ray.merging.low_rank import Share, add_contributions, dense_change, dense_part, squared_norm
from lte_ray.messages import OuterStep


@dataclass(frozen=True)
class Pending:
    """A contribution that waits for a decision, as a policy sees it. A head has at most one.

    Attributes:
        head: the head's number, from 0.
        version: the base version on which the head trained.
        lag: by how many versions that is behind the current base.
        steps: local steps that the head trained since its last accepted contribution.
        samples: samples of those steps.
        loss: mean training loss over those steps.
        arrived: time of arrival, on the clock of `Roster.now`.
        share: the contribution's factors and reference, for `combine`.
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
        """Returns the entire change as a new dense tensor, flat in the base layout.

        Costs one matrix product per layer and as much memory as the base: use it only if weights can't express the merge.
        """
        return dense_change(self.share)

    def part(self, name: str) -> Tensor:
        """Returns the change of one entry of the base layout, dense, in the shape in which the entry is stored."""
        return dense_part(self.share, name)

    def norm(self) -> float:
        """Returns the Euclidean norm of the entire change, computed from the factors."""
        return math.sqrt(squared_norm(self.share))


@dataclass(frozen=True)
class Roster:
    """The run's heads and progress.

    Attributes:
        num_heads: the configured number of heads.
        live: the heads that may still contribute.
        version: the version of the base.
        now: seconds on the coordinator's clock.
        layout: the layout of the base, and so of a `MergeChange`.
        progress: the share of the run's local steps that contributions have brought, pending ones included: 0 to 1.
    """

    num_heads: int
    live: frozenset[int]
    version: int
    now: float
    layout: Layout = field(repr=False)
    progress: float = 0.0


@dataclass(frozen=True)
class Wait:
    """Merge nothing yet. `reason` says what the policy waits for, as in "for 2 of 4 contributions".

    `until` is when to ask the policy again if nothing happens before, on the clock of `Roster.now`.
    """

    reason: str = ""
    until: float | None = None


@dataclass(frozen=True)
class Merge:
    """Merge these heads' contributions: base += sum of weight x change. Other heads' contributions stay pending.

    With a `step`, the sum D isn't added to the base as it is: the base takes that step, in which the momentum of earlier
    merges may have a part. See `OuterStep`.
    """

    weights: Mapping[int, float]
    step: OuterStep | None = None


@dataclass(frozen=True)
class MergeChange:
    """Merge `change` (flat, in the base layout) instead of the contributions of `heads`.

    Running statistics of BatchNorm layers are averaged instead, whatever `change` contains for them.
    """

    change: Tensor = field(repr=False)
    heads: Collection[int]


@dataclass(frozen=True)
class Discard:
    """Refuse these heads' contributions because of `reason`. Nothing is lost: their next ones include the same progress."""

    heads: Collection[int]
    reason: str


@dataclass(frozen=True)
class Try:
    """Evaluate the base that `merge` would result in, then call `judge` with the values, by the worker's own names, to decide.

    Until then no other decision is made, and no head sees that base. `judge` returns `merge` itself to keep it, or a `Discard`
    of its heads.
    """

    merge: Merge | MergeChange
    judge: Callable[[Mapping[str, float]], Merge | MergeChange | Discard] = field(compare=False)


Decision = Wait | Merge | MergeChange | Discard | Try


@runtime_checkable
class MergePolicy(Protocol):
    """Decides what to do with the pending contributions.

    A policy with state between merges, such as momentum, may also define `state() -> dict[str, Tensor]` and
    `load_state(tensors)`, so that checkpoints include it.
    """

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        """Called when a contribution arrives, a head leaves or a `Wait.until` has passed, and after each merge or discard.

        `pending` is sorted by head, so a decision that depends on nothing else is the same in every run.
        """
        ...


def combine(pending: Sequence[Pending], weights: Mapping[int, float], out: Tensor | None = None) -> Tensor:
    """Returns the sum of weight x change over the heads of `weights`, dense and flat in the base layout.

    Costs one matrix product per layer for all heads together. Adds to `out`, in place, if given.
    """
    shares = [replace(p.share, weight=weights[p.head]) for p in pending if p.head in weights]
    if out is None:
        first = pending[0].share
        out = first.contribution.new_zeros(first.plan.base.size)
    add_contributions(out, shares)
    return out

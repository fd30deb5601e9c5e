"""The coordinator: owns the main weights, the heads' references and the version; asks the policy and carries it out.

It is driven by events and never waits: `receive` and `leave` return what was decided by them. It knows neither Ray nor
how tensors travel.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lte_ray.engine.settings import Settings
from lte_ray.errors import PolicyError
from lte_ray.layout import Plan
from lte_ray.merging.policy import Decision, Discard, Merge, MergeChange, MergePolicy, Pending, Roster, Wait
from lte_ray.merging.products import Share, add_contributions, dense_change, new_reference
from lte_ray.messages import Contribution, MergeRecord, Verdict

ABSURD = 1e30
"""Bound on s times a contribution's sum of squares, and so on every element of s B A: far beyond any weight that trains,
and far below what overflows float32, so that a merge that has begun can't make the base infinite."""

MOST_WEIGHT = 1e6
"""Bound on the weight that a policy may give a contribution."""


@dataclass(frozen=True)
class Outcome:
    """What an event led to: verdicts on contributions, and the merges that were made, in order."""

    verdicts: tuple[Verdict, ...]
    merges: tuple[MergeRecord, ...]


class Coordinator:
    """The merging side of one run.

    Args:
        settings: the run's settings.
        plan: what is trained.
        base: the main weights and replicas, flat in the base layout. Taken over and changed in place; its type is the
            type of all merging.
        policy: decides what is merged.
        plans: each head's, where they differ from `plan` in their ranks.
        version: of `base`.
        references: the factors that `base` holds of each head, flat.
    """

    def __init__(
        self,
        settings: Settings,
        plan: Plan,
        base: Tensor,
        policy: MergePolicy,
        *,
        plans: Sequence[Plan] | None = None,
        version: int = 0,
        references: dict[int, Tensor] | None = None,
    ) -> None:
        self.settings, self.plan, self.base, self.policy = settings, plan, base, policy
        self.version = version
        self.live = set(range(settings.lte.num_heads))
        self.waiting_for = ""
        self.plans = tuple(plans or [plan] * settings.lte.num_heads)
        self._largest_scaling = max([1.0, *(abs(a.scaling) for each in set(self.plans) for a in each.adapted)])
        self._references: dict[int, Tensor | None] = dict(references or {})
        self._pending: dict[int, tuple[Contribution, Tensor]] = {}
        self._newest: dict[int, tuple[int, int]] = {}  # head -> incarnation and sequence last received

    @property
    def pending(self) -> list[int]:
        """The heads whose contribution waits for a decision."""
        return sorted(self._pending)

    def receive(self, contribution: Contribution, buffer: Tensor) -> Outcome:
        """A contribution arrived; `buffer` is flat, in the contribution layout; it is only read,
        and kept until the decision.

        A contribution that can't be merged is refused with a reason, and nothing else is touched.

        Raises:
            PolicyError: the policy raised or decided something impossible.
        """
        reason = self._refusal(contribution, buffer)
        if reason:
            return Outcome((Verdict(contribution.head, contribution.sequence, False, self.version, reason),), ())
        self._newest[contribution.head] = (contribution.incarnation, contribution.sequence)
        self._pending[contribution.head] = (contribution, buffer)
        return self._decide()

    def leave(self, head: int) -> Outcome:
        """A head has ended; nobody waits for it any longer.

        Raises:
            PolicyError: as `receive`.
        """
        self.live.discard(head)
        return self._decide()

    def _refusal(self, c: Contribution, buffer: Tensor) -> str:
        if c.run != self.settings.run:
            return f"it belongs to run {c.run!r}, not {self.settings.run!r}"
        if c.head not in self.live:
            return f"head {c.head} isn't one of the live heads {sorted(self.live)}"
        if (c.incarnation, c.sequence) <= self._newest.get(c.head, (-1, -1)):
            return f"incarnation {c.incarnation} sequence {c.sequence} of head {c.head} was received before, or is older"
        if c.head in self._pending:
            return f"head {c.head} has a contribution that isn't decided yet"
        if c.version > self.version:
            return f"it was trained on version {c.version}, but the newest is {self.version}"
        size = self.plans[c.head].contribution.size
        if buffer.shape != (size,) or buffer.dtype != self.base.dtype:
            expected = f"{size} of {self.base.dtype}"
            return f"it has {buffer.numel()} elements of {buffer.dtype}, expected {expected}"
        # One pass finds NaN and infinity, and bounds each element of s B A by s times the sum of squares.
        squares = self._largest_scaling * float(torch.dot(buffer, buffer))
        if not squares < ABSURD:
            return f"it holds values that are NaN, infinite or absurdly large (s times the sum of squares: {squares:g})"
        return ""

    def _decide(self) -> Outcome:
        verdicts: list[Verdict] = []
        merges: list[MergeRecord] = []
        while True:  # each turn but the last settles at least one contribution
            decision = self._ask()
            if isinstance(decision, Wait):
                self.waiting_for = decision.reason
                return Outcome(tuple(verdicts), tuple(merges))
            heads = self._settled(decision)
            if isinstance(decision, Discard):
                reason = f"the policy discarded it: {decision.reason}"
                verdicts += [self._verdict(h, False, reason) for h in heads]
            else:
                merges.append(self._merge(decision, heads))
                verdicts += [self._verdict(h, True, "") for h in heads]
            for head in heads:
                del self._pending[head]

    def _ask(self) -> Decision:
        pending = [
            Pending(
                head=head,
                version=c.version,
                lag=self.version - c.version,
                steps=c.steps,
                samples=c.samples,
                loss=c.loss,
                change=lambda head=head: dense_change(self._share(head, 1.0)),  # type: ignore[misc]
            )
            for head, (c, _) in sorted(self._pending.items())
        ]
        roster = Roster(self.settings.lte.num_heads, frozenset(self.live), self.version)
        try:
            decision = self.policy.decide(pending, roster)
        except Exception as error:
            raise PolicyError(f"{self._policy_name} raised {type(error).__name__}: {error}") from error
        if not isinstance(decision, Wait | Merge | MergeChange | Discard):
            raise PolicyError(
                f"{self._policy_name} decided {decision!r}; a decision is one of Wait, Merge, MergeChange and Discard."
            )
        if isinstance(decision, Wait) and pending and self.live <= {p.head for p in pending}:
            raise PolicyError(
                f"{self._policy_name} waits {decision.reason or 'for something'}, but every live head {sorted(self.live)} "
                "has contributed and waits for it: the run could never go on."
            )
        return decision

    def _settled(self, decision: Merge | MergeChange | Discard) -> list[int]:
        heads: Any = decision.weights if isinstance(decision, Merge) else decision.heads
        try:
            named = list(heads)
            known = set(named) <= set(self._pending)
        except TypeError:
            named, known = [heads], False
        if not named or not known or len(set(named)) != len(named):
            raise PolicyError(
                f"{self._policy_name} decided about heads {named}, but those with a contribution are {self.pending}."
            )
        return sorted(named)

    def _merge(self, decision: Merge | MergeChange, heads: list[int]) -> MergeRecord:
        begun = time.perf_counter()
        if isinstance(decision, Merge):
            add_contributions(self.base, [self._share(h, self._weight(decision, h)) for h in heads])
        else:
            self.base += self._change(decision)
        for head in heads:
            old, buffer = self._references.get(head), self._pending[head][1]
            self._references[head] = new_reference(self.plans[head], buffer, self.settings.lte.reset, old)
        self.version += 1
        merged = [self._pending[h][0] for h in heads]
        return MergeRecord(
            version=self.version,
            at=time.time(),
            heads=tuple(heads),
            step=max(c.step for c in merged),
            steps=sum(c.steps for c in merged),
            samples=sum(c.samples for c in merged),
            losses={c.head: c.loss for c in merged},
            base_error=max(c.base_error for c in merged),
            merge_seconds=time.perf_counter() - begun,
            bytes_up=sum(self._pending[h][1].nbytes for h in heads),
            bytes_down=self.base.nbytes * len(heads),
        )

    def _weight(self, decision: Merge, head: int) -> float:
        weight: Any = decision.weights[head]
        if not isinstance(weight, Real) or not abs(float(weight)) < MOST_WEIGHT:
            raise PolicyError(
                f"{self._policy_name} gave head {head} the weight {weight!r}; it must be a finite number below {MOST_WEIGHT:g}."
            )
        return float(weight)

    def _change(self, decision: MergeChange) -> Tensor:
        given: Any = decision.change
        if not isinstance(given, Tensor) or given.shape != self.base.shape:
            shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise PolicyError(
                f"{self._policy_name} gave a change of shape {shape}; it must be finite and flat, {tuple(self.base.shape)}, "
                "in the base layout."
            )
        change: Tensor = given.to(self.base.dtype)
        if not bool(torch.isfinite(change).all()):
            raise PolicyError(f"{self._policy_name} gave a change that holds NaN or infinity; it must be finite.")
        return change

    def _share(self, head: int, weight: float) -> Share:
        return Share(weight, self.plans[head], self._pending[head][1], self._references.get(head))

    def _verdict(self, head: int, accepted: bool, reason: str) -> Verdict:
        return Verdict(head, self._pending[head][0].sequence, accepted, self.version, reason)

    @property
    def _policy_name(self) -> str:
        return f"The merge policy {type(self.policy).__name__}"

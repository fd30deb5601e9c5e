"""The coordinator: owns the main weights, the heads' references and the version; asks the policy and carries it out.

It is driven by events and never waits: `receive` and `leave` return what was decided by them. It knows neither Ray nor
how tensors travel.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lte_ray.engine.settings import Settings
from lte_ray.errors import PolicyError
from lte_ray.layout import Plan
from lte_ray.merging.policy import Decision, Discard, Merge, MergeChange, MergePolicy, Pending, Roster, Wait
from lte_ray.merging.products import Share, add_contributions, dense_change, new_reference
from lte_ray.messages import Contribution, MergeRecord, Verdict


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
        version: int = 0,
        references: dict[int, Tensor] | None = None,
    ) -> None:
        self.settings, self.plan, self.base, self.policy = settings, plan, base, policy
        self.version = version
        self.live = set(range(settings.lte.num_heads))
        self.waiting_for = ""
        self._references: dict[int, Tensor | None] = dict(references or {})
        self._pending: dict[int, tuple[Contribution, Tensor]] = {}
        self._newest: dict[int, tuple[int, int]] = {}  # head -> incarnation and sequence last received

    @property
    def pending(self) -> list[int]:
        """The heads whose contribution waits for a decision."""
        return sorted(self._pending)

    def receive(self, contribution: Contribution, buffer: Tensor) -> Outcome:
        """A contribution arrived; `buffer` is flat, in the contribution layout, and may be read-only and short-lived.

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
        if buffer.shape != (self.plan.contribution.size,) or buffer.dtype != self.base.dtype:
            expected = f"{self.plan.contribution.size} of {self.base.dtype}"
            return f"it has {buffer.numel()} elements of {buffer.dtype}, expected {expected}"
        # One pass: the sum of squares is finite only if every element is (and none is beyond 1e19, which is no weight).
        if not math.isfinite(float(torch.dot(buffer, buffer))):
            return "it holds values that are NaN, infinite or absurdly large"
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
                change=lambda head=head: dense_change(self.plan, self._share(head, 1.0)),  # type: ignore[misc]
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
        heads: Iterable[int] = decision.weights if isinstance(decision, Merge) else decision.heads
        settled = sorted(heads)
        if not settled or not set(settled) <= set(self._pending) or len(set(settled)) != len(settled):
            raise PolicyError(
                f"{self._policy_name} decided about heads {settled}, but those with a contribution are {self.pending}."
            )
        return settled

    def _merge(self, decision: Merge | MergeChange, heads: list[int]) -> MergeRecord:
        begun = time.perf_counter()
        if isinstance(decision, Merge):
            weights = [float(decision.weights[h]) for h in heads]
            if not all(math.isfinite(w) for w in weights):
                raise PolicyError(
                    f"{self._policy_name} gave weights {dict(zip(heads, weights, strict=True))}; they must be finite."
                )
            add_contributions(self.plan, self.base, [self._share(h, w) for h, w in zip(heads, weights, strict=True)])
        else:
            change = decision.change
            if change.shape != self.base.shape or not bool(torch.isfinite(change).all()):
                raise PolicyError(
                    f"{self._policy_name} gave a change of shape {tuple(change.shape)}; it must be finite and flat, "
                    f"{tuple(self.base.shape)}, in the base layout."
                )
            self.base += change.to(self.base.dtype)
        for head in heads:
            self._references[head] = new_reference(self.plan, self._pending[head][1], self.settings.lte.reset)
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
            merge_seconds=time.perf_counter() - begun,
            bytes_up=sum(self._pending[h][1].nbytes for h in heads),
            bytes_down=self.base.nbytes * len(heads),
        )

    def _share(self, head: int, weight: float) -> Share:
        return Share(weight, self._pending[head][1], self._references.get(head))

    def _verdict(self, head: int, accepted: bool, reason: str) -> Verdict:
        return Verdict(head, self._pending[head][0].sequence, accepted, self.version, reason)

    @property
    def _policy_name(self) -> str:
        return f"The merge policy {type(self.policy).__name__}"

"""Decides what to do about a process that died: start it again, continue without it, or end the run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lte_ray.config import FailureConfig

MAX_DELAY = 60.0
"""Seconds between two restarts of a head at most."""


@dataclass(frozen=True)
class FailureDecision:
    """What to do, after how many seconds, and why, in words (empty if there is nothing to say)."""

    action: Literal["restart", "drop", "stop"]
    delay: float = 0.0
    why: str = ""

    def explain(self, event: str) -> str:
        """What happened, with the reason for the decision if there is one."""
        return f"{event} ({self.why})" if self.why else event


@dataclass
class _History:
    """Of one process: its deaths in a row, the contributions merged at the last one, and what its code raised at which step."""

    in_a_row: int = 0
    merged: int = -1
    raised: tuple[int, str] | None = None


@dataclass
class FailurePolicy:
    """Counts deaths and decides as `FailureConfig` says.

    Args:
        config: the limits.

    Attributes:
        total: deaths so far that count against `max_failures`.
    """

    config: FailureConfig
    total: int = 0
    _histories: dict[tuple[int, ...], _History] = field(default_factory=dict)

    def decide_head(
        self,
        numbers: tuple[int, ...],
        merged: int,
        step: int,
        others: int,
        raised: str = "",
        preempted: bool = False,
        ever_trained: bool = True,
    ) -> FailureDecision:
        """Decides about a process of heads that died.

        Args:
            numbers: of its heads.
            merged: how many of their contributions were merged so far.
            step: that it was in, counted from the start.
            others: heads that the run has besides these.
            raised: what the worker's own code raised; empty if the process just ended.
            preempted: whether the cluster ended it, which doesn't count as a failure.
            ever_trained: whether any head of the run ever took a step.
        """
        history = self._histories.setdefault(numbers, _History())
        history.in_a_row = history.in_a_row + 1 if merged == history.merged else 1
        again = bool(raised) and history.raised == (step, raised)
        history.merged, history.raised = merged, (step, raised) if raised else None
        if not preempted:
            self.total += 1
        if raised and not ever_trained:
            return FailureDecision("stop", why="it failed before any head took a step")
        if again:
            return self._decide_exhausted(others, "it failed twice in the same way at the same step")
        if 0 <= self.config.max_failures < self.total:
            return self._stop()
        if 0 <= self.config.head_failures < history.in_a_row:
            why = f"it died {history.in_a_row} times without a merged contribution in between"
            return self._decide_exhausted(others, why)
        return FailureDecision("restart", self.delay(history.in_a_row))

    def decide_no_place(self, others: int, seconds: float) -> FailureDecision:
        """Decides about a process of heads that the cluster has had no place for, for `seconds`. "restart": it keeps waiting.

        Args:
            others: heads that have a place.
        """
        decision = self._decide_exhausted(others, f"the cluster has had no place for it for {seconds:.0f} s")
        return decision if decision.action == "drop" else FailureDecision("restart", why=decision.why)

    def decide_other(self) -> FailureDecision:
        """Decides about the coordinator or the evaluator, which died."""
        self.total += 1
        return self._stop() if 0 <= self.config.max_failures < self.total else FailureDecision("restart")

    def delay(self, in_a_row: int) -> float:
        """Returns the seconds before a restart after this many deaths in a row: none after the first."""
        return 0.0 if in_a_row <= 1 else min(MAX_DELAY, self.config.backoff * 2.0 ** (in_a_row - 2))

    def _stop(self) -> FailureDecision:
        return FailureDecision("stop", why=f"--max-failures is {self.config.max_failures}" if self.config.max_failures else "")

    def _decide_exhausted(self, others: int, why: str) -> FailureDecision:
        enough = others >= max(1, self.config.min_heads)
        if self.config.exhausted == "drop" and enough:
            return FailureDecision("drop", why=why)
        return FailureDecision("stop", why=why)

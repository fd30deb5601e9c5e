"""What to do about a process that died: start it again, do without it, or end the run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lte_ray.config import FailureConfig

LONGEST = 60.0
"""Seconds between two restarts of a head at most."""


@dataclass(frozen=True)
class FailureDecision:
    """What to do, in how many seconds, and why, in words."""

    action: Literal["restart", "drop", "stop"]
    delay: float = 0.0
    why: str = ""

    def said(self, what: str) -> str:
        """What has happened, with the reason for the remedy if there is one."""
        return f"{what} ({self.why})" if self.why else what


@dataclass
class _History:
    """Of one process: its deaths in a row, where it was merged up to at the last one, and what its own code raised there."""

    in_a_row: int = 0
    merged: int = -1
    raised: tuple[int, str] | None = None


@dataclass
class FailurePolicy:
    """Counts deaths and decides, as `FailureConfig` says.

    Args:
        config: the limits.
    """

    config: FailureConfig
    total: int = 0
    _of: dict[tuple[int, ...], _History] = field(default_factory=dict)

    def head(
        self,
        numbers: tuple[int, ...],
        merged: int,
        step: int,
        others: int,
        raised: str = "",
        preempted: bool = False,
        ever_trained: bool = True,
    ) -> FailureDecision:
        """A process of heads has died.

        Args:
            numbers: of its heads.
            merged: how many of their contributions were merged so far.
            step: that it was in, counted from the start.
            others: heads that the run has beside these.
            raised: what the worker's own code raised; empty if the process just ended.
            preempted: by the cluster, which is nobody's failure.
            ever_trained: whether any head of the run ever took a step.
        """
        history = self._of.setdefault(numbers, _History())
        history.in_a_row = history.in_a_row + 1 if merged == history.merged else 1
        again = bool(raised) and history.raised == (step, raised)
        history.merged, history.raised = merged, (step, raised) if raised else None
        if not preempted:
            self.total += 1
        if raised and not ever_trained:
            return FailureDecision("stop", why="it failed before any head took a step")
        if again:
            return self._exhausted(others, "it failed twice in the same way at the same step")
        if 0 <= self.config.max_failures < self.total:
            return self._too_many()
        if 0 <= self.config.head_failures < history.in_a_row:
            return self._exhausted(others, f"it died {history.in_a_row} times without a merged contribution in between")
        return FailureDecision("restart", self.delay(history.in_a_row))

    def no_place(self, others: int, seconds: float) -> FailureDecision:
        """The cluster has had no place for a process of heads for so long: whether those that have one go on alone."""
        remedy = self._exhausted(others, f"the cluster has had no place for it for {seconds:.0f} s")
        return remedy if remedy.action == "drop" else FailureDecision("restart", why=remedy.why)  # it waits on

    def delay(self, in_a_row: int) -> float:
        """Seconds before a restart, where it is the last of so many in a row: none before the first."""
        return 0.0 if in_a_row <= 1 else min(LONGEST, self.config.backoff * 2.0 ** (in_a_row - 2))

    def other(self) -> FailureDecision:
        """The coordinator or the evaluator has died."""
        self.total += 1
        return self._too_many() if 0 <= self.config.max_failures < self.total else FailureDecision("restart")

    def _too_many(self) -> FailureDecision:
        return FailureDecision("stop", why=f"--max-failures is {self.config.max_failures}" if self.config.max_failures else "")

    def _exhausted(self, others: int, why: str) -> FailureDecision:
        enough = others >= max(1, self.config.min_heads)
        if self.config.exhausted == "drop" and enough:
            return FailureDecision("drop", why=why)
        return FailureDecision("stop", why=why)

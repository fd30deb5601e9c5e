"""Decides when a process counts as hung: by how long processes took before, not by settings that a user must guess."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

MIN_SILENCE = 10.0
"""Seconds without an answer that never count as a hang: a busy machine may take as long to schedule a thread."""

MIN_STANDSTILL = 30.0
"""Seconds without a step that never count as a hang."""

STARTING = 900.0
"""Seconds for a first step: building the model, reading the data, compiling. Also for the first answer of the run."""

MIN_START = 90.0
"""Seconds until a process's first answer that never count as a hang, although others have answered: importing torch takes some.
On several nodes it is `STARTING`, since a node that is new to the cluster may have to be set up."""

FACTOR = 20.0
"""A process hangs if it takes this many times as long, to answer or for a step, as any process took before."""

START_FACTOR = 5.0
"""The same for a first answer: it takes seconds, which vary less than fractions of one."""


@dataclass
class ProcessHealth:
    """One process's signs of life. Times in seconds, on any clock.

    Attributes:
        answered: when it answered last; None before it did.
        begun: since when it could have answered for the first time; None while that isn't known (it may wait for a place).
        moved: when `position` changed last.
        position: what it had done by its last answer.
        stepped: whether it has taken a step.
    """

    answered: float | None = None
    begun: float | None = None
    moved: float = 0.0
    position: Hashable = None
    stepped: bool = False


class HangDetector:
    """Knows what is normal in this run.

    Attributes:
        longest_start, longest_answer, longest_step: the longest that any process took to start, to answer, and from one step to
            the next; 0 before any did.
        several_nodes: whether processes are on several nodes.
    """

    def __init__(self) -> None:
        self.longest_start = self.longest_answer = self.longest_step = 0.0
        self.several_nodes = False

    @property
    def start_limit(self) -> float:
        """Seconds until its first answer after which a process that has begun counts as hung."""
        if not self.longest_start or self.several_nodes:
            return STARTING
        return max(MIN_START, START_FACTOR * self.longest_start)

    @property
    def silence(self) -> float:
        """Seconds without an answer after which a process counts as hung."""
        return max(MIN_SILENCE, FACTOR * self.longest_answer)

    @property
    def standstill(self) -> float:
        """Seconds without a step after which a head that trains counts as hung."""
        return max(MIN_STANDSTILL, FACTOR * self.longest_step)

    def record_answer(
        self,
        health: ProcessHealth,
        now: float,
        requested_at: float,
        position: Hashable,
        idle: bool,
        stepped: bool,
        head: bool = True,
    ) -> None:
        """Records that a process has answered. Its first answer says how long it took to start; the others, how long to answer.

        Args:
            health: of the process.
            requested_at: when the answer was requested.
            position: changes whenever the process does something.
            idle: whether it waits for others, so that it need not move.
            stepped: whether it has taken a step since it started.
            head: whether it hosts heads: others start in another way.
        """
        if health.answered is not None:
            self.longest_answer = max(self.longest_answer, now - requested_at)
        elif health.begun is not None and head:
            self.longest_start = max(self.longest_start, now - health.begun)
        health.answered = now
        if position != health.position or idle:
            if health.stepped and not idle:
                self.longest_step = max(self.longest_step, now - health.moved)
            health.moved, health.position = now, position
        health.stepped = health.stepped or stepped

    def hang_reason(self, health: ProcessHealth, now: float, requested_at: float | None) -> str:
        """Returns why a process counts as hung; empty if it doesn't.

        Args:
            requested_at: since when it owes an answer; None if it owes none.
        """
        if health.answered is None:
            if health.begun is None or now - health.begun <= self.start_limit:
                return ""
            others = f" (others took at most {self.longest_start:.1f} s)" if self.longest_start else ""
            return f"it hasn't answered for {now - health.begun:.0f} s, since it was started{others}"
        if requested_at is not None and now - requested_at > self.silence:
            return f"it hasn't answered for {now - requested_at:.0f} s (others took at most {self.longest_answer:.1f} s)"
        limit = self.standstill if health.stepped else STARTING
        if now - health.moved > limit:
            usual = f"; a step took at most {self.longest_step:.1f} s" if health.stepped else ""
            return f"it answers, but hasn't moved for {now - health.moved:.0f} s{usual}"
        return ""

"""When a process counts as hung: by how long it took to answer and to move before, not by settings that a user must guess."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

ANSWER = 10.0
"""Seconds without an answer that are never called hung: a busy machine may take as long to schedule a thread."""

PROGRESS = 30.0
"""Seconds without a step that are never called hung."""

STARTING = 900.0
"""Seconds for a first step: building the model, reading the data, compiling. Also for the first answer of all."""

FIRST = 90.0
"""Seconds until a first answer that are never called hung, though others have given theirs: importing torch takes some. On
several nodes it is `STARTING`, since a node that is new to the cluster may have to be set up."""

TIMES = 20.0
"""A process is hung if it takes so many times as long as anything like it took before, to answer or for a step."""

TIMES_FIRST = 5.0
"""As much for its first answer: that takes seconds, which differ less than fractions of one."""


@dataclass
class ProcessHealth:
    """One process's signs of life. Times in seconds, on any clock.

    Attributes:
        answered: when it answered last; None before it did.
        begun: since when it could have answered for the first time; None while nobody knows (it may wait for a place).
        moved: when `position` changed last.
    """

    answered: float | None = None
    begun: float | None = None
    moved: float = 0.0
    position: Hashable = None
    stepped: bool = False


class HangDetector:
    """What is normal in this run: the longest that any process took to start, to answer, and from one step to the next."""

    def __init__(self) -> None:
        self.start = self.answer = self.step = 0.0
        self.several = False
        """Whether processes are on several nodes."""

    @property
    def starting(self) -> float:
        """Seconds until its first answer after which a process that has begun is hung."""
        return max(FIRST, TIMES_FIRST * self.start) if self.start and not self.several else STARTING

    @property
    def silence(self) -> float:
        """Seconds without an answer after which a process is hung."""
        return max(ANSWER, TIMES * self.answer)

    @property
    def standstill(self) -> float:
        """Seconds without a step after which a head that trains is hung."""
        return max(PROGRESS, TIMES * self.step)

    def note(
        self, pulse: ProcessHealth, now: float, asked: float, position: Hashable, idle: bool, stepped: bool, head: bool = True
    ) -> None:
        """A process has answered.

        Args:
            pulse: its own.
            asked: when it was asked. Its first answer says how long it took to start; the others, how long to answer.
            position: changes whenever the process does something.
            idle: whether it waits for others, and so needn't move.
            stepped: whether it has taken a step since it started.
            head: whether it is one of heads, which start in their own way.
        """
        if pulse.answered is not None:
            self.answer = max(self.answer, now - asked)
        elif pulse.begun is not None and head:
            self.start = max(self.start, now - pulse.begun)
        pulse.answered = now
        if position != pulse.position or idle:
            if pulse.stepped and not idle:
                self.step = max(self.step, now - pulse.moved)
            pulse.moved, pulse.position = now, position
        pulse.stepped = pulse.stepped or stepped

    def hung(self, pulse: ProcessHealth, now: float, asked: float | None) -> str:
        """Why a process counts as hung; empty if it doesn't.

        Args:
            asked: since when it owes an answer; None if it doesn't.
        """
        if pulse.answered is None:
            if pulse.begun is None or now - pulse.begun <= self.starting:
                return ""
            others = f" (others took at most {self.start:.1f} s)" if self.start else ""
            return f"it hasn't answered for {now - pulse.begun:.0f} s, since it was started{others}"
        if asked is not None and now - asked > self.silence:
            return f"it hasn't answered for {now - asked:.0f} s (others took at most {self.answer:.1f} s)"
        limit = self.standstill if pulse.stepped else STARTING
        if now - pulse.moved > limit:
            usual = f"; a step took at most {self.step:.1f} s" if pulse.stepped else ""
            return f"it answers, but hasn't moved for {now - pulse.moved:.0f} s{usual}"
        return ""

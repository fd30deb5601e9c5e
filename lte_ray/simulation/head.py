"""One head in a simulation: what it is doing, since when, and where its time went.

It trains either with the engine's own head or with one that only counts steps (`TimedHead`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from lte_ray.layout import Plan, Replica
from lte_ray.messages import CommittedPosition, Contribution, ContributionResult
from lte_ray.simulation.record import KINDS, HeadRecord, Row, Span

TINY_PLAN = Plan((), (Replica("nothing", (1,)),))
"""What heads that only keep time contribute: one number."""

_NOTHING = torch.zeros(1)


class Trainee(Protocol):
    """The part of `engine.head.head.Head` that the simulation needs."""

    @property
    def version(self) -> int:
        """The version of the adopted base."""
        ...

    @property
    def samples(self) -> int:
        """Samples trained on since the run began."""
        ...

    def start(self, version: int, base: Tensor) -> None:
        """Adopts the first base."""
        ...

    def rejoin(self, position: CommittedPosition, version: int, base: Tensor) -> None:
        """Called instead of `start`: continues from what was merged of its predecessor, with B = 0."""
        ...

    def train(self, steps: int) -> None:
        """Takes local steps."""
        ...

    def contribute(self) -> Contribution:
        """Makes the contribution of all steps since the last one."""
        ...

    def adopt(self, result: ContributionResult | None, version: int, base: Tensor | None) -> None:
        """Takes the result of the outstanding contribution (None if there is none), and a newer base."""
        ...


class TimedHead:
    """A head without a model: it counts steps (a sample each), and contributes a zero."""

    def __init__(self, run: str, head: int, incarnation: int = 0) -> None:
        self._run, self._head, self._incarnation = run, head, incarnation
        self.version = self.step = self.samples = 0
        self._sequence = 0
        self._accepted_step = self._contributed_step = 0

    def start(self, version: int, base: Tensor) -> None:
        self.version = version

    def rejoin(self, position: CommittedPosition, version: int, base: Tensor) -> None:
        self.step = self.samples = self._accepted_step = self._contributed_step = position.step
        self._sequence, self.version = position.sequence, version

    def train(self, steps: int) -> None:
        self.step += steps
        self.samples += steps

    def contribute(self) -> Contribution:
        self._sequence += 1
        self._contributed_step = self.step
        steps = self.step - self._accepted_step
        return Contribution(
            run=self._run,
            head=self._head,
            incarnation=self._incarnation,
            sequence=self._sequence,
            version=self.version,
            step=self.step,
            steps=steps,
            samples=steps,
            loss=float("nan"),
            buffer=_NOTHING,
        )

    def adopt(self, result: ContributionResult | None, version: int, base: Tensor | None) -> None:
        if result is not None and result.accepted:
            self._accepted_step = self._contributed_step
        self.version = version


MAX_SPANS = 4000
"""Spans of a row that are kept for drawing."""


@dataclass(frozen=True)
class Answer:
    """What the coordinator sends to a head: the result of its contribution, or None, and the newest base.

    A new incarnation gets the position up to which its predecessor was merged.
    """

    head: int
    incarnation: int
    result: ContributionResult | None
    version: int
    base: Tensor = field(repr=False, compare=False)
    position: CommittedPosition | None = None


@dataclass
class Timeline:
    """What one row of the timeline is doing, and the spans in which it did what.

    Attributes:
        kind: what it is doing now, one of `record.KINDS` or "idle"; since when.
        seconds: by kind, of the spans that have ended.
        draw: whether spans are kept; the first `MAX_SPANS` are.
        truncated: whether there were more.
        adopted: the times at which a newer base was adopted.
    """

    kind: str
    since: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    draw: bool = False
    spans: list[Span] = field(default_factory=list)
    adopted: list[float] = field(default_factory=list)
    truncated: bool = False

    def enter(self, kind: str, now: float) -> None:
        """Ends the current span, and begins one of `kind`; does nothing if that is the current kind."""
        if kind == self.kind:
            return
        self.seconds[self.kind] = self.seconds.get(self.kind, 0.0) + now - self.since
        if self.draw and now > self.since:
            if len(self.spans) < MAX_SPANS:
                self.spans.append(Span(self.kind, self.since, now))
            else:
                self.truncated = True
        self.kind, self.since = kind, now

    def mark_adoption(self, now: float) -> None:
        """Records that a newer base was adopted."""
        if self.draw and len(self.adopted) < MAX_SPANS:
            self.adopted.append(now)

    def to_row(self, name: str) -> Row:
        """The row to draw, without the idle time."""
        return Row(name, tuple(span for span in self.spans if span.kind != "idle"), tuple(self.adopted))


@dataclass
class SimHead:
    """A head and what it is doing.

    Attributes:
        number: the head's.
        trainee: takes its steps.
        speed: by how much its steps are slower than those of speed 1.
        steps_left: local steps that it still has to take, where each head has its own.
        timeline: where its time goes.
        round_steps: steps taken since its last contribution.
        planned_steps: steps between two contributions.
        slowdown: by how much this round's steps are slower.
        round_seconds: the time that this round's steps took.
        in_progress: steps that are being taken, when they began, and how long they take.
        contributed_steps: steps of its newest contribution, which are lost if it is refused after the head's death.
        incarnation: how often it has died; what was scheduled for an earlier one is void.
        outstanding: whether a contribution has no answer yet.
        ended, ended_at: whether and when it left.
        inbox: answers that came in the middle of a step.
        steps, samples, contributions, refused, lost_steps: counts for its record; `samples` are those of dead incarnations.
    """

    number: int
    trainee: Trainee
    speed: float
    steps_left: int
    timeline: Timeline
    round_steps: int = 0
    planned_steps: int = 0
    slowdown: float = 1.0
    round_seconds: float = 0.0
    in_progress: tuple[int, float, float] = (0, 0.0, 0.0)
    contributed_steps: int = 0
    incarnation: int = 0
    outstanding: bool = False
    ended: bool = False
    inbox: list[Answer] = field(default_factory=list)
    steps: int = 0
    samples: int = 0
    contributions: int = 0
    refused: int = 0
    lost_steps: int = 0
    ended_at: float = 0.0

    def steps_finished(self, now: float) -> int:
        """How many of the steps in progress are finished at `now`."""
        steps, begin, seconds = self.in_progress
        return int(steps * (now - begin) / seconds) if steps else 0

    @property
    def activity(self) -> str:
        """What the head is doing: one of `record.KINDS`, or "idle" at the end."""
        return self.timeline.kind

    def to_record(self, bytes_up: int, bytes_down: int) -> HeadRecord:
        """The head's part of the simulation's record."""
        return HeadRecord(
            head=self.number,
            speed=self.speed,
            steps=self.steps,
            samples=self.samples + self.trainee.samples,
            contributions=self.contributions,
            refused=self.refused,
            deaths=self.incarnation,
            lost_steps=self.lost_steps,
            bytes_up=bytes_up,
            bytes_down=bytes_down,
            ended=self.ended_at,
            seconds={kind: self.timeline.seconds.get(kind, 0.0) for kind in KINDS},
        )

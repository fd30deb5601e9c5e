"""One head's place in a simulation: what it is doing, since when, and where its time went.

What the simulation drives as a head: the engine's own, or one that only counts.
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
    """As much of `engine.head.Head` as the simulation needs."""

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

    def rejoin(self, standing: CommittedPosition, version: int, base: Tensor) -> None:
        """In the place of `start`: goes on behind what was merged of its predecessor, with B = 0."""
        ...

    def train(self, steps: int) -> None:
        """Takes local steps."""
        ...

    def contribute(self) -> Contribution:
        """Makes the contribution of all steps since the last one."""
        ...

    def adopt(self, verdict: ContributionResult | None, version: int, base: Tensor | None) -> None:
        """Takes an answer, or a newer base that settles nothing."""
        ...


class TimedHead:
    """A head without a model: it counts steps (a sample each), and contributes a zero."""

    def __init__(self, run: str, head: int, incarnation: int = 0) -> None:
        self._run, self._head, self._incarnation = run, head, incarnation
        self.version = self.step = self.samples = 0
        self._sequence = 0
        self._accepted = self._offered = 0  # steps at the last accepted contribution, and at the last one

    def start(self, version: int, base: Tensor) -> None:
        self.version = version

    def rejoin(self, standing: CommittedPosition, version: int, base: Tensor) -> None:
        self.step = self.samples = self._accepted = self._offered = standing.step
        self._sequence, self.version = standing.sequence, version

    def train(self, steps: int) -> None:
        self.step += steps
        self.samples += steps

    def contribute(self) -> Contribution:
        self._sequence += 1
        self._offered = self.step
        steps = self.step - self._accepted
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

    def adopt(self, verdict: ContributionResult | None, version: int, base: Tensor | None) -> None:
        if verdict is not None and verdict.accepted:
            self._accepted = self._offered
        self.version = version


MOST_SPANS = 4000
"""Spans of a row that are kept to be drawn."""


@dataclass(frozen=True)
class Answer:
    """What the coordinator sends to a head: a verdict on its contribution or None, and the newest base.

    A new incarnation is told where its predecessor was merged up to (`standing`).
    """

    head: int
    incarnation: int
    verdict: ContributionResult | None
    version: int
    base: Tensor = field(repr=False, compare=False)
    standing: CommittedPosition | None = None


@dataclass
class Timeline:
    """Spans of one row, neighbours of one kind joined. Keeps the first `MOST_SPANS`."""

    kind: str
    since: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    draw: bool = False
    spans: list[Span] = field(default_factory=list)
    adopted: list[float] = field(default_factory=list)
    cut: bool = False

    def enter(self, kind: str, now: float) -> None:
        """From `now` on the row is busy with `kind`."""
        if kind == self.kind:
            return
        self.seconds[self.kind] = self.seconds.get(self.kind, 0.0) + now - self.since
        if self.draw and now > self.since:
            if len(self.spans) < MOST_SPANS:
                self.spans.append(Span(self.kind, self.since, now))
            else:
                self.cut = True
        self.kind, self.since = kind, now

    def mark(self, now: float) -> None:
        """A newer base was adopted."""
        if self.draw and len(self.adopted) < MOST_SPANS:
            self.adopted.append(now)

    def row(self, name: str) -> Row:
        """As it is drawn: without the idle time."""
        return Row(name, tuple(span for span in self.spans if span.kind != "idle"), tuple(self.adopted))


@dataclass
class SimHead:
    """A head and what it is at.

    Attributes:
        left: local steps that it still has to take, where each head has its own.
        since: steps since its last contribution; `begun`: when the head began to take them.
        planned: steps until the next contribution.
        slow: by how much this round's steps are slower; `spent`: seconds that those taken took.
        under_way: steps that are being taken, when they began, and how long they take.
        offered: steps of its newest contribution, which are at risk until it is decided.
        epoch: its deaths, and so its incarnation; what was under way for an earlier one is void.
        inbox: answers that came in the middle of a step.
    """

    number: int
    head: Trainee
    speed: float
    left: int
    time: Timeline
    since: int = 0
    begun: float = 0.0
    planned: int = 0
    slow: float = 1.0
    spent: float = 0.0
    under_way: tuple[int, float, float] = (0, 0.0, 0.0)
    offered: int = 0
    epoch: int = 0
    outstanding: bool = False
    ended: bool = False
    inbox: list[Answer] = field(default_factory=list)
    steps: int = 0
    samples: int = 0
    contributions: int = 0
    refused: int = 0
    lost: int = 0
    ended_at: float = 0.0

    def finished_at(self, now: float) -> int:
        """How many of the steps that are under way have been finished."""
        steps, begun, seconds = self.under_way
        return int(steps * (now - begun) / seconds) if steps else 0

    @property
    def doing(self) -> str:
        """What it is at: one of `record.KINDS`, or "idle" at the end."""
        return self.time.kind

    def record(self, bytes_up: int, bytes_down: int) -> HeadRecord:
        """As the result holds it."""
        return HeadRecord(
            head=self.number,
            speed=self.speed,
            steps=self.steps,
            samples=self.samples + self.head.samples,
            contributions=self.contributions,
            refused=self.refused,
            deaths=self.epoch,
            lost_steps=self.lost,
            bytes_up=bytes_up,
            bytes_down=bytes_down,
            ended=self.ended_at,
            seconds={kind: self.time.seconds.get(kind, 0.0) for kind in KINDS},
        )

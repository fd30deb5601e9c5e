"""What the simulation drives as a head: the engine's own, or one that only counts."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lte_ray.layout import Plan, Replica
from lte_ray.messages import Contribution, Standing, Verdict

TINY_PLAN = Plan((), (Replica("nothing", (1,)),))
"""What heads that only keep time contribute: one number."""

_NOTHING = torch.zeros(1)


class Trainee(Protocol):
    """As much of `engine.head.Head` as the simulation needs."""

    version: int
    samples: int

    def start(self, version: int, base: Tensor) -> None:
        """Adopts the first base."""
        ...

    def rejoin(self, standing: Standing, version: int, base: Tensor) -> None:
        """In the place of `start`: goes on behind what was merged of its predecessor, with B = 0."""
        ...

    def train(self, steps: int) -> None:
        """Takes local steps."""
        ...

    def contribute(self) -> Contribution:
        """Makes the contribution of all steps since the last one."""
        ...

    def adopt(self, verdict: Verdict | None, version: int, base: Tensor | None) -> None:
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

    def rejoin(self, standing: Standing, version: int, base: Tensor) -> None:
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

    def adopt(self, verdict: Verdict | None, version: int, base: Tensor | None) -> None:
        if verdict is not None and verdict.accepted:
            self._accepted = self._offered
        self.version = version

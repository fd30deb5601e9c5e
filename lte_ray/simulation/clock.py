"""A virtual clock: what is to happen, in the order of time and, at one time, of asking. The same in every run.

What is left to chance, by head: how long steps take, who straggles, who dies. Seeded, so that a run can be repeated.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from random import Random
from typing import Any

from lte_ray.config.cluster_model import ClusterModel


class Clock:
    """Jumps from event to event. `now` is in virtual seconds, from 0."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._asked = 0

    def at(self, time: float, action: Callable[..., None], *args: Any) -> None:
        """Lets `action(*args)` happen at `time`, which isn't in the past; after all that was asked for before at that time."""
        assert time >= self.now, f"{time} has passed at {self.now}"
        self._asked += 1
        heapq.heappush(self._heap, (time, self._asked, action, args))

    def after(self, delay: float, action: Callable[..., None], *args: Any) -> None:
        """Lets `action(*args)` happen in `delay` seconds."""
        self.at(self.now + delay, action, *args)

    def run(self, until: Callable[[], bool] | None = None) -> None:
        """Until nothing is left to happen, or `until` holds after an event."""
        while self._heap:
            self.now, _, action, args = heapq.heappop(self._heap)
            self.events += 1
            action(*args)
            if until is not None and until():
                return


class RandomEvents:
    """A generator for each head, so that what one head draws leaves the others' draws as they are."""

    def __init__(self, cluster: ClusterModel, seed: int, num_heads: int) -> None:
        needed = cluster.jitter > 0 or cluster.straggler_rate > 0 or cluster.faults_per_hour > 0
        self._cluster = cluster
        self._draws = [Random(f"{seed} {n}") for n in range(num_heads)] if needed else []

    def slowness(self, head: int) -> float:
        """How many times slower than usual the head's next round is."""
        straggles = bool(self._draws) and self._draws[head].random() < self._cluster.straggler_rate
        return self._cluster.straggler_factor if straggles else 1.0

    def seconds(self, head: int, steps: int, slowness: float) -> float:
        """How long so many steps take. Each is lognormal; its mean is the head's step time, times the round's slowness."""
        one, jitter = self._cluster.step_seconds * self._cluster.speed(head) * slowness, self._cluster.jitter
        if not jitter:
            return one * steps
        draw = self._draws[head].lognormvariate
        return one * sum(draw(-jitter * jitter / 2, jitter) for _ in range(steps))

    def dies_in(self, head: int) -> float | None:
        """After how many seconds the head dies, if it may: exponential."""
        rate = self._cluster.faults_per_hour / 3600
        return self._draws[head].expovariate(rate) if rate else None

"""The virtual clock, and what the simulation draws at random: step times, stragglers and deaths.

Both are deterministic: the same seed gives the same events in the same order.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from random import Random
from typing import Any

from lte_ray.config.cluster_model import ClusterModel


class Clock:
    """Runs scheduled actions in the order of their times; actions of one time run in the order in which they were scheduled.

    Attributes:
        now: virtual seconds, from 0.
        events: actions run so far.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._scheduled = 0

    def schedule_at(self, time: float, action: Callable[..., None], *args: Any) -> None:
        """Schedules `action(*args)` at `time`, which isn't in the past."""
        assert time >= self.now, f"{time} has passed at {self.now}"
        self._scheduled += 1
        heapq.heappush(self._heap, (time, self._scheduled, action, args))

    def schedule_after(self, delay: float, action: Callable[..., None], *args: Any) -> None:
        """Schedules `action(*args)` in `delay` seconds."""
        self.schedule_at(self.now + delay, action, *args)

    def run(self, until: Callable[[], bool] | None = None) -> None:
        """Runs actions until none is left, or until `until()` is true after one."""
        while self._heap:
            self.now, _, action, args = heapq.heappop(self._heap)
            self.events += 1
            action(*args)
            if until is not None and until():
                return


class RandomEvents:
    """Draws step times, stragglers and deaths, with a generator for each head: no head's draws change another's."""

    def __init__(self, cluster: ClusterModel, seed: int, num_heads: int) -> None:
        is_random = cluster.jitter > 0 or cluster.straggler_rate > 0 or cluster.faults_per_hour > 0
        self._cluster = cluster
        self._generators = [Random(f"{seed} {n}") for n in range(num_heads)] if is_random else []

    def draw_slowdown(self, head: int) -> float:
        """The factor by which the head's next round is slower than usual."""
        straggles = bool(self._generators) and self._generators[head].random() < self._cluster.straggler_rate
        return self._cluster.straggler_factor if straggles else 1.0

    def draw_seconds(self, head: int, steps: int, slowdown: float) -> float:
        """The time of `steps` steps. Each is lognormal with the mean: the head's step time, times `slowdown`."""
        one, jitter = self._cluster.step_seconds * self._cluster.speed(head) * slowdown, self._cluster.jitter
        if not jitter:
            return one * steps
        draw = self._generators[head].lognormvariate
        return one * sum(draw(-jitter * jitter / 2, jitter) for _ in range(steps))

    def draw_seconds_to_death(self, head: int) -> float | None:
        """The exponential time until the head dies; None if heads don't die."""
        rate = self._cluster.faults_per_hour / 3600
        return self._generators[head].expovariate(rate) if rate else None

"""A virtual clock: what is to happen, in the order of time and, at one time, of asking. The same in every run."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


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

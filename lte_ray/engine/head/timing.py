"""Where a head's time goes, and what it is doing now."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from lte_ray.engine.spans import span
from lte_ray.messages import HeadTimes

_ACTIVITIES = {"train": "training", "wait": "waiting"}
"""Parts of `HeadTimes` whose activity has another name."""


class HeadTimer:
    """Measures a head's time by part. Other threads may read it at any time.

    Attributes:
        activity: what the head is doing, as `HeadStatus.state`.
        times: seconds by part.
        first_step_at, last_step_at: Unix times; None before the first step.
    """

    def __init__(self) -> None:
        self.activity, self.times = "starting", HeadTimes()
        self.first_step_at: float | None = None
        self.last_step_at: float | None = None
        self._contributed_at, self._stalled_before = time.perf_counter(), 0.0

    @contextmanager
    def measure(self, part: str, share: float = 1.0) -> Iterator[None]:
        """Adds the block's time, or a share of it, to `part` of `times`, and sets `activity` to that part."""
        begin = time.perf_counter()
        self.activity = _ACTIVITIES.get(part, part)
        try:
            with span(part):
                yield
        finally:
            spent = getattr(self.times, part) + share * (time.perf_counter() - begin)
            self.times = replace(self.times, **{part: spent})

    def record_step(self) -> None:
        """Records that a local step has ended."""
        self.last_step_at = time.time()
        if self.first_step_at is None:
            self.first_step_at = self.last_step_at

    def split(self) -> tuple[float, float]:
        """Seconds since the last call (or since the timer was made): (not stalled, stalled by merging)."""
        now, stalled = time.perf_counter(), self.times.stalled
        elapsed, stall = now - self._contributed_at, stalled - self._stalled_before
        self._contributed_at, self._stalled_before = now, stalled
        return max(0.0, elapsed - stall), stall

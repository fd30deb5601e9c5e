"""The time that a run has taken, without the pauses between its end and its next start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lte_ray.report.thinning import Numbers


@dataclass(frozen=True)
class RunClock:
    """Turns Unix times into seconds for which the run has gone on.

    Attributes:
        starts: Unix times of its starts, in order.
        offsets: for each, the seconds for which the run had gone on before.
        end: seconds in all, up to the last row.
    """

    starts: Numbers
    offsets: Numbers
    end: float

    @classmethod
    def make(cls, starts: Sequence[float], times: Numbers) -> RunClock:
        """The clock of a run.

        Args:
            starts: Unix times. Without any, or if rows are older than the first, the first row is the start.
            times: of all rows (Unix time), in any order; NaN where it isn't known.
        """
        known = np.sort(times[np.isfinite(times)])
        begins = sorted(starts)
        if len(known) and (not begins or known[0] < begins[0] - 1):  # a start has whole seconds
            begins = [float(known[0]), *(each for each in begins if each > known[0])]
        if not begins:
            return cls(np.zeros(1), np.zeros(1), 0.0)
        firsts = np.array(begins)
        places = np.searchsorted(known, np.append(firsts[1:], np.inf), side="left") - 1  # the last row before the next start
        lasts = np.where(places >= 0, known[np.maximum(places, 0)], firsts) if len(known) else firsts
        lengths = np.maximum(lasts - firsts, 0.0)
        offsets = np.concatenate([[0.0], np.cumsum(lengths)])
        return cls(firsts, offsets[:-1], float(offsets[-1]))

    def start_of(self, times: Numbers) -> Numbers:
        """The number of the start to which each time belongs."""
        return np.maximum(np.searchsorted(self.starts, times, side="right") - 1, 0).astype(np.float64)

    def seconds(self, times: Numbers) -> Numbers:
        """Seconds of the run at these times, never below 0; NaN where the time isn't known."""
        numbers = self.start_of(times).astype(np.int64)
        limits = np.append(self.offsets[1:], np.inf)[numbers]  # a row that came late belongs to the end of its start
        return np.clip(self.offsets[numbers] + times - self.starts[numbers], 0.0, limits)

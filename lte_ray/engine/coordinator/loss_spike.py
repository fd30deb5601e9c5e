"""Detects spikes of the training loss and says which version was the last good one, so that the run can go back to it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

MIN_WINDOW = 8
"""Merges needed for a judgement. With fewer, only a loss that isn't finite is suspicious."""

MIN_RELATIVE_DEVIATION = 0.05
"""Lower bound of one standard deviation, relative to the median's absolute value. A loss that has converged has hardly any
spread of its own, and a few percent of it are no spike. At z = 6 a loss must rise by at least 30 %."""


class LossSpikeDetector:
    """Judges each merge's mean training loss by a robust z-score relative to the merges before it.

    With the last `window` losses l_i of merges that weren't suspicious,

        z = (l - median(l_i)) / max(1.4826 median|l_i - median(l_i)|, MIN_RELATIVE_DEVIATION |median(l_i)|).

    A loss is suspicious if z is above the threshold or the loss isn't finite. `patience` suspicious merges in a row are a
    spike: a single bad batch passes by itself. Suspicious losses don't enter the window, so that later merges aren't compared
    with a run that has diverged. A spike is reported once. If the run doesn't go back (`reset`), the loss may come down by
    itself; once it has been high and finite for a whole window of merges, that level is the run's own (other data, another
    phase).

    Args:
        window: merges that are compared with.
        z: threshold; 0: never a spike.
        patience: merges in a row.

    Raises:
        ValueError: `window` is below `MIN_WINDOW`, or `patience` isn't from 1 to `window`.
    """

    def __init__(self, window: int, z: float, patience: int = 3) -> None:
        if window < MIN_WINDOW or not 1 <= patience <= window:
            raise ValueError(f"window is {window}, which must be at least {MIN_WINDOW}, and patience {patience}: 1 to window.")
        self._threshold, self._patience, self._size = z, patience, window
        self._window: deque[float] = deque(maxlen=window)
        self._suspicious: deque[float] = deque(maxlen=window)  # the last in a row
        self._in_a_row = 0

    def record_loss(self, loss: float) -> str:
        """Judges the next merge.

        Args:
            loss: mean training loss of what was merged.

        Returns:
            Why its loss is a spike, as a sentence; empty if it is none.
        """
        if not self._threshold:
            return ""
        z = self._z(loss)
        if z <= self._threshold:
            self.reset()
            self._window.append(loss)
            return ""
        self._in_a_row += 1
        self._suspicious.append(loss)
        reason = ""
        if self._in_a_row == self._patience:
            above = "isn't finite" if math.isinf(z) else f"is {z:.1f} robust standard deviations above the median"
            recent = f" (recent median {median(self._window):.4g})" if self._window else ""
            reason = (
                f"the training loss {loss:.4g} {above}{recent}, merge {self._in_a_row} in a row; "
                f"--rollback-z is {self._threshold:g}"
            )
        if len(self._suspicious) == self._size and all(map(math.isfinite, self._suspicious)):
            self._window = self._suspicious.copy()
            self.reset()
        return reason

    @property
    def suspicious_merges(self) -> int:
        """Suspicious merges in a row, up to the newest: the version before them is the last good one."""
        return self._in_a_row

    def reset(self) -> None:
        """Forgets the suspicious merges: the base went back to where the losses in the window are right."""
        self._suspicious.clear()
        self._in_a_row = 0

    def state(self) -> dict[str, Any]:
        """All that it remembers, for JSON: NaN and infinity as None."""
        suspicious = [loss if math.isfinite(loss) else None for loss in self._suspicious]
        return {"losses": list(self._window), "suspicious": suspicious, "since": self._in_a_row}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state` gave; an empty one, of a run without detection, resets it."""
        self._window = deque(map(float, state.get("losses", [])), maxlen=self._size)
        suspicious = (math.nan if loss is None else float(loss) for loss in state.get("suspicious", []))
        self._suspicious = deque(suspicious, maxlen=self._size)
        self._in_a_row = int(state.get("since", 0))

    def _z(self, loss: float) -> float:
        if not math.isfinite(loss):
            return math.inf
        if len(self._window) < MIN_WINDOW:
            return 0.0
        middle = median(self._window)
        spread = 1.4826 * median(abs(other - middle) for other in self._window)
        scale = max(spread, MIN_RELATIVE_DEVIATION * abs(middle))
        return (loss - middle) / scale if scale else 0.0  # no judgement if the loss was always 0

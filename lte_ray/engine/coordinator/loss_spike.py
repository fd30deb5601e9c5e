"""Sees when the training loss has spiked, so that the base may go back to where it was well."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

MIN_WINDOW = 8
"""Merges without which nothing but a loss that isn't finite is suspicious."""

MIN_RELATIVE_DEVIATION = 0.05
"""Least standard deviation, as a share of the median's absolute value: a loss that stands still has hardly any spread of its
own, and a few percent of it are no spike. At z = 6 a loss must rise by 30 % at the least."""


class LossSpikeDetector:
    """Judges each merge's mean training loss by a robust z-score against the merges before it.

    With the last `window` losses l_i of merges that weren't suspicious,

        z = (l - median(l_i)) / max(1.4826 median|l_i - median(l_i)|, NARROWEST |median(l_i)|).

    It is a spike once z was above the threshold, or the loss not finite, for `patience` merges in a row: a single bad batch
    passes by itself. Suspicious losses don't enter the window, so a run that has blown up isn't what later merges are
    compared with. A spike is told once. If nobody goes back (`reset`), the loss may come down by itself; once it has been
    high, and finite, for as many merges as the window holds, its level is the run's own (other data, another phase).

    Args:
        window: merges that are compared with.
        z: threshold; 0: never a spike.
        patience: merges in a row.

    Raises:
        ValueError: `window` is below `ENOUGH`, or `patience` isn't from 1 to `window`.
    """

    def __init__(self, window: int, z: float, patience: int = 3) -> None:
        if window < MIN_WINDOW or not 1 <= patience <= window:
            raise ValueError(f"window is {window}, which must be at least {MIN_WINDOW}, and patience {patience}: 1 to window.")
        self._most, self._patience, self._size = z, patience, window
        self._window: deque[float] = deque(maxlen=window)
        self._suspicious: deque[float] = deque(maxlen=window)  # the last in a row
        self._since = 0

    def record_loss(self, loss: float) -> str:
        """A merge has been made. Why its loss is a spike, as a sentence; empty if it is none.

        Args:
            loss: mean training loss of what was merged.
        """
        if not self._most:
            return ""
        z = self._z(loss)
        if z <= self._most:
            self.reset()
            self._window.append(loss)
            return ""
        self._since += 1
        self._suspicious.append(loss)
        told = ""
        if self._since == self._patience:
            above = "isn't finite" if math.isinf(z) else f"is {z:.1f} robust standard deviations above the median"
            before = f" (recent median {median(self._window):.4g})" if self._window else ""
            told = f"the training loss {loss:.4g} {above}{before}, merge {self._since} in a row; --rollback-z is {self._most:g}"
        if len(self._suspicious) == self._size and all(map(math.isfinite, self._suspicious)):
            self._window = self._suspicious.copy()
            self.reset()
        return told

    @property
    def suspicious_merges(self) -> int:
        """Merges in a row, up to the newest, whose loss was suspicious: the version before them is the last good one."""
        return self._since

    def reset(self) -> None:
        """The base went back to where the losses in the window are right."""
        self._suspicious.clear()
        self._since = 0

    def state(self) -> dict[str, Any]:
        """All that it remembers, as JSON can hold it: NaN and infinity as None."""
        held = [loss if math.isfinite(loss) else None for loss in self._suspicious]
        return {"losses": list(self._window), "suspicious": held, "since": self._since}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state` gave; an empty one, of a run without a watch, is as new."""
        self._window = deque(map(float, state.get("losses", [])), maxlen=self._size)
        held = (math.nan if loss is None else float(loss) for loss in state.get("suspicious", []))
        self._suspicious = deque(held, maxlen=self._size)
        self._since = int(state.get("since", 0))

    def _z(self, loss: float) -> float:
        if not math.isfinite(loss):
            return math.inf
        if len(self._window) < MIN_WINDOW:
            return 0.0
        middle = median(self._window)
        scale = max(1.4826 * median(abs(other - middle) for other in self._window), MIN_RELATIVE_DEVIATION * abs(middle))
        return (loss - middle) / scale if scale else 0.0  # a loss that was 0 throughout says nothing of what is much

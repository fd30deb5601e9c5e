"""Why a contribution can't be merged: its numbers, or content that isn't finite or moves the base far more than others did.

A check returns the reason, as the end of a sentence, or an empty text where nothing is wrong.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from lte_ray.config import MergeConfig
from lte_ray.messages import Contribution

MAX_CHANGE = 1e30
"""Bound on s times a contribution's sum of squares, and so on every element of s B A. It is far beyond any trained weight, and
far below what overflows float32, so that a merge that has begun can't make the base infinite."""

WINDOW = 32
"""Merged contributions, of all heads, that a new one is compared with. Norms fall while a run trains: with 64, the median lies
so far above the newest norm that a hundred times the newest passed at 29 % of 4378 places (24 runs); with 32, at 6 %."""

MIN_WINDOW = 16
"""Merged contributions needed for a judgement: a median of fewer says little."""

MAX_JUDGEMENTS = 64
"""Judgements that are remembered, of all heads, to tell a faulty head from a change that all heads go through."""

QUARANTINE_AFTER = 3
"""A head's refusals in a row after which it is quarantined."""

MIN_DEVIATION, MAX_DEVIATION = math.log(1.5), math.log(1.75)
"""Bounds on one standard deviation of log-norms.

Norms of equal heads in one merge differ by a few percent, while they double or triple from one merge to the next in warm-up.
So a deviation below 1.5 says how alike heads are, not what is harmless; at 8 deviations, 1.5^8 = 26 times the median passes.
Norms that fall by orders of magnitude within the window spread widely around their median, though none is extraordinary; above
1.75, 1.75^8 = 88 times the median would pass."""

GROWTH = 0.75
"""Norms are divided by steps^GROWTH before they are compared: k steps that agree move weights by k, k random steps by sqrt(k).
Heads that contributed after ten times the others' steps had norms of 10^0.5 to 10^1.07 times theirs, mostly 10^0.7 to
10^0.9."""


def check_identity(c: Contribution, run: str, newest: tuple[int, int], version: int) -> str:
    """Why a contribution isn't the next one of this run's head.

    Args:
        c: the contribution.
        run: the run's name.
        newest: incarnation and sequence that were received last of its head.
        version: of the base.
    """
    if c.run != run:
        return f"it belongs to run {c.run!r}, not {run!r}"
    if c.sequence < 1:
        return f"its sequence is {c.sequence}, but a head counts its contributions from 1"
    if (c.incarnation, c.sequence) <= newest or c.incarnation < newest[0]:
        return f"incarnation {c.incarnation} sequence {c.sequence} of head {c.head} was received before, or is older"
    if c.version > version:
        return f"it was trained on version {c.version}, but the newest is {version}"
    return ""


def check_magnitude(total: float, scaling: float) -> str:
    """Why a contribution could make the base infinite.

    Args:
        total: its sum of squares.
        scaling: the largest s of a layer: s times the sum of squares bounds each element of s B A.
    """
    bound = scaling * total  # NaN or infinity if the contribution holds such
    if bound < MAX_CHANGE:
        return ""
    return f"it holds values that are NaN, infinite or absurdly large (s times the sum of squares: {bound:g})"


class OutlierFilter:
    """Judges norms by a robust z-score, and counts refusals in a row.

    With y = log(norm / steps^GROWTH), and y_i of the last `WINDOW` merged contributions of all heads,

        z = (y - median(y_i)) / min(max(1.4826 median|y_i - median(y_i)|, MIN_DEVIATION), MAX_DEVIATION).

    1.4826 makes the median deviation that of a normal distribution (Leys et al. 2013, doi 10.1016/j.jesp.2013.03.013). Half of
    the window may be outliers. Only z > `max_norm_z` is refused: a small contribution does no harm.

    Refused contributions aren't merged, so with the median alone a level that has passed would stay the reference: after the
    learning rate is raised a hundredfold, or where warm-up begins at almost nothing, all heads would be refused forever. So
    heads are witnesses. The level counts as changed once the newest contributions of more than half of the heads (of those in
    the last `MAX_JUDGEMENTS` judgements), and at least two contributions, were high and within `max_norm_z` times MIN_DEVIATION
    of the newest. Then the newest passes, and the window restarts with what these witnesses sent; nothing is judged until it
    holds `MIN_WINDOW`. A faulty minority never passes. A faulty majority, or a lone head's second high contribution in a row,
    can't be told from a change.

    Args:
        settings: `max_norm_z` is read. Where heads never merge, none is an example for another, and no norm is refused.
    """

    def __init__(self, settings: MergeConfig) -> None:
        self._threshold = 0.0 if settings.never_merge else settings.max_norm_z
        self._window: deque[float] = deque(maxlen=WINDOW)
        self._judged: deque[tuple[int, float, bool]] = deque(maxlen=MAX_JUDGEMENTS)  # head, y, whether it was high
        self._in_a_row: dict[int, int] = {}

    def check(self, head: int, norm: float, steps: int) -> str:
        """Why a contribution is an outlier. Call it once for each.

        Args:
            head: whose it is.
            norm: Euclidean norm of the whole change, s (B A - B' A') and replicas (`merging.low_rank.squared_norm`). The norm
                of the factors themselves says nothing: it was 7.0 to 7.3 throughout a run in which the change's fell from 2.2
                to 0.2.
            steps: local steps that it holds.
        """
        if not self._threshold or norm == 0:
            return ""
        if not math.isfinite(norm):
            return f"its norm is {norm}"
        y = _scaled(norm, steps)
        z, middle = self._compare(y)
        high = z > self._threshold
        self._judged.append((head, y, high))
        if not high or self._level_changed(y):
            return ""
        typical = math.exp(middle) * max(1, steps) ** GROWTH
        return (
            f"its norm {norm:.3g} is {z:.1f} robust standard deviations above the recent contributions' (median "
            f"{typical:.3g} for {steps} steps); --max-norm-z is {self._threshold:g}"
        )

    def record_merge(self, head: int, norm: float | None, steps: int) -> None:
        """Records a contribution that has become part of the base: later ones are compared with its norm, if that is known."""
        self.reset_refusals(head)
        if norm:  # a head whose learning rate is 0 says nothing about the others
            self._window.append(_scaled(norm, steps))

    def record_refusal(self, head: int) -> bool:
        """Records that a head's contribution was refused for its content.

        Returns:
            Whether to quarantine the head, since this was the third in a row. Then the head is forgotten: it is no longer a
            witness, and its successor begins without refusals.
        """
        self._in_a_row[head] = self._in_a_row.get(head, 0) + 1
        if self._in_a_row[head] < QUARANTINE_AFTER:
            return False
        self.reset_refusals(head)
        self._judged = deque((each for each in self._judged if each[0] != head), maxlen=MAX_JUDGEMENTS)
        return True

    def reset_refusals(self, head: int) -> None:
        """Ends a head's refusals in a row."""
        self._in_a_row.pop(head, None)

    def state(self) -> dict[str, Any]:
        """All that it remembers, for JSON."""
        return {
            "norms": list(self._window),
            "judged": [list(each) for each in self._judged],
            "refused": [[head, count] for head, count in self._in_a_row.items()],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state` gave; an empty one, of a run without a filter, resets it."""
        self._window = deque(map(float, state.get("norms", [])), maxlen=WINDOW)
        judged = ((int(head), float(y), bool(high)) for head, y, high in state.get("judged", []))
        self._judged = deque(judged, maxlen=MAX_JUDGEMENTS)
        self._in_a_row = {int(head): int(count) for head, count in state.get("refused", [])}

    def _compare(self, y: float) -> tuple[float, float]:
        """Returns z and the median; z is 0 while the window is too small."""
        if len(self._window) < MIN_WINDOW:
            return 0.0, 0.0
        middle = median(self._window)
        spread = 1.4826 * median(abs(other - middle) for other in self._window)
        return (y - middle) / min(max(spread, MIN_DEVIATION), MAX_DEVIATION), middle

    def _level_changed(self, y: float) -> bool:
        """Whether most heads went through the same change as the newest, which was judged high; then the window restarts."""
        agree = [(h, high and abs(other - y) <= self._threshold * MIN_DEVIATION) for h, other, high in self._judged]
        newest = dict(agree)
        if 2 * sum(newest.values()) <= len(newest) or sum(same for _, same in agree) < 2:
            return False
        witnesses = [other for (_, other, _), (_, same) in zip(self._judged, agree, strict=True) if same]
        self._window = deque(witnesses[:-1], maxlen=WINDOW)  # the newest is added when it is merged
        self._judged.clear()
        return True


def _scaled(norm: float, steps: int) -> float:
    return math.log(norm) - GROWTH * math.log(max(1, steps))

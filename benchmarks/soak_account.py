"""What the soak's figures are made of: rows of ``metrics.jsonl``, and the times of the faults."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Span = tuple[float, float]


LONG = 2.0
"""Times the median of a head's stretches from which on one counts as long."""


@dataclass
class Fault:
    """One fault: when it was sent (Unix time), of which kind, and the head that the driver then missed, if it was one's."""

    at: float
    kind: str
    head: int | None = None
    incarnation: int = 0
    noticed: float | None = None

    @property
    def of_head(self) -> bool:
        """Whether a head's process was hit."""
        return self.kind.startswith("head")


@dataclass(frozen=True)
class Stretch:
    """Between two merges of one process of a head: from when to when (Unix time), and how many samples it contributed."""

    head: int
    begin: float
    end: float
    samples: int


def stretches(merges: Sequence[Row], starts: Sequence[float]) -> list[Stretch]:
    """When one process of a head was at work, from merge to merge; `starts` are those of drivers (Unix time).

    While there is no coordinator a head's contribution waits, and what it trains meanwhile comes with the one behind it: a
    stretch that is much longer than most is one with the next.
    """
    found: list[Stretch] = []
    last: dict[str, tuple[float, Row]] = {}
    for row in merges:
        for head, held in row["held"].items():
            before = last.get(head)
            last[head] = (row["at"], held)
            if before is None or held["incarnation"] != before[1]["incarnation"]:
                continue
            if any(before[0] < start <= row["at"] for start in starts) or held["samples"] <= before[1]["samples"]:
                continue
            found.append(Stretch(int(head), before[0], row["at"], held["samples"] - before[1]["samples"]))
    return [
        piece for head in sorted({piece.head for piece in found}) for piece in _joined([p for p in found if p.head == head])
    ]


def _joined(pieces: Sequence[Stretch]) -> list[Stretch]:
    """Those of one head, in order."""
    long = LONG * statistics.median(piece.end - piece.begin for piece in pieces)
    made: list[Stretch] = []
    waited: Stretch | None = None  # one that is long, and was followed by nothing yet
    for piece in pieces:
        if waited is not None and waited.end == piece.begin:
            made[-1] = Stretch(piece.head, waited.begin, piece.end, waited.samples + piece.samples)
            waited = None
        else:
            made.append(piece)
            waited = piece if piece.end - piece.begin > long else None
    return made


def rate(pieces: Iterable[Stretch], spans: Sequence[Span], but: Sequence[int | None] = ()) -> tuple[float, float]:
    """Samples/s of a head, and the head-seconds that this is measured over, within spans of time.

    Args:
        pieces: of all heads.
        spans: from when to when.
        but: for each span, the head that doesn't count in it.
    """
    samples = seconds = 0.0
    for piece in pieces:
        skip = but or [None] * len(spans)
        own = _union([span for span, head in zip(spans, skip, strict=True) if head != piece.head])
        for begin, end in own:
            inside = min(end, piece.end) - max(begin, piece.begin)
            if inside > 0:
                seconds += inside
                samples += piece.samples * inside / (piece.end - piece.begin)
    return (samples / seconds if seconds else 0.0), seconds


def name_heads(faults: Sequence[Fault], events: Sequence[Row]) -> None:
    """Finds out which head each fault hit: the driver says so when it misses it."""
    open_ = [fault for fault in faults if fault.of_head]
    for event in events:
        if event["event"] in ("head_lost", "head_hung"):
            earlier = [f for f in open_ if f.at <= event["at"] and ("STOP" in f.kind) == (event["event"] == "head_hung")]
            if earlier:
                earlier[0].head, earlier[0].incarnation, earlier[0].noticed = (
                    event["heads"][0],
                    event["incarnation"],
                    event["at"],
                )
                open_.remove(earlier[0])


def back(fault: Fault, merges: Sequence[Row], starts: Sequence[float], heads: int) -> float | None:
    """When the run was at full strength again (Unix time); None if that never came."""
    if fault.of_head and fault.head is None:
        return None
    needed = {str(fault.head)} if fault.of_head else {str(head) for head in range(heads)}
    restart = min((start for start in starts if start > fault.at), default=float("inf"))
    for row in merges:
        if row["at"] <= (fault.noticed or fault.at):
            continue
        for head, held in row["held"].items():
            if not fault.of_head or held["incarnation"] > fault.incarnation or row["at"] > restart:
                needed.discard(head)
        if not needed:
            return float(row["at"])
    return None


def next_merge(fault: Fault, merges: Sequence[Row]) -> float | None:
    """Seconds from the fault to the next merge of the run."""
    return next((row["at"] - fault.at for row in merges if row["at"] > fault.at), None)


def quantiles(values: Iterable[float | None]) -> dict[str, float | int]:
    """Median, 90th percentile and largest of what is known."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return {"number": 0}
    p90 = known[min(len(known) - 1, int(0.9 * len(known)))]
    return {
        "number": len(known),
        "median": round(statistics.median(known), 2),
        "p90": round(p90, 2),
        "max": round(known[-1], 2),
    }


def fit(points: Sequence[tuple[float, float]]) -> dict[str, float]:
    """A straight line through values over time (s): its slope for an hour, and the values at the start and at the end."""
    if len(points) < 3:
        return {"samples": len(points)}
    line = statistics.linear_regression([at for at, _ in points], [value for _, value in points])
    tenth = max(1, len(points) // 10)
    ordered = [value for _, value in sorted(points)]
    return {
        "samples": len(points),
        "per_hour": round(3600 * line.slope, 3),
        "over_the_run": round(line.slope * (max(points)[0] - min(points)[0]), 3),
        "start": round(statistics.median(ordered[:tenth]), 3),
        "end": round(statistics.median(ordered[-tenth:]), 3),
    }


def _union(spans: Sequence[Span]) -> list[Span]:
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged

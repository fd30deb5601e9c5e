"""Computes the soak's figures from rows of ``metrics.jsonl`` and the times of the faults."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Span = tuple[float, float]


LONG = 2.0
"""A stretch counts as long from this multiple of the median of its head's stretches."""


@dataclass
class Fault:
    """One fault: its Unix time, its kind, and the head that the driver then reported, if it hit one."""

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
    """The time between two merges of one process of a head (Unix time), and the samples that it contributed."""

    head: int
    begin: float
    end: float
    samples: int


def stretches(merges: Sequence[Row], starts: Sequence[float]) -> list[Stretch]:
    """The stretches in which a process of a head worked, from merge to merge; `starts` are the Unix times of driver starts.

    Without a coordinator a head's contribution waits, and what the head trains in the meantime comes with the next one. So a
    stretch that is much longer than most is joined with the next.
    """
    parts: list[Stretch] = []
    last: dict[str, tuple[float, Row]] = {}
    for row in merges:
        for head, held in row["held"].items():
            before = last.get(head)
            last[head] = (row["at"], held)
            if before is None or held["incarnation"] != before[1]["incarnation"]:
                continue
            if any(before[0] < start <= row["at"] for start in starts) or held["samples"] <= before[1]["samples"]:
                continue
            parts.append(Stretch(int(head), before[0], row["at"], held["samples"] - before[1]["samples"]))
    return [
        piece for head in sorted({piece.head for piece in parts}) for piece in _join_long([p for p in parts if p.head == head])
    ]


def _join_long(pieces: Sequence[Stretch]) -> list[Stretch]:
    """Joins long stretches of one head with the next; `pieces` are in order."""
    long = LONG * statistics.median(piece.end - piece.begin for piece in pieces)
    joined: list[Stretch] = []
    waited: Stretch | None = None  # the last one, if it is long and not joined
    for piece in pieces:
        if waited is not None and waited.end == piece.begin:
            joined[-1] = Stretch(piece.head, waited.begin, piece.end, waited.samples + piece.samples)
            waited = None
        else:
            joined.append(piece)
            waited = piece if piece.end - piece.begin > long else None
    return joined


def rate(pieces: Iterable[Stretch], spans: Sequence[Span], but: Sequence[int | None] = ()) -> tuple[float, float]:
    """Samples/s per head within spans of time, and the head-seconds that they cover.

    Args:
        pieces: the stretches of all heads.
        spans: begin and end of each span.
        but: for each span, the head that doesn't count in it.
    """
    samples = seconds = 0.0
    for piece in pieces:
        skip = but or [None] * len(spans)
        counted = _union([span for span, head in zip(spans, skip, strict=True) if head != piece.head])
        for begin, end in counted:
            inside = min(end, piece.end) - max(begin, piece.begin)
            if inside > 0:
                seconds += inside
                samples += piece.samples * inside / (piece.end - piece.begin)
    return (samples / seconds if seconds else 0.0), seconds


def assign_heads(faults: Sequence[Fault], events: Sequence[Row]) -> None:
    """Assigns to each fault the head that it hit, which the driver reports when it notices."""
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


def recovered_at(fault: Fault, merges: Sequence[Row], starts: Sequence[float], heads: int) -> float | None:
    """The Unix time at which all heads had merged again after the fault, or None if that never happened."""
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
    """Number, median, 90th percentile and maximum of the known values."""
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
    """Fits a line through values over time in seconds: its slope per hour, and the values at the start and the end."""
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

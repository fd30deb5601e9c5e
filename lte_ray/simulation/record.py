"""The record of a simulation: where the heads' time went, bytes, staleness, losses, and spans of time to draw."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

KINDS = ("train", "send", "wait", "fetch", "dead")
"""What a head's time is spent on. Send, wait and fetch count only while the head stands still for them."""


@dataclass(frozen=True)
class Span:
    """What a row of the timeline was doing from `start` to `end`, in virtual seconds."""

    kind: str
    start: float
    end: float


@dataclass(frozen=True)
class Row:
    """One row of the timeline: its spans, in order, and the times at which a newer base was adopted."""

    name: str
    spans: tuple[Span, ...]
    adopted: tuple[float, ...] = ()


@dataclass(frozen=True)
class MergeRow:
    """One merge: its virtual time, how many contributions it merged, their steps, mean loss and lags."""

    version: int
    at: float
    contributions: int
    steps: int
    samples: int
    loss: float
    mean_lag: float
    max_lag: int


@dataclass(frozen=True)
class HeadRecord:
    """One head's run. `seconds` is its time by kind until it `ended`; `lost_steps` were lost when it died."""

    head: int
    speed: float
    steps: int
    samples: int
    contributions: int
    refused: int
    deaths: int
    lost_steps: int
    bytes_up: int
    bytes_down: int
    ended: float
    seconds: Mapping[str, float]

    @property
    def utilisation(self) -> float:
        """The fraction of its time that it trained."""
        total = sum(self.seconds.values())
        return self.seconds["train"] / total if total else 0.0


@dataclass(frozen=True)
class SimulationRecord:
    """A finished simulation. Times in virtual seconds.

    Attributes:
        seconds: until the last head had ended.
        lags: how many contributions were merged at each lag.
        coordinator_busy, link_in_busy, link_out_busy: the time for which the coordinator and its links had work, as a fraction
            of the run's; more than 1 if merging, which continues while answers are sent, can't keep up.
        arrivals: contributions that reached the coordinator.
        events: actions that the simulation ran.
        rows_cut: whether the rows end early, because there were more spans than they may hold.
        evaluation: of the final base, if a model was trained.
    """

    seconds: float
    heads: tuple[HeadRecord, ...]
    merges: tuple[MergeRow, ...]
    lags: Mapping[int, int]
    arrivals: int
    coordinator_busy: float
    link_in_busy: float
    link_out_busy: float
    rows: tuple[Row, ...]
    rows_cut: bool
    events: int
    evaluation: Mapping[str, float] = field(default_factory=dict)

    @property
    def utilisation(self) -> float:
        """Mean over the heads of the fraction of their time that they trained."""
        return sum(head.utilisation for head in self.heads) / len(self.heads)

    @property
    def versions(self) -> int:
        """How many merges there were."""
        return len(self.merges)

    @property
    def steps(self) -> int:
        """Local steps that were merged."""
        return sum(merge.steps for merge in self.merges)

    @property
    def samples(self) -> int:
        """Samples that were merged."""
        return sum(merge.samples for merge in self.merges)

    @property
    def lost_steps(self) -> int:
        """Local steps that were lost when heads died."""
        return sum(head.lost_steps for head in self.heads)

    @property
    def mean_lag(self) -> float:
        """Mean staleness of the merged contributions, in versions."""
        return sum(lag * count for lag, count in self.lags.items()) / max(1, sum(self.lags.values()))

    @property
    def max_lag(self) -> int:
        """Largest staleness of a merged contribution."""
        return max(self.lags, default=0)

    @property
    def bytes_up(self) -> int:
        """All heads' bytes up."""
        return sum(head.bytes_up for head in self.heads)

    @property
    def bytes_down(self) -> int:
        """All heads' bytes down."""
        return sum(head.bytes_down for head in self.heads)

    def share(self, kind: str) -> float:
        """The fraction of all heads' time that was spent on this kind."""
        total = sum(sum(head.seconds.values()) for head in self.heads)
        return sum(head.seconds[kind] for head in self.heads) / total if total else 0.0

    def to_json(self, **more: Any) -> dict[str, Any]:
        """The record as JSON values (NaN as null), after `more`."""
        summary = {
            "seconds": self.seconds,
            "utilisation": self.utilisation,
            "shares": {kind: self.share(kind) for kind in KINDS},
            "versions": self.versions,
            "arrivals": self.arrivals,
            "steps": self.steps,
            "samples": self.samples,
            "lost_steps": self.lost_steps,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "mean_lag": self.mean_lag,
            "max_lag": self.max_lag,
            "lags": {str(lag): self.lags[lag] for lag in sorted(self.lags)},
            "coordinator_busy": self.coordinator_busy,
            "link_in_busy": self.link_in_busy,
            "link_out_busy": self.link_out_busy,
            "events": self.events,
            "evaluation": dict(self.evaluation),
        }
        heads = [{**_fields(head), "utilisation": head.utilisation} for head in self.heads]
        rows = [{"name": r.name, "adopted": r.adopted, "spans": [[s.kind, s.start, s.end] for s in r.spans]} for r in self.rows]
        parts = {"heads": heads, "merges": [_fields(m) for m in self.merges], "rows": rows, "rows_cut": self.rows_cut}
        values: dict[str, Any] = _finite({**more, **summary, **parts})
        return values


def _fields(record: Any) -> dict[str, Any]:
    return {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""The newest rows of ``metrics.jsonl``: where the heads are, how fast the run is, its last evaluation and its last events.

Rows may come from another release, or from a damaged file, so nothing in them is taken for granted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lte_ray.redaction import printable
from lte_ray.run.metrics import RATE_WINDOW, Evaluation, Row
from lte_ray.run.metrics_files import METRICS, MetricsReader
from lte_ray.run.tail import parse_row, read_lines_back
from lte_ray.storage import RunDirectory

LEAST_BYTES, EVENT_BYTES, MOST_BYTES = 2**16, 2**19, 2**22
"""Bytes of rows that are parsed: at least, until there is an event, and at most."""

SEARCHED_BYTES = 2**26
"""Bytes of a local file, at most, in which the last evaluation is searched for; of other storage `MOST_BYTES` are read."""

MAX_EVENTS = 10
"""Events that are kept."""

HEAD_EVENTS = {
    "head_dropped": "dropped",
    "head_quarantined": "quarantined",
    "head_restarts": "restarted",
    "head_lost": "lost",
    "head_moves": "moving",
}
"""What events say of a head that hasn't merged since."""

GONE = ("dropped", "quarantined")
"""Those of them after which a head trains no more."""


@dataclass(frozen=True)
class HeadPlace:
    """Where a head's last merge left it: its local steps, samples and training loss, and the version of that merge."""

    step: int
    samples: int
    loss: float
    version: int


@dataclass(frozen=True)
class Ending:
    """What the newest start of a run has said of its end.

    Attributes:
        known: whether it has said anything.
        finished, ended_early, stopped: which events there are. A run that was stopped has finished, too.
        why: why it was stopped, or ended early.
        note: what a run that goes on waits for.
    """

    known: bool = False
    finished: bool = False
    ended_early: bool = False
    stopped: bool = False
    why: str = ""
    note: str = ""


@dataclass
class NewestRows:
    """What the newest rows say.

    Attributes:
        merges: the newest rows of merges, newest first, as many as rates need.
        places: by head, where it is.
        head_states: by head, what an event after its last merge says of it.
        evaluation: the newest.
        events: the newest, newest first.
        newest_at: when the newest row was written (Unix time).
        damaged: lines that aren't rows; `torn`: whether the last one isn't.
        exists: whether there is the file; `is_cut`: whether there are older rows, among which an evaluation may be.
    """

    merges: list[Row] = field(default_factory=list)
    places: dict[int, HeadPlace] = field(default_factory=dict)
    head_states: dict[int, str] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    events: list[Row] = field(default_factory=list)
    newest_at: float | None = None
    damaged: int = 0
    torn: bool = False
    exists: bool = True
    is_cut: bool = False

    @classmethod
    def read(cls, directory: RunDirectory, num_heads: int, *, evaluates: bool) -> NewestRows:
        """Reads back from the file's end until all is known, or `MOST_BYTES` are read.

        Args:
            num_heads: of the run.
            evaluates: whether evaluations are expected, so that an older one is searched for.

        Raises:
            StorageError: the file can't be read.
        """
        source = MetricsReader(directory)
        size, bytes_read = source.size(), 0
        rows = cls(exists=size is not None)
        limit = SEARCHED_BYTES if directory.is_local else MOST_BYTES
        for number, line in enumerate(read_lines_back(source, limit)):
            bytes_read += len(line) + 1
            if bytes_read > MOST_BYTES:
                if rows.evaluation is not None or not evaluates:
                    break
                if b'"evaluation"' not in line[:40]:
                    continue
            row = parse_row(line)
            if row is None:
                rows.damaged, rows.torn = rows.damaged + (number > 0), rows.torn or number == 0
                continue
            rows._add(row)
            enough = len(rows.merges) > RATE_WINDOW and len(rows.places) + len(rows.head_states) >= num_heads
            least = LEAST_BYTES if rows.events else EVENT_BYTES
            if bytes_read >= least and enough and (rows.evaluation is not None or not evaluates):
                break
        else:
            rows.is_cut = (size or 0) > limit
        return rows

    def _add(self, row: Row) -> None:
        """Adds the row that is older than all others."""
        if self.newest_at is None:
            self.newest_at = to_number(row.get("at"))
        if row["kind"] == "merge":
            self._add_merge(row)
        elif row["kind"] == "evaluation" and self.evaluation is None:
            values = row.get("values")
            figures = {
                printable(str(name)): number for name, each in _table(values).items() if (number := to_number(each)) is not None
            }
            self.evaluation = Evaluation(_whole(row.get("version")), _whole(row.get("step")), figures)
        elif row["kind"] == "event":
            if len(self.events) < MAX_EVENTS:
                self.events.append(row)
            state = HEAD_EVENTS.get(str(row.get("event")))
            named = row.get("heads", [row.get("head")])
            for head in named if state and isinstance(named, list) else []:
                if isinstance(head, int) and head not in self.places:
                    self.head_states.setdefault(head, state or "")

    def _add_merge(self, row: Row) -> None:
        if len(self.merges) <= RATE_WINDOW:
            self.merges.append(row)
        heads, losses, places = row.get("heads"), _table(row.get("train_loss")), _table(row.get("held"))
        for head in heads if isinstance(heads, list) else []:
            if isinstance(head, int) and head not in self.places:
                place, loss = _table(places.get(str(head))), to_number(losses.get(str(head)))
                self.places[head] = HeadPlace(
                    step=_whole(place.get("step", row.get("step"))),
                    samples=_whole(place.get("samples")),
                    loss=math.nan if loss is None else loss,
                    version=_whole(row.get("version")),
                )

    @property
    def newest_version(self) -> int:
        """The newest version that was merged; 0 without one."""
        return _whole(self.merges[0].get("version")) if self.merges else 0

    @property
    def seconds_per_merge(self) -> float:
        """Mean time between the newest merges; 0 if it isn't known."""
        times = [at for at in (to_number(row.get("at")) for row in self.merges) if at is not None]
        return max(0.0, (times[0] - times[-1]) / (len(times) - 1)) if len(times) > 1 else 0.0

    @property
    def samples_per_second(self) -> float | None:
        """Samples per second of all heads together over the newest merges, or None if that isn't known."""
        given = to_number(self.merges[0].get("samples_per_second")) if self.merges else None
        seconds = self.seconds_per_merge * (len(self.merges) - 1)
        if given is not None or not seconds:  # an older release didn't write it
            return given
        return sum(_whole(row.get("samples")) for row in self.merges[:-1]) / seconds

    def seconds_per_step(self, num_heads: int) -> float | None:
        """Mean time of a local step of each head over the newest merges, or None if that isn't known."""
        recent = self.merges[:RATE_WINDOW]
        steps = sum(_whole(row.get("steps")) for row in recent[:-1])
        return self.seconds_per_merge * (len(recent) - 1) * num_heads / steps if steps else None

    def ending(self, started_at: float | None) -> Ending:
        """What the run has said of its end since its newest start (Unix time; None if unknown), among the newest events."""
        stopped: Row | None = None
        newest_merge = to_number(self.merges[0].get("at")) if self.merges else None
        note = ""
        for row in self.events:
            name, at, why = row.get("event"), to_number(row.get("at")), _why(row)
            if name == "resumed" or (started_at is not None and at is not None and at < started_at - 1):
                break
            if name == "ended_early":
                return Ending(known=True, ended_early=True, why=why)
            if name == "finished":
                finished = Ending(known=True, finished=True)
                following = self.events[self.events.index(row) + 1 :]
                before = next((each for each in following if each.get("event") in ("stopped", "resumed", "finished")), {})
                if before.get("event") != "stopped":
                    return finished
                return Ending(known=True, finished=True, stopped=True, why=_why(before))
            if name == "stopped" and stopped is None:
                stopped = row
            if name == "still" and not note and (newest_merge is None or (at or 0.0) > newest_merge):
                note = f"nothing has moved: {why}"
        if stopped is not None:
            return Ending(stopped=True, why=_why(stopped), note=f"ends early: {_why(stopped)}")
        return Ending(note=note)

    def problems(self, *, is_alive: bool | None) -> list[str]:
        """What is wrong with the file, one sentence each.

        Args:
            is_alive: whether a process adds rows now, so that there may be none yet, or a half one; None: not known.
        """
        lines = [] if self.exists or is_alive else [f"There is no {METRICS}: nothing was merged or reported yet."]
        if self.damaged:
            lines.append(f"{self.damaged:,} of the newest lines of {METRICS} can't be read and are left out.")
        if self.torn and is_alive is False:
            lines.append(f"The last line of {METRICS} is incomplete and is left out.")
        if self.is_cut and self.evaluation is None:
            lines.append(f"The newest rows of {METRICS} have no evaluation; older ones weren't read.")
        if self.merges and not any("held" in row for row in self.merges):
            lines.append(f"The rows of {METRICS} are of an older release: they don't say how many samples heads have trained.")
        return lines


def to_number(value: Any) -> float | None:
    """A finite number of a row, or None if it is anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def _whole(value: Any) -> int:
    number = to_number(value)
    return 0 if number is None else int(number)


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _why(row: Row) -> str:
    return printable(str(row.get("why", "")))

"""What a run reports while it is on: one record for displays, and rows in ``metrics.jsonl``."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, Protocol

from lte_ray.errors import StorageError
from lte_ray.messages import HeadStatus, MergeRecord
from lte_ray.redaction import redact
from lte_ray.storage import RunDirectory, pending_problem, run_in_thread

METRICS = "metrics.jsonl"

REMOTE_EVERY = 20.0
"""Seconds between two writes of the metrics on an object store."""

BRIEF = 0.5
"""Seconds that the run waits for its metrics to be written, before it goes on with what it has to do."""


@dataclass(frozen=True)
class Evaluation:
    """The worker's judgement of one base version."""

    version: int
    step: int
    values: dict[str, float]


@dataclass(frozen=True)
class Progress:
    """A run at one moment. Times in seconds; rates over the last rounds, None before there is one."""

    run: str
    step: int
    steps: int
    samples: int
    samples_per_second: float | None
    version: int
    heads: tuple[HeadStatus, ...]
    evaluation: Evaluation | None
    seconds: float
    remaining: float | None
    checkpoint: int | None
    note: str = ""

    @classmethod
    def starting(cls, run: str, steps: int, note: str) -> Progress:
        """A run that has no heads yet."""
        return cls(run, 0, steps, 0, None, 0, (), None, 0.0, None, None, note)

    @property
    def train_loss(self) -> float:
        """Mean of the heads' last losses; NaN before there is one."""
        losses = [h.loss for h in self.heads if math.isfinite(h.loss)]
        return sum(losses) / len(losses) if losses else math.nan


class Reporter(Protocol):
    """Shows progress to people: called a few times a second while the run is on, and once at its end."""

    def update(self, progress: Progress) -> None: ...

    def close(self) -> None: ...


class SilentReporter:
    """A reporter that shows nothing."""

    def update(self, progress: Progress) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """Rows of ``metrics.jsonl``: one for every merge (kind "merge"), evaluation and event.

    They are written in another thread: who adds rows never waits long for storage, however that hangs.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = dataclasses.replace(directory, patience=0.0)  # it is tried again soon, and nobody waits for it
        self._patience = directory.patience
        self._rows: list[str] = []
        self._lock = threading.Lock()  # around the rows, never around storage
        self._writing: Future[None] | None = None
        self._flushed = time.monotonic()
        self._back: int | None = None  # a version after which no rows are to stay in the file, where they still are
        self.problem = ""
        """Why the rows can't be written; empty if they can."""

    def rewind(self, version: int) -> None:
        """Drops the rows after `version`, which a resumed run writes again; as soon as storage lets it."""
        with self._lock:
            self._rows = [row for row in self._rows if _stays(row, version)]
            self._back = _earlier(self._back, version)
        self._flush(BRIEF)

    def record_merge(self, record: MergeRecord) -> None:
        self._row(
            "merge",
            at=record.at,
            version=record.version,
            step=record.step,
            steps=record.steps,
            samples=record.samples,
            heads=list(record.heads),
            train_loss=_by_head(record.losses),
            merge_seconds=record.merge_seconds,
            bytes_up=record.bytes_up,
            bytes_down=record.bytes_down,
            base_error=record.base_error,
            lag=_by_head(record.lags),
            head_steps=_by_head(record.head_steps),
            weight=_by_head(record.weights),
            stall_seconds=_by_head(record.stalls),
            bytes_instead=record.bytes_instead,
            held={str(head): dataclasses.asdict(held) for head, held in record.held.items()},
        )

    def record_evaluation(self, evaluation: Evaluation) -> None:
        self._row("evaluation", at=time.time(), version=evaluation.version, step=evaluation.step, values=evaluation.values)

    def record_event(self, name: str, **values: Any) -> None:
        """Something that happened to the run, beside merges: a process that died, one that came back, ..."""
        self._row("event", at=time.time(), event=name, **values)

    def flush(self) -> None:
        """Has the rows since the last flush written; on object stores, which write the whole file anew, only now and then.

        This waits for that no longer than the time of a blink.
        """
        if self._directory.is_local or time.monotonic() - self._flushed >= REMOTE_EVERY:
            self._flush(BRIEF)

    def close(self) -> None:
        """Has all rows written, and waits until they are, as long as storage is waited for."""
        self._flush(max(BRIEF, self._patience))

    def _flush(self, limit: float) -> None:
        end, begun = time.monotonic() + limit, False
        while self._writing is not None or (not begun and (self._rows or self._back is not None)):
            if self._writing is None:
                self._writing, self._flushed, begun = run_in_thread(self._write), time.monotonic(), True
            if wait([self._writing], max(0.0, end - time.monotonic())).not_done:
                self.problem = pending_problem()
                return
            self._writing.result()
            self._writing = None

    def _write(self) -> None:
        """Writes the rows that there are. What can't be written waits for the next time."""
        with self._lock:
            rows, self._rows, back, self._back = self._rows, [], self._back, None
        try:
            self._go_back(back)
            if rows:
                self._directory.append(METRICS, ("\n".join(rows) + "\n").encode())
        except StorageError as error:
            with self._lock:  # the run may have gone back meanwhile
                waiting = rows if self._back is None else [row for row in rows if _stays(row, self._back)]
                self._rows, self._back = waiting + self._rows, _earlier(back, self._back)
            self.problem = f"{METRICS} can't be written: {error}"
        else:
            self.problem = ""

    def _go_back(self, version: int | None) -> None:
        if version is not None and self._directory.exists(METRICS):
            rows = self._directory.read(METRICS).splitlines(keepends=True)
            self._directory.write(METRICS, b"".join(row for row in rows if _stays(row, version)))

    def _row(self, kind: str, **values: Any) -> None:
        row = json.dumps(_writable({"kind": kind, **values}), allow_nan=False)
        with self._lock:
            self._rows.append(row)


def _by_head(values: Mapping[int, float]) -> dict[str, float]:
    return {str(head): value for head, value in values.items()}


def _writable(value: Any) -> Any:
    """As JSON has it, without NaN and infinity, which are written as null, and without credentials, which errors may quote."""
    if isinstance(value, dict):
        return {name: _writable(inner) for name, inner in value.items()}
    if isinstance(value, str):
        return redact(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _earlier(one: int | None, other: int | None) -> int | None:
    """The earlier of two versions, of which there may be none."""
    return min((version for version in (one, other) if version is not None), default=None)


def _stays(row: str | bytes, version: int) -> bool:
    """Whether a row is an event, or of this version or an earlier one; one that is torn, or no JSON in UTF-8, is neither."""
    try:
        content = json.loads(row if isinstance(row, str) else row.decode())
        return content.get("kind") == "event" or float(content["version"]) <= version
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def samples_per_second(merges: list[MergeRecord], window: int = 10) -> float | None:
    """Samples per second over the last `window` merges, None before two."""
    recent = merges[-(window + 1) :]
    if len(recent) < 2 or recent[-1].at <= recent[0].at:
        return None
    return sum(r.samples for r in recent[1:]) / (recent[-1].at - recent[0].at)

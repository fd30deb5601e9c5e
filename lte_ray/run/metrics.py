"""What a run reports while it runs: `Progress` for displays, and the rows of ``metrics.jsonl``."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, Protocol

from lte_ray.errors import StorageError
from lte_ray.messages import HeadStatus, MergeRecord
from lte_ray.redaction import redact
from lte_ray.run.metrics_files import METRICS, MetricsWriter
from lte_ray.storage import RunDirectory, pending_problem, run_in_thread

log = logging.getLogger("lte_ray")

Row = dict[str, Any]
"""A row of ``metrics.jsonl``: plain values that JSON has, with the kind ("merge", "evaluation" or "event") under "kind"."""

REMOTE_INTERVAL = 20.0
"""Seconds between two writes of the metrics to an object store, which write up to a whole segment."""

RATE_WINDOW = 10
"""Merges over which rates are taken."""

KIND_BYTES = 40
"""Bytes at the begin of a row that tell its kind."""

MAX_WRITE_WAIT = 0.5
"""Seconds that the run waits for its metrics to be written before it continues."""


@dataclass(frozen=True)
class Evaluation:
    """The worker's evaluation of one base version."""

    version: int
    step: int
    values: dict[str, float]


@dataclass(frozen=True)
class Progress:
    """A run at one moment. Times are in seconds. Rates cover the last rounds, and are None before the first.

    With `baseline` it is ordinary training, whose one process is listed as a head.
    """

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
    baseline: bool = False
    stalled: str = ""
    """What the run waits for, if nothing has moved for long; warnings say the same."""

    @classmethod
    def starting(cls, run: str, steps: int, note: str, baseline: bool = False, position: tuple[int, int] = (0, 0)) -> Progress:
        """A run without heads yet. `position` is the step and the version that it starts from."""
        return cls(run, position[0], steps, 0, None, position[1], (), None, 0.0, None, None, note, baseline)

    @property
    def train_loss(self) -> float:
        """Mean of the heads' last losses, or NaN before the first."""
        losses = [h.loss for h in self.heads if math.isfinite(h.loss)]
        return sum(losses) / len(losses) if losses else math.nan


class Reporter(Protocol):
    """Shows progress to people. It is called a few times per second during the run, and once at its end."""

    def update(self, progress: Progress) -> None: ...

    def close(self) -> None: ...


class SilentReporter:
    """A reporter that shows nothing."""

    def update(self, progress: Progress) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """The rows of ``metrics.jsonl``: one for each merge (kind "merge"), evaluation and event.

    Another thread writes them, so adding rows never waits long for storage, even if it hangs.

    Attributes:
        listeners: called with each row as it is added, in the thread that adds it. They must neither wait nor change the row.
            One that raises is warned of and removed: the run goes on. A rewind removes rows without telling them; the run then
            adds rows of the same versions again.
        problem: why the rows can't be written; empty if they can.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = dataclasses.replace(directory, patience=0.0)  # the next flush tries again
        self._files = MetricsWriter(self._directory)
        self._patience = directory.patience
        self._rows: list[str] = []
        self._lock = threading.Lock()  # guards the rows; never held while storage is used
        self._writing: Future[None] | None = None
        self._flushed = time.monotonic()
        self._rewind_to: int | None = None  # the version after which rows must still be removed from the file
        self.problem = ""
        self.listeners: list[Callable[[Row], None]] = []

    def rewind(self, version: int) -> None:
        """Drops the rows after `version`, which a resumed run writes again. The file follows as soon as storage allows."""
        with self._lock:
            self._rows = [row for row in self._rows if _survives(row, version)]
            self._rewind_to = _earlier_version(self._rewind_to, version)
        self._flush(MAX_WRITE_WAIT)

    def record_merge(self, record: MergeRecord, before: Sequence[MergeRecord] = ()) -> None:
        """Adds the row of a merge. `before` are the merges before it, in order, from which rates are taken."""
        self._add_row(
            "merge",
            at=record.at,
            version=record.version,
            step=record.step,
            steps=record.steps,
            samples=record.samples,
            heads=list(record.heads),
            train_loss=_by_head(record.losses),
            **({"figures": {name: _by_head(values) for name, values in record.figures.items()}} if record.figures else {}),
            **throughput([*before[-RATE_WINDOW:], record]),
            **_measures(record),
            merge_seconds=record.merge_seconds,
            bytes_up=record.bytes_up,
            bytes_down=record.bytes_down,
            base_error=record.base_error,
            lag=_by_head(record.lags),
            head_steps=_by_head(record.head_steps),
            weight=_by_head(record.weights),
            **({"change_norm": _by_head(record.norms)} if record.norms else {}),
            **({"change_alignment": _by_head(record.alignment)} if record.alignment else {}),
            **({} if record.effective_rank is None else {"effective_rank": record.effective_rank}),
            **({} if record.outer_step is None else {"outer_step": dataclasses.asdict(record.outer_step)}),
            **({} if record.ema_keep is None else {"ema_keep": record.ema_keep}),
            stall_seconds=_by_head(record.stalls),
            bytes_instead=record.alternative_bytes,
            held={str(head): dataclasses.asdict(held) for head, held in record.positions.items()},
        )

    def record_evaluation(self, evaluation: Evaluation) -> None:
        self._add_row("evaluation", at=time.time(), version=evaluation.version, step=evaluation.step, values=evaluation.values)

    def record_event(self, name: str, **values: Any) -> None:
        """Adds the row of an event: a process that failed, one that was restarted, ..."""
        self._add_row("event", at=time.time(), event=name, **values)

    def flush(self) -> None:
        """Writes the rows since the last flush, on object stores only at intervals. Waits at most `MAX_WRITE_WAIT` for that."""
        if self._directory.is_local or time.monotonic() - self._flushed >= REMOTE_INTERVAL:
            self._flush(MAX_WRITE_WAIT)

    def close(self) -> None:
        """Writes all rows, and waits for that as long as storage operations are retried."""
        self._flush(max(MAX_WRITE_WAIT, self._patience))

    def _flush(self, limit: float) -> None:
        end, started = time.monotonic() + limit, False
        while self._writing is not None or (not started and (self._rows or self._rewind_to is not None)):
            if self._writing is None:
                self._writing, self._flushed, started = run_in_thread(self._write), time.monotonic(), True
            if wait([self._writing], max(0.0, end - time.monotonic())).not_done:
                self.problem = pending_problem()
                return
            self._writing.result()
            self._writing = None

    def _write(self) -> None:
        """Writes the pending rows. Those that can't be written stay pending."""
        with self._lock:
            rows, self._rows, version, self._rewind_to = self._rows, [], self._rewind_to, None
        try:
            if version is not None:
                self._files.remove(lambda row: _survives(row, version), lambda row: b'"merge"' in row[:KIND_BYTES])
            if rows:
                self._files.append(("\n".join(rows) + "\n").encode())
        except StorageError as error:
            with self._lock:  # the run may have been rewound in the meantime
                pending = rows if self._rewind_to is None else [row for row in rows if _survives(row, self._rewind_to)]
                self._rows, self._rewind_to = pending + self._rows, _earlier_version(version, self._rewind_to)
            self.problem = f"{METRICS} can't be written: {error}"
        else:
            self.problem = ""

    def _add_row(self, kind: str, **values: Any) -> None:
        row: Row = _sanitize({"kind": kind, **values})
        text = json.dumps(row, allow_nan=False)
        with self._lock:
            self._rows.append(text)
        for listener in list(self.listeners):
            try:
                listener(row)
            except Exception as error:
                self.listeners.remove(listener)
                log.warning("A listener of the metrics gets no more rows: %s: %s.", type(error).__name__, error)


def _by_head(values: Mapping[int, float]) -> dict[str, float]:
    return {str(head): value for head, value in values.items()}


def _measures(record: MergeRecord) -> dict[str, Any]:
    """What the heads have measured: by name, what each head has of it; learning rates also by parameter group."""
    rates: dict[str, dict[int, float]] = {}
    for head, measures in record.measures.items():
        for group, rate in measures.lr.items():
            rates.setdefault(group, {})[head] = rate
    rows: dict[str, Any] = {"lr": {group: _by_head(values) for group, values in rates.items()}} if rates else {}
    for name in ("gradient_norm", "gpu_memory", "memory"):
        values = {head: getattr(measures, name) for head, measures in record.measures.items()}
        values = {head: value for head, value in values.items() if value}
        if values:
            rows[name] = _by_head(values)
    return rows


def _sanitize(value: Any) -> Any:
    """Replaces NaN and infinity by None, which JSON has, and removes credentials, which error texts may quote."""
    if isinstance(value, dict):
        return {name: _sanitize(inner) for name, inner in value.items()}
    if isinstance(value, str):
        return redact(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _earlier_version(one: int | None, other: int | None) -> int | None:
    """The earlier of two versions; None stands for no version."""
    return min((version for version in (one, other) if version is not None), default=None)


def _survives(row: str | bytes, version: int) -> bool:
    """Whether a row stays after a rewind: an event, or a row up to this version. A torn row, or one that isn't JSON, goes."""
    try:
        content = json.loads(row if isinstance(row, str) else row.decode())
        return content.get("kind") == "event" or float(content["version"]) <= version
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def latest_figures(merges: Sequence[MergeRecord]) -> dict[str, float]:
    """The worker's figures after these merges: by name, the mean of each head's newest value."""
    latest: dict[str, dict[int, float]] = {}
    for merge in merges:
        for name, values in merge.figures.items():
            latest.setdefault(name, {}).update(values)
    return {name: sum(values.values()) / len(values) for name, values in latest.items()}


def throughput(merges: Sequence[MergeRecord]) -> dict[str, float]:
    """Rates of all heads together over the last `RATE_WINDOW` merges; empty before the second merge.

    Returns:
        samples_per_second; tokens_per_second, if the tokens are known; and mfu, if the worker gives the operations of a sample
        and the GPUs are known: operations per second divided by the most that these GPUs are capable of.
    """
    recent = merges[-(RATE_WINDOW + 1) :]
    if len(recent) < 2 or recent[-1].at <= recent[0].at:
        return {}
    seconds = recent[-1].at - recent[0].at
    rates = {"samples_per_second": sum(record.samples for record in recent[1:]) / seconds}
    heads = [measures for record in recent[1:] for measures in record.measures.values()]
    tokens, flops = [each.tokens for each in heads], [each.flops for each in heads]
    peaks = {gpu: peak for each in heads for gpu, peak in each.peaks.items()}
    if heads and None not in tokens:
        rates["tokens_per_second"] = sum(each or 0 for each in tokens) / seconds
    if heads and None not in flops and all(each.peaks for each in heads):
        rates["mfu"] = sum(each or 0.0 for each in flops) / seconds / sum(peaks.values())
    return rates


def samples_per_second(merges: Sequence[MergeRecord]) -> float | None:
    """Samples per second over the last `RATE_WINDOW` merges, or None before the second merge."""
    return throughput(merges).get("samples_per_second")

"""Sinks while a run goes on: each works in a thread of its own, so that a slow or dead server never delays the run."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from lte_ray.redaction import redact
from lte_ray.run.metrics import MetricsLog
from lte_ray.run.metrics_files import METRICS
from lte_ray.run.sinks.figures import RowNaming
from lte_ray.run.sinks.folder import SinkFolder
from lte_ray.run.sinks.protocol import LogRow, RunInfo, Sink, Status
from lte_ray.storage import RunDirectory

log = logging.getLogger("lte_ray")

MAX_QUEUED = 10_000
"""Rows that wait for a sink, at most. Further ones are left out."""

FINISH_LIMIT = 30.0
"""Seconds that a finished run waits for all its sinks together."""

EARLY_LIMIT = 2.0
"""Seconds that a run which ends early waits for them: `ray job stop` gives its driver little time."""

IDLE = 5.0
"""Seconds without a row after which a sink's files are looked at, whether they must be copied."""

Report = Callable[[str, str], None]
"""Called with the name of a sink and a sentence that says what is wrong with it."""


class _SinkThread:
    """One sink, its queue and its thread."""

    def __init__(self, name: str, sink: Sink, run: RunInfo, folder: SinkFolder, report: Report) -> None:
        self.name, self._sink, self._folder = name, sink, folder
        self._run = dataclasses.replace(run, folder=folder.path)
        self._report, self._reported, self._missed = report, False, 0
        self._queue: queue.Queue[LogRow | None] = queue.Queue(MAX_QUEUED)  # None only wakes the thread
        self._status: Status | None = None  # how the run ended, once it has
        self._ended = False  # the run waits no longer: what fails from now on can't be told
        self._thread = threading.Thread(target=self._work, name=f"sink-{name}", daemon=True)
        self._thread.start()

    def put(self, row: LogRow) -> None:
        """Gives the sink a row, or leaves it out if too many wait."""
        try:
            self._queue.put_nowait(row)
        except queue.Full:
            self._miss(f"is so slow that {MAX_QUEUED:,} rows wait for it. It doesn't get further ones.")

    def finish(self, status: Status) -> None:
        """Has the sink close once it has all rows."""
        self._status = status
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)

    def wait(self, end: float) -> str:
        """Waits for the thread until `end` (monotonic). Returns what the sink has missed, as a sentence, or ''."""
        self._thread.join(max(0.0, end - time.monotonic()))
        self._ended = True
        if self._thread.is_alive():
            return f"The sink {self.name} didn't finish in time: it may lack the last rows. {METRICS} has all."
        return (
            f"The sink {self.name} lacks rows: it failed {self._missed} times. {METRICS} has all." if self._missed > 1 else ""
        )

    def _work(self) -> None:
        try:
            self._folder.open()
            self._sink.open(self._run)
        except BaseException as error:  # a library may even raise SystemExit
            self._fail("couldn't be opened and gets no rows", error)
            for _ in self._rows():
                pass
        else:
            for row in self._rows():
                if row is not None:
                    self._attempt(self._sink.row, row)
                self._attempt(self._folder.copy)
            self._attempt(self._sink.close, self._status)
        self._attempt(self._folder.close)

    def _rows(self) -> Iterator[LogRow | None]:
        """Yields rows until the run has ended and none is left, and None from time to time."""
        while self._status is None or not self._queue.empty():
            try:
                yield self._queue.get(timeout=IDLE)
            except queue.Empty:
                yield None

    def _attempt(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except BaseException as error:
            self._fail("failed and lacks what it was given then", error)

    def _fail(self, what: str, error: BaseException) -> None:
        first = next(iter(str(error).strip().splitlines()), "").rstrip(".")
        self._miss(f"{what}; the run goes on. {type(error).__name__}{': ' * bool(first)}{first}.")

    def _miss(self, what: str) -> None:
        self._missed += 1
        if not self._reported and not self._ended:
            self._reported = True
            self._report(self.name, f"The sink {self.name} {what}")


class SinkThreads:
    """The sinks of one run.

    Args:
        sinks: by name.
        directory: of the run.
        run: what the sinks are told; each gets a folder of its own in addition.
        earlier: rows of ``metrics.jsonl`` up to the version that a resumed run starts from.
    """

    def __init__(
        self, sinks: Mapping[str, Sink], directory: RunDirectory, run: RunInfo, earlier: Iterable[Mapping[str, Any]] = ()
    ) -> None:
        self._sinks, self._directory, self._run = sinks, directory, run
        self._naming = RowNaming(earlier)
        self._lock = threading.RLock()  # events come from other threads, and from here: what is wrong with a sink
        self._threads: list[_SinkThread] = []

    @contextlib.contextmanager
    def follow(self, metrics: MetricsLog) -> Iterator[None]:
        """Gives the sinks the rows that the block adds to `metrics`, then waits for them for a limited time.

        What is wrong with a sink becomes a warning and an event ``sink``, once for each sink.
        """

        def report(name: str, why: str) -> None:
            why = redact(why)
            log.warning("%s", why)
            metrics.record_event("sink", sink=name, why=why[:500])

        for name, sink in self._sinks.items():
            folder = SinkFolder(self._directory, name)
            self._threads.append(_SinkThread(name, sink, self._run, folder, report))
        metrics.listeners.append(self._add)
        status: Status = "failed"
        try:
            yield
            status = "finished"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            with contextlib.suppress(ValueError):  # it was removed since it raised
                metrics.listeners.remove(self._add)
            self._close(status, report)
            metrics.close()  # what has been reported last

    def _add(self, row: Mapping[str, Any]) -> None:
        with self._lock:
            for each in self._naming.name(row):
                for thread in self._threads:
                    thread.put(copy.deepcopy(each))  # a sink may change its row

    def _close(self, status: Status, report: Report) -> None:
        end = time.monotonic() + (FINISH_LIMIT if status == "finished" else EARLY_LIMIT)
        for thread in self._threads:
            thread.finish(status)
        for thread in self._threads:
            missed = thread.wait(end)
            if missed:
                report(thread.name, missed)

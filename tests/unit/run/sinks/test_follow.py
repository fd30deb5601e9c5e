"""Sinks while a run goes on: slow ones, those that fail, and how they end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lte_ray.run.history import read_rows
from lte_ray.run.metrics import Evaluation, MetricsLog
from lte_ray.run.sinks import LogRow, RunInfo, SinkThreads, follow
from lte_ray.storage import RunDirectory


class Recorder:
    """A sink that keeps what it is told."""

    def __init__(self, on_row: Callable[[LogRow], object] = lambda row: None) -> None:
        self.run: RunInfo | None = None
        self.rows: list[LogRow] = []
        self.status = ""
        self._on_row = on_row

    def open(self, run: RunInfo) -> None:
        self.run = run

    def row(self, row: LogRow) -> None:
        self._on_row(row)
        self.rows.append(row)

    def close(self, status: str) -> None:
        self.status = status


class Closed(Recorder):
    """A sink that can't be opened."""

    def open(self, run: RunInfo) -> None:
        raise ConnectionError("no server at http://me:SECRET@host.")


def fail(row: LogRow) -> None:
    """Takes no row."""
    raise ValueError("no room\nsecond line")


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    """Of a run without rows."""
    directory = RunDirectory.open(str(tmp_path), "r")
    directory.create()
    return directory


def threads(directory: RunDirectory, **sinks: Any) -> SinkThreads:
    """The sinks of a run."""
    return SinkThreads(sinks, directory, RunInfo("r", "ab12", directory.display))


def problems(directory: RunDirectory) -> list[tuple[str, str]]:
    """The events `sink` of metrics.jsonl."""
    return [(row["sink"], row["why"]) for row in read_rows(directory) if row["kind"] == "event" and row["event"] == "sink"]


def test_a_sink_gets_every_row_in_order_and_how_the_run_ended(directory: RunDirectory) -> None:
    """Also its own folder, which is removed if it stays empty."""
    one, two, log = Recorder(), Recorder(), MetricsLog(directory)
    two._on_row = lambda row: (two.run.folder / "figures").touch()  # type: ignore[union-attr]
    with threads(directory, one=one, two=two).follow(log):
        for version in range(3):
            log.record_evaluation(Evaluation(version, 10 * version, {"loss": 1.0}))
        log.record_event("still", why="s3://KEY:SECRET@bucket/x")
    assert [(row.kind, row.version) for row in one.rows] == [
        ("evaluation", 0),
        ("evaluation", 1),
        ("evaluation", 2),
        ("event", 0),
    ]
    assert one.rows[3].text == "still why=s3://bucket/x"
    assert one.rows == two.rows
    assert one.status == two.status == "finished"
    assert two.run is not None
    assert (two.run.name, two.run.id, two.run.folder) == ("r", "ab12", Path(directory.path) / "two")
    assert directory.list_names() == ["metrics.jsonl", "two"]
    assert log.listeners == []


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "interrupted"), (RuntimeError, "failed")])
def test_a_sink_learns_that_the_run_ended_early(directory: RunDirectory, error: type[BaseException], status: str) -> None:
    """The error goes on to the caller."""
    sink = Recorder()
    with pytest.raises(error), threads(directory, sink=sink).follow(MetricsLog(directory)):
        raise error
    assert sink.status == status


def test_a_sink_that_fails_is_reported_once_and_gets_the_next_row(
    directory: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning and an event; others get all rows, and the end says how often it failed."""
    bad, good, log = Recorder(fail), Recorder(), MetricsLog(directory)
    with threads(directory, bad=bad, good=good).follow(log):
        log.record_event("one")
        log.record_event("two")
    said = "The sink bad failed and lacks what it was given then; the run goes on. ValueError: no room."
    assert said in [record.getMessage() for record in caplog.records]
    first, last = problems(directory)
    assert first == ("bad", said)
    assert last[1].startswith("The sink bad lacks rows: it failed ")
    assert [row.text for row in good.rows if "sink" not in row.text] == ["one", "two"]
    assert bad.status == "finished"


def test_a_sink_that_cannot_be_opened_gets_nothing(directory: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    """The message shows no credentials."""
    sink, log = Closed(), MetricsLog(directory)
    with threads(directory, sink=sink).follow(log):
        log.record_event("one")
    assert problems(directory) == [
        (
            "sink",
            "The sink sink couldn't be opened and gets no rows; the run goes on. ConnectionError: no server at http://host.",
        )
    ]
    assert (sink.rows, sink.status) == ([], "")
    assert "SECRET" not in caplog.text


def test_a_sink_that_hangs_delays_neither_the_run_nor_its_end(directory: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows beyond the bound are left out, and the end waits for a limited time."""
    monkeypatch.setattr(follow, "MAX_QUEUED", 3)
    monkeypatch.setattr(follow, "FINISH_LIMIT", 0.01)
    go_on, log = threading.Event(), MetricsLog(directory)
    sink = Recorder(lambda row: go_on.wait(60))
    with threads(directory, sink=sink).follow(log):
        for number in range(9):
            log.record_event(f"event {number}")
    go_on.set()
    assert [why for _, why in problems(directory)] == [
        "The sink sink is so slow that 3 rows wait for it. It doesn't get further ones.",
        "The sink sink didn't finish in time: it may lack the last rows. metrics.jsonl has all.",
    ]


def test_files_of_a_sink_reach_storage_that_is_no_local_disk() -> None:
    """Its folder is a temporary one. A resumed run has what an earlier start has left."""
    directory = RunDirectory.open("memory://sinks", "r")
    directory.delete()
    directory.create()
    directory.write("sink/inner/old", b"1")
    sink = Recorder()
    folders = []

    def write(row: LogRow) -> None:
        assert sink.run is not None
        folders.append(sink.run.folder)
        assert (sink.run.folder / "inner" / "old").read_bytes() == b"1"
        (sink.run.folder / "inner" / "new").write_bytes(b"2")

    sink._on_row = write
    log = MetricsLog(directory)
    with threads(directory, sink=sink).follow(log):
        log.record_event("one")
    assert directory.read("sink/inner/new") == b"2"
    assert len(folders) == 1
    assert not folders[0].exists()
    assert problems(directory) == []

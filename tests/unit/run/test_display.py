"""Displays of a run, and its metrics file."""

from __future__ import annotations

import io
import json
import logging
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from lte_ray.errors import StorageError
from lte_ray.messages import HeadStatus, MergeRecord
from lte_ray.run import display, metrics
from lte_ray.run.display import (
    LineDisplay,
    LiveDisplay,
    automatic_display,
    format_bytes,
    format_duration,
    format_line,
    make_table,
)
from lte_ray.run.metrics import Evaluation, MetricsLog, Progress, samples_per_second
from lte_ray.run.metrics_files import METRICS
from lte_ray.storage import RunDirectory

HEADS = (HeadStatus(0, step=20, samples=320, loss=2.5, version=2, state="waiting"), HeadStatus(1, step=18, state="training"))
NOW = Progress(
    run="gpt",
    step=18,
    steps=100,
    samples=600,
    samples_per_second=1234.5,
    version=2,
    heads=HEADS,
    evaluation=Evaluation(2, 20, {"bits_per_byte": 2.71828}),
    seconds=75.0,
    remaining=3725.0,
    checkpoint=1,
)


def shown(renderable: object) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_a_line_shows_the_progress() -> None:
    """Steps, base version, rate, losses of the heads, evaluation and remaining time."""
    assert format_line(NOW) == (
        "step 18/100  base v2  1,234.5 samples/s  train loss 2.5000  bits_per_byte 2.718 (v2)  1:02:05 left"
    )


def test_a_run_that_has_not_started_is_shown_without_figures() -> None:
    """No rate, loss or remaining time is shown before it is known."""
    start = Progress.starting("gpt", 100, "starting Ray")
    assert format_line(start) == "step 0/100  base v0  starting Ray"
    assert "nan" not in shown(make_table(start)).lower()
    assert "starting Ray" in shown(make_table(start))


def test_the_table_has_a_row_for_every_head() -> None:
    """Number, step, samples, loss, base version, state and device; a dash for a missing loss."""
    rows = [row.split() for row in shown(make_table(NOW)).splitlines()]
    assert ["0", "20", "320", "2.5000", "v2", "waiting", "cpu"] in rows
    assert ["1", "18", "0", "-", "v0", "training", "cpu"] in rows
    assert "bits_per_byte 2.718 (v2)" in shown(make_table(NOW))
    assert "checkpoint v1" in shown(make_table(NOW))


def test_the_baseline_is_shown_as_such() -> None:
    """One process that trains weights, not one head of several with a base."""
    baseline = replace(NOW, heads=HEADS[:1], baseline=True)
    assert format_line(baseline).startswith("baseline  step 18/100  weights v2  ")
    table = shown(make_table(baseline))
    assert "gpt (baseline: ordinary training)" in table
    assert "process" in table
    assert "head" not in table
    assert "base " not in table
    start = Progress.starting("gpt", 100, "starting Ray", baseline=True)
    assert format_line(start) == "baseline  step 0/100  weights v0  starting Ray"


def test_lines_are_for_logs_and_the_table_for_terminals() -> None:
    """A stream that isn't a terminal gets lines: one at once, and one for every new evaluation."""
    stream = io.StringIO()
    lines = automatic_display(stream)
    assert isinstance(lines, LineDisplay)
    lines.update(NOW)
    lines.update(NOW)
    lines.update(replace(NOW, evaluation=Evaluation(3, 30, {"bits_per_byte": 2.5})))
    lines.close()
    assert [row.split("bits_per_byte ")[1].split()[0] for row in stream.getvalue().splitlines()] == ["2.718", "2.5"]
    assert re.match(r"\d\d:\d\d:\d\d  step 18/100  ", stream.getvalue())
    terminal = LiveDisplay(Console(file=io.StringIO(), force_terminal=True, width=120))
    terminal.update(NOW)
    terminal.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The display's clock, which tests set."""
    now = [1000.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    return now


def test_a_line_comes_when_something_has_changed(clock: list[float]) -> None:
    """Not for rates and remaining time alone, nor for seconds in a note; at long intervals it comes anyway."""
    stream = io.StringIO()
    lines = automatic_display(stream)
    same = replace(NOW, remaining=3.0, samples_per_second=1.0, note="no coordinator for 7 s", stalled="nothing has moved")
    waits = replace(NOW, note="no coordinator for 2 s")
    for shown, seconds, count in [
        (NOW, 0, 1),
        (replace(NOW, remaining=9.0, stalled="nothing has moved"), 60, 1),
        (waits, 5, 2),
        (same, 200, 2),
        (same, display.UNCHANGED_INTERVAL, 3),
        (replace(same, step=19), 1, 3),
        (replace(same, step=19), 5, 4),
    ]:
        clock[0] += seconds
        lines.update(shown)
        assert len(stream.getvalue().splitlines()) == count
    lines.close()


def test_warnings_in_a_log_have_the_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Unless the program has set up logging of its own; afterwards all is as before."""
    log = logging.getLogger("lte_ray")
    lines = automatic_display(io.StringIO())
    assert not log.handlers  # pytest has handlers
    lines.close()
    monkeypatch.setattr(log, "propagate", False)
    lines = automatic_display(io.StringIO())
    log.warning("head 1 waits")
    lines.close()
    assert re.fullmatch(r"\d\d:\d\d:\d\d  head 1 waits\n", capsys.readouterr().err)
    assert not log.handlers


def test_the_table_shows_why_a_run_stalls() -> None:
    """Unless there is another note. A line doesn't: a warning has said it."""
    stalled = replace(NOW, stalled="nothing has moved for 30 s")
    assert "nothing has moved for 30 s" in shown(make_table(stalled))
    assert format_line(stalled) == format_line(NOW)


def test_a_resumed_run_starts_where_it_was() -> None:
    """Step and version are known before the heads are."""
    start = Progress.starting("gpt", 100, "connecting to Ray", position=(40, 8))
    assert format_line(start) == "step 40/100  base v8  connecting to Ray"


def test_durations_have_minutes_and_hours() -> None:
    """0:09, 2:03 and 1:02:03."""
    assert [format_duration(9.9), format_duration(123), format_duration(3723)] == ["0:09", "2:03", "1:02:03"]


def record(version: int, at: float) -> MergeRecord:
    return MergeRecord(version, at, (0, 1), 20, 640, {0: 1.0, 1: 2.0}, 100, 200, step=10 * version)


def test_throughput_is_samples_over_the_time_between_merges() -> None:
    """Over the last merges; None before the second merge."""
    assert samples_per_second([record(1, 10.0)]) is None
    assert samples_per_second([record(1, 10.0), record(2, 12.0), record(3, 14.0)]) == 320.0
    assert samples_per_second([record(k, 2.0 * k) for k in range(30)]) == 320.0


@pytest.mark.parametrize("fails", [False, True])
def test_metrics_do_not_wait_for_hanging_storage_and_lose_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """Rows are added while a write hangs, and the run is rewound; finally storage fails, or works."""
    directory = RunDirectory.open(str(tmp_path), "r")
    directory.create()
    append, go_on, hangs = RunDirectory.append, threading.Event(), [True]

    def late(self: RunDirectory, name: str, data: bytes) -> None:
        if hangs:
            hangs.clear()
            assert go_on.wait(60)
            if fails:
                raise StorageError("no")
        append(self, name, data)

    monkeypatch.setattr(metrics, "MAX_WRITE_WAIT", 0.01)
    monkeypatch.setattr(RunDirectory, "append", late)
    log = MetricsLog(directory)
    for version in (1, 2, 3):
        log.record_merge(record(version, float(version)))
        log.flush()
    log.rewind(1)
    log.record_merge(record(2, 5.0))
    log.record_event("still")
    log.flush()
    assert not directory.exists(METRICS)
    go_on.set()
    log.close()
    log.close()  # the failed write is repeated
    rows = [json.loads(row) for row in directory.read(METRICS).decode().splitlines()]
    assert [(row["version"], row["at"]) for row in rows if row["kind"] == "merge"] == [(1, 1.0), (2, 5.0)]
    assert rows[-1]["event"] == "still"
    assert log.problem == ""


def test_metrics_are_appended_and_a_resumed_run_drops_what_it_repeats(tmp_path: Path) -> None:
    """One JSON row for each merge and evaluation; `rewind` keeps the rows up to a version."""
    directory = RunDirectory.open(str(tmp_path), "r")
    directory.create()
    log = MetricsLog(directory)
    for version in (1, 2, 3):
        log.record_merge(record(version, float(version)))
        log.record_evaluation(Evaluation(version, 10 * version, {"loss": 1.0 / version}))
        log.flush()
    log.flush()
    directory.append(METRICS, b'{"kind": "merge", "vers')  # a process died in the middle of a row
    MetricsLog(directory).rewind(2)
    rows = [json.loads(row) for row in directory.read(METRICS).decode().splitlines()]
    assert [(row["kind"], row["version"]) for row in rows] == [
        ("merge", 1),
        ("evaluation", 1),
        ("merge", 2),
        ("evaluation", 2),
    ]
    assert rows[0]["train_loss"] == {"0": 1.0, "1": 2.0}


def test_damaged_rows_are_dropped_and_the_others_stay_byte_for_byte(tmp_path: Path) -> None:
    """Bytes that aren't UTF-8 or JSON aren't rows, anywhere in the file; good rows keep their white space."""
    directory = RunDirectory.open(str(tmp_path), "r")
    good = [b'{"kind":"merge",  "version": 1}\n', '{"kind": "event", "event": "déjà vu\\u2028"}\r\n'.encode()]
    bad = [b"\xff\xfe garbage\n", '{"kind": "event"}'.encode("utf-16") + b"\n", b"[" * 100_000 + b"\n"]
    directory.write(METRICS, good[0] + b"".join(bad) + good[1] + bad[0])
    log = MetricsLog(directory)
    log.rewind(2)
    log.record_merge(record(2, 2.0))
    log.close()
    assert log.problem == ""
    assert directory.read(METRICS).startswith(b"".join(good) + b'{"kind": "merge", "at": 2.0')


def test_bytes_are_shown_in_their_unit() -> None:
    """Three digits, in powers of 1000."""
    assert [format_bytes(n) for n in (0, 999, 1000, 12_345_678, 4.2e9, 5e15)] == [
        "0 B",
        "999 B",
        "1 kB",
        "12.3 MB",
        "4.2 GB",
        "5,000.0 TB",
    ]


def test_many_heads_are_summarized() -> None:
    """For more than eight heads, a line has the mean loss and its range, and the table one row for the rest."""
    many = replace(NOW, heads=tuple(HeadStatus(n, step=30 + n, samples=100, loss=1.0 + n / 10) for n in range(12)))
    assert "train loss 1.5500 (1.0000-2.1000)" in format_line(many)
    shown = Console(file=io.StringIO(), width=120)
    shown.print(make_table(many))
    rows = shown.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert any(row.split()[:4] == ["+4", "38", "400", "1.9500"] for row in rows)
    assert not any(row.split()[:1] == ["8"] for row in rows)

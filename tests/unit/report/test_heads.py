"""The time of a run, and how its heads have spent it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lte_ray.report.clock import RunClock
from lte_ray.report.columns import RunRows, read_columns
from lte_ray.report.heads import SLICES, make_timeline, total_utilisation, utilisation
from tests.support.run_folders import event_row, make_run, merge_row


def read(folder: Path, *rows: dict[str, Any]) -> RunRows:
    """The rows of a run made by hand."""
    return read_columns(make_run(folder, *rows), 2)


def places(rows: RunRows, clock: RunClock) -> tuple[Any, Any]:
    """The seconds and the start of each merge."""
    return clock.seconds(rows.merges["at"]), clock.start_of(rows.merges["at"])


def test_pauses_before_a_resume_dont_count() -> None:
    """A run of 20 s that is resumed a day later and takes 10 s more."""
    times = np.array([110.0, 120.0, 90_005.0, 90_010.0])
    clock = RunClock.make([100.0, 90_000.0], times)
    assert clock.end == 30.0
    assert clock.seconds(times).tolist() == [10.0, 20.0, 25.0, 30.0]
    assert clock.seconds(np.array([50_000.0, 99.5])).tolist() == [20.0, 0.0]
    assert clock.start_of(times).tolist() == [0, 0, 1, 1]


def test_without_starts_the_first_row_is_one() -> None:
    """Also if the environment has only a later one, or nothing at all is known."""
    assert RunClock.make([], np.array([7.0, 5.0, np.nan])).end == 2.0
    assert RunClock.make([100.0], np.array([5.0, 7.0, 103.0])).end == 5.0
    assert RunClock.make([], np.array([])).end == 0.0
    assert RunClock.make([3.0], np.array([])).end == 0.0


def test_utilisation_is_the_time_that_merging_left(tmp_path: Path) -> None:
    """Since the head's merge before in the same start; of the first one it isn't known."""
    rows = read(
        tmp_path / "r",
        merge_row(1, 110.0, stall_seconds={"0": 5.0, "1": 0.0}),
        merge_row(2, 120.0, heads=(0,), stall_seconds={"0": 2.5}),
        merge_row(3, 130.0, stall_seconds={"0": 0.0, "1": 5.0}),
        merge_row(4, 90_010.0, stall_seconds={"0": 1.0, "1": 1.0}),
    )
    clock = RunClock.make([100.0, 90_000.0], rows.merges["at"])
    share = utilisation(rows, *places(rows, clock))
    np.testing.assert_allclose(share, [np.nan, np.nan, 0.75, 1.0, 0.75, np.nan, np.nan])
    assert total_utilisation(rows, *places(rows, clock)) == pytest.approx(1 - 7.5 / 40)


def shares(timeline: dict[str, Any] | None, name: str, start: float, end: float) -> dict[str, float]:
    """The mean per cent of each kind between two parts of a row."""
    assert timeline is not None
    row = next(row for row in timeline["rows"] if row["name"] == name)
    part = slice(round(start * SLICES), round(end * SLICES))
    return {kind: float(np.mean(values[part])) for kind, values in row["shares"].items() if any(values[part])}


def test_the_timeline_shows_starting_training_waiting_and_death(tmp_path: Path) -> None:
    """In a run of 48 s: head 0 waits 6 s before the second merge; head 1 is lost from 30 s to 36 s, and dropped at 42 s."""
    rows = read(
        tmp_path / "r",
        merge_row(1, 112.0, stall_seconds={"0": 0.0, "1": 0.0}),
        merge_row(2, 124.0, stall_seconds={"0": 0.0, "1": 0.0}, merge_seconds=3.0),
        merge_row(3, 136.0, stall_seconds={"0": 6.0, "1": 0.0}),
        event_row("head_lost", 130.0, heads=[1]),
        event_row("head_restarts", 136.0, heads=[1]),
        event_row("head_dropped", 142.0, heads=[1, "x"]),
        merge_row(4, 148.0, heads=(0,), stall_seconds={"0": 0.0}),
    )
    clock = RunClock.make([100.0], rows.merges["at"])
    timeline = make_timeline(rows, clock, *places(rows, clock), rows.merges["merge/seconds"])
    assert timeline is not None
    assert timeline["end"] == 48.0
    assert shares(timeline, "head 0", 0, 0.25) == {"starting": 100}
    assert shares(timeline, "head 0", 0.25, 0.375) == {"training": 100}
    assert shares(timeline, "head 0", 0.375, 0.5) == {"waiting": 100}
    assert shares(timeline, "head 0", 0.5, 1) == {"training": 100}
    assert shares(timeline, "head 1", 0.25, 0.625) == {"training": 100}
    assert shares(timeline, "head 1", 0.625, 0.75) == {"dead": 100}
    assert shares(timeline, "head 1", 0.875, 1) == {"dead": 100}
    assert shares(timeline, "coordinator", 0.4375, 0.5) == {"merging": 100}
    assert shares(timeline, "coordinator", 0, 0.4375) == {}


def test_there_is_no_timeline_without_times(tmp_path: Path) -> None:
    """Nothing was merged, or rows don't say when."""
    empty = read(tmp_path / "empty")
    assert make_timeline(empty, RunClock.make([], np.array([])), *places(empty, RunClock.make([], np.array([]))), None) is None
    rows = read(tmp_path / "r", merge_row(1, 5.0), {**merge_row(2, 6.0), "at": None})
    clock = RunClock.make([], rows.merges["at"])
    assert make_timeline(rows, clock, *places(rows, clock), None) is None

"""The rows of metrics.jsonl, and those who listen to them."""

import json
from pathlib import Path

import pytest

from lte_ray.messages import MergeRecord
from lte_ray.run.metrics import METRICS, Evaluation, MetricsLog, latest_figures
from lte_ray.storage import RunDirectory


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    """Of a run without rows."""
    directory = RunDirectory.open(str(tmp_path), "r")
    directory.create()
    return directory


def test_listeners_get_each_row_as_the_file_has_it(directory: RunDirectory) -> None:
    """A listener gets every row once, in order, with the values that the file has."""
    log, rows = MetricsLog(directory), []
    log.listeners.append(rows.append)
    log.record_evaluation(Evaluation(1, 4, {"loss": float("nan"), "accuracy": 0.5}))
    log.record_event("restarted", head=1, why="it died")
    log.close()
    assert rows == [json.loads(line) for line in directory.read(METRICS).splitlines()]
    assert rows[0]["values"] == {"loss": None, "accuracy": 0.5}


def test_a_listener_that_raises_is_removed(directory: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    """One warning; the others and the file still get all rows."""

    def fail(row: object) -> None:
        raise ValueError("no room")

    log, rows = MetricsLog(directory), []
    log.listeners += [fail, rows.append]
    log.record_event("one")
    log.record_event("two")
    log.close()
    assert [row["event"] for row in rows] == ["one", "two"]
    assert [record.getMessage() for record in caplog.records] == [
        "A listener of the metrics gets no more rows: ValueError: no room."
    ]
    assert len(directory.read(METRICS).splitlines()) == 2


def test_the_latest_figures_are_means_of_each_heads_newest_values() -> None:
    """A head that isn't in the last merge counts with its merge before; a figure that few heads have is their mean."""
    merges = [
        MergeRecord(1, 1.0, (0, 1), 2, 2, {}, 0, 0, 1, figures={"hits": {0: 0.1, 1: 0.5}, "once": {1: 7.0}}),
        MergeRecord(2, 2.0, (0,), 1, 1, {}, 0, 0, 2, figures={"hits": {0: 0.3}}),
    ]
    assert latest_figures(merges) == {"hits": pytest.approx(0.4), "once": 7.0}
    assert latest_figures([]) == {}

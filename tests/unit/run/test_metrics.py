"""The rows of metrics.jsonl, and those who listen to them."""

import dataclasses
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from lte_ray.messages import Measures, MergeRecord
from lte_ray.run.metrics import Evaluation, MetricsLog, latest_figures, throughput
from lte_ray.run.metrics_files import METRICS
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


def measured(version: int, at: float, heads: tuple[int, ...] = (0, 1), **measures: object) -> MergeRecord:
    """A merge of 100 samples."""
    each = {head: Measures(**measures) for head in heads}  # type: ignore[arg-type]
    return MergeRecord(version, at, heads, 4, 100, {}, 0, 0, 2, measures=each)


def test_rates_are_of_all_heads_over_the_last_merges() -> None:
    """Samples, tokens and MFU per second; two heads on one GPU share its peak."""
    merges = [measured(n, 2.0 * n, tokens=500, flops=1e6, peaks={"a": 1e7}) for n in (1, 2, 3)]
    assert throughput(merges) == pytest.approx({"samples_per_second": 50, "tokens_per_second": 500, "mfu": 0.1})
    apart = [replace(m, measures={**m.measures, 1: replace(m.measures[1], peaks={"b": 3e7})}) for m in merges]
    assert throughput(apart)["mfu"] == pytest.approx(0.025)
    assert throughput(merges[:1]) == {}


@pytest.mark.parametrize("unknown", [{"tokens": None}, {"flops": None}, {"peaks": {}}])
def test_rates_that_one_head_does_not_know_are_left_out(unknown: dict[str, object]) -> None:
    """Half of a sum would be wrong."""
    known = {"tokens": 5, "flops": 1.0, "peaks": {"a": 1.0}}
    merges = [measured(1, 1.0, **known), measured(2, 2.0, **known)]
    merges[1] = replace(merges[1], measures={0: Measures(**known), 1: Measures(**known | unknown)})  # type: ignore[arg-type]
    missing = {"tokens_per_second"} if "tokens" in unknown else {"mfu"}
    assert throughput(merges).keys() == {"samples_per_second", "tokens_per_second", "mfu"} - missing


def test_rows_have_what_heads_have_measured(directory: RunDirectory) -> None:
    """By head, learning rates by group, too; without what isn't known."""
    log, rows = MetricsLog(directory), []
    log.listeners.append(rows.append)
    first = measured(1, 1.0, lr={"lora": 0.1, "replica": 0.01}, gradient_norm=math.inf, memory=1000)
    log.record_merge(first)
    log.record_merge(
        dataclasses.replace(measured(2, 2.0, gpu_memory=7), norms={1: 0.5}, alignment={1: math.nan}, effective_rank=3.0),
        [first],
    )
    assert [row.get("change_norm") for row in rows] == [None, {"1": 0.5}]
    assert [row.get("change_alignment") for row in rows] == [None, {"1": None}]
    assert [row.get("effective_rank") for row in rows] == [None, 3.0]
    assert rows[0]["lr"] == {"lora": {"0": 0.1, "1": 0.1}, "replica": {"0": 0.01, "1": 0.01}}
    assert (rows[0]["gradient_norm"], rows[0]["memory"]) == ({"0": None, "1": None}, {"0": 1000, "1": 1000})
    assert not rows[0].keys() & {"gpu_memory", "samples_per_second", "tokens_per_second", "mfu"}
    assert (rows[1]["gpu_memory"], rows[1]["samples_per_second"]) == ({"0": 7, "1": 7}, 100.0)
    assert not rows[1].keys() & {"lr", "gradient_norm", "memory"}

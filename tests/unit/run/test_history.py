"""The rows of a run, read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lte_ray
from lte_ray import checkpoint
from lte_ray.errors import StorageError
from lte_ray.run.history import best_checkpoints, read_rows
from lte_ray.run.metrics_files import METRICS
from lte_ray.storage import RunDirectory
from tests.support.sink_rows import evaluation_row, event_row, merge_row

ROWS = [evaluation_row(0, 0.1), merge_row(1, 2.0), event_row("still"), evaluation_row(1, 0.5), merge_row(2, 1.0, bytes_up=7)]


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    """Of a run with some rows, whose driver died while it wrote one."""
    directory = RunDirectory.open(str(tmp_path), "r")
    directory.write(METRICS, "".join(json.dumps(row) + "\n" for row in ROWS).encode() + b'{"kind": "mer')
    return directory


def test_metrics_are_a_table(directory: RunDirectory, tmp_path: Path) -> None:
    """A row for each merge and evaluation, with figures under the names that sinks use."""
    table = lte_ray.read_metrics(tmp_path / "r")
    assert list(table["kind"]) == ["evaluation", "merge", "evaluation", "merge"]
    assert list(table["samples"]) == [0, 100, 100, 200]
    assert list(table["train/loss"].dropna()) == [2.0, 1.0]
    assert list(table["eval/accuracy"].dropna()) == [0.1, 0.5]
    assert table["traffic/bytes_up"].iloc[3] == 7.0
    assert list(table.columns[:5]) == ["kind", "at", "version", "step", "samples"]


def test_rows_up_to_a_version_are_read(directory: RunDirectory) -> None:
    """Events always count; a torn row is left out."""
    assert read_rows(directory) == ROWS
    assert read_rows(directory, until=1) == ROWS[:-1]


def test_a_run_without_rows_is_an_empty_table(tmp_path: Path) -> None:
    """A run that doesn't exist is an error."""
    (tmp_path / "new").mkdir()
    assert len(lte_ray.read_metrics(str(tmp_path / "new"))) == 0
    with pytest.raises(StorageError, match=r"There is no run in .*missing"):
        lte_ray.read_metrics(tmp_path / "missing")


@pytest.mark.parametrize(("by", "order"), [("", [3, 1, 2]), ("loss", [3, 1, 2]), ("-loss", [2, 3, 1]), ("other", [3, 2, 1])])
def test_evaluated_checkpoints_are_listed_best_first(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch, by: str, order: list[int]
) -> None:
    """Of equal ones the newest is first; checkpoints that weren't evaluated, and versions without one, are left out."""
    monkeypatch.setattr(checkpoint, "complete_versions", lambda directory: [1, 2, 3, 4])
    rows: list[dict[str, Any]] = [
        {"kind": "evaluation", "version": version, "step": 10 * version, "values": {"loss": loss}}
        for version, loss in ((1, 0.5), (2, 0.9), (3, 0.5), (5, 0.1))
    ]
    best = best_checkpoints(directory, rows, by)
    assert [version for version, _ in best] == order
    assert dict(best)[2] == {"loss": 0.9, "version": 2, "step": 20}
    assert best_checkpoints(directory, rows[3:], by) == []

"""The sinks that write files of their own: TensorBoard and CSV."""

from __future__ import annotations

import csv
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lte_ray.run.sinks.csv import CsvSink
from lte_ray.run.sinks.tensorboard import TensorBoardSink
from tests.support.sink_rows import evaluation_row, event_row, merge_row, named, run_info


def events(folder: Path) -> Iterator[Any]:
    """The events in all files of a folder, in the order in which TensorBoard reads them."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])  # then a checksum, the event, and its checksum
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def shown(folder: Path, name: str) -> list[tuple[int, float]]:
    """The points that TensorBoard shows of a figure: a start purges those of its step and later ones."""
    points: list[tuple[int, float]] = []
    for event in events(folder):
        if event.HasField("session_log"):
            points = [point for point in points if point[0] < event.step]
        points += [(event.step, value.simple_value) for value in event.summary.value if value.tag == name]
    return points


def texts(folder: Path, name: str) -> list[str]:
    """The texts under a name."""
    values = [value for event in events(folder) for value in event.summary.value if value.tag.startswith(name)]
    return [value.tensor.string_val[0].decode() for value in values]


def test_tensorboard_has_figures_events_and_settings(tmp_path: Path) -> None:
    """Figures by step with the time of their row, events and settings as text."""
    sink, folder = TensorBoardSink(), tmp_path / "tensorboard"
    sink.open(run_info(folder))
    for row in named(merge_row(1, 2.0), evaluation_row(1, 0.5), event_row("head_restart", head=1, why="a|b")):
        sink.row(row)
    sink.close("finished")
    assert shown(folder, "train/loss") == shown(folder, "train/loss/head_1") == [(10, 2.0)]
    assert shown(folder, "eval/accuracy") == [(10, 0.5)]
    assert shown(folder, "progress/samples") == [(10, 100.0), (10, 100.0)]
    assert {event.wall_time for event in events(folder) if event.step == 10} == {1001.0, 1001.5, 1002.0}
    assert texts(folder, "events") == ["head_restart head=1 why=a|b"]
    assert "| worker.width | 3 |" in texts(folder, "settings")[0]
    assert "| versions.torch | 2 |" in texts(folder, "environment")[0]


def test_tensorboard_forgets_what_comes_again(tmp_path: Path) -> None:
    """After a rewind, and when a resumed run goes on from an earlier version."""
    folder = tmp_path / "tensorboard"
    first = TensorBoardSink()
    first.open(run_info(folder))
    for row in named(merge_row(1, 1.0), merge_row(2, 2.0), merge_row(3, 3.0), merge_row(2, 2.5), merge_row(3, 3.5)):
        first.row(row)
    first.close("failed")
    assert shown(folder, "train/loss") == [(10, 1.0), (20, 2.5), (30, 3.5)]
    second = TensorBoardSink()
    second.open(run_info(folder, resumed=True, step=10, version=1))
    for row in named(merge_row(2, 9.0), earlier=(merge_row(1),)):
        second.row(row)
    second.close("finished")
    assert shown(folder, "train/loss") == [(10, 1.0), (20, 9.0)]


def table(folder: Path) -> list[dict[str, str]]:
    """The lines of metrics.csv."""
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_has_a_line_for_each_row_and_a_column_for_each_figure(tmp_path: Path) -> None:
    """Columns that come later are empty in earlier lines; events have no line."""
    sink = CsvSink()
    sink.open(run_info(tmp_path / "csv"))
    for row in named(merge_row(1, 2.0), event_row("still"), evaluation_row(1, 0.5), merge_row(2, 1.0, merge_seconds=0.25)):
        sink.row(row)
    sink.close("finished")
    rows = table(tmp_path / "csv")
    assert [(row["kind"], row["version"], row["step"], row["samples"]) for row in rows] == [
        ("merge", "1", "10", "100"),
        ("evaluation", "1", "10", "100"),
        ("merge", "2", "20", "200"),
    ]
    assert [row["train/loss"] for row in rows] == ["2.0", "", "1.0"]
    assert [row["merge/seconds"] for row in rows] == ["", "", "0.25"]
    assert [row["eval/accuracy"] for row in rows] == ["", "0.5", ""]


@pytest.mark.parametrize("torn", ["", "7.0,merge,3,30,30"])
def test_csv_drops_what_comes_again(tmp_path: Path, torn: str) -> None:
    """After a rewind, and when a run is resumed; a line that was cut when the driver died is dropped."""
    folder = tmp_path / "csv"
    first = CsvSink()
    first.open(run_info(folder))
    for row in named(merge_row(1, 1.0), merge_row(2, 2.0), merge_row(3, 3.0), merge_row(2, 2.5)):
        first.row(row)
    assert [row["train/loss"] for row in table(folder)] == ["1.0", "2.5"]
    with (folder / "metrics.csv").open("a") as file:
        file.write(torn)
    second = CsvSink()
    second.open(run_info(folder, resumed=True, step=10, version=1))
    for row in named(merge_row(2, 9.0, merge_seconds=0.5), earlier=(merge_row(1),)):
        second.row(row)
    second.close("finished")
    assert [(row["train/loss"], row["samples"]) for row in table(folder)] == [("1.0", "100"), ("9.0", "200")]

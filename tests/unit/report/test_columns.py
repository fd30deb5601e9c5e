"""Rows as columns."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from lte_ray.report.columns import MAX_COLUMNS, RunRows, read_columns
from lte_ray.run.metrics_files import METRICS
from lte_ray.run.sinks.figures import name_figures
from tests.support.run_folders import add_rows, evaluation_row, event_row, make_run, merge_row

ODD = [
    {"x": 1},
    {"x": 2.5, "lr": {"a": {"0": 1.0, "1": 3.0}, "b": 2}},
    {"lr": {"a": {"0": None, "1": 3.0}}, "figures": {"loss": {"0": 7.0}, "new": {"1": 2.0}}},
    {"bytes_instead": {"ddp": 1, "dense": True}, "lag": {}, "weight": {"0": float("nan"), "1": 0.5}, "text": "a"},
    {"outer_step": {"lr": 0.7, "shrink": None}, "memory": {"0": 5, "x": {"y": 1}}, "train_loss": {"3": "bad"}},
    {"deep": {"a": {"b": {"0": 1.0}}}},
]


def read(folder: Path, *rows: dict[str, object], heads: int = 2) -> RunRows:
    """The rows of a run made by hand."""
    return read_columns(make_run(folder, *rows), heads)  # type: ignore[arg-type]


def test_figures_are_named_as_in_sinks(tmp_path: Path) -> None:
    """Whatever a row has: odd tables, values that are no numbers, a worker's figure called like one of the run."""
    rows = [merge_row(version, 100.0 + version, **more) for version, more in enumerate(ODD, start=1)]
    columns = read(tmp_path / "r", *rows).merges
    for index, row in enumerate(json.loads(json.dumps(rows))):
        expected = name_figures(row)
        read_back = {name: column[index] for name, column in columns.items() if np.isfinite(column[index])}
        assert {name: value for name, value in read_back.items() if "/" in name} == expected


def test_merges_that_are_made_again_count_once(tmp_path: Path) -> None:
    """Those before a rewind are left out, with their contributions."""
    rows = [merge_row(version, float(at), stall_seconds={"0": float(at)}) for at, version in enumerate([1, 2, 3, 2, 3, 4])]
    result = read(tmp_path / "r", *rows)
    assert result.merges["version"].tolist() == [1, 2, 3, 4]
    assert result.merges["at"].tolist() == [0, 3, 4, 5]
    assert result.rewound == 2
    of_head_0 = result.contributions[result.contributions[:, 1] == 0]
    assert of_head_0[:, 0].tolist() == [0, 1, 2, 3]
    assert of_head_0[:, 2].tolist() == [0, 3, 4, 5]


def test_figures_of_single_heads_are_left_out_if_there_are_many(tmp_path: Path) -> None:
    """Even if each row has one head."""
    rows = [merge_row(version, float(version), heads=(version,)) for version in range(1, 30)]
    assert [name for name in read(tmp_path / "r", *rows, heads=29).merges if "head" in name] == []


def test_damage_is_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    """Lines that aren't JSON, that are no rows, that lack a version, and a torn last one."""
    directory = make_run(tmp_path / "r", merge_row(1, 1.0), event_row("finished", 9.0))
    with (tmp_path / "r" / METRICS).open("ab") as file:
        file.write(b'{\n[1]\n{"kind": "merge", "at": 2}\n{"kind": "other", "version": 1}\n\xff\xfe\n')
        file.write(b'{"kind": "merge", "version": 5, "at": ' + b"[" * 5000 + b"]" * 5000 + b"}\n")
        file.write(b'{"kind": "merge", "version": 6, "train_loss": {"0": 1' + b"0" * 400 + b"}}\n")
    add_rows(tmp_path / "r", merge_row(7, 3.0), evaluation_row(7, 4.0, loss=2.0))
    with (tmp_path / "r" / METRICS).open("ab") as file:
        file.write(b'{"kind": "merge", "vers')
    rows = read_columns(directory, 2)
    assert rows.merges["version"].tolist() == [1, 7]
    assert rows.evaluations["eval/loss"].tolist() == [2.0]
    assert [row["event"] for row in rows.events] == ["finished"]
    assert rows.damaged == 8
    assert "8 lines of metrics.jsonl can't be read and are left out." in rows.missing


def test_what_older_rows_lack_is_said(tmp_path: Path) -> None:
    """And a run without merges has none."""
    old = [{"kind": "merge", "version": version, "train_loss": {"0": 1.0}} for version in (1, 2)]
    rows = read(tmp_path / "old", *[{**row, "at": 5.0} for row in old])
    assert rows.missing == (
        "Rows of merges lack step, samples, bytes_up, stall_seconds, as those of older releases do. What follows from them is "
        "left out.",
    )
    assert read(tmp_path / "new").missing == ("Nothing was merged yet.",)


def test_a_file_of_made_up_names_stays_small(tmp_path: Path) -> None:
    """Figures beyond a limit are left out, and this is said."""
    rows = [merge_row(version, 1.0, **{f"x{version}_{n}": 1 for n in range(60)}) for version in range(1, 31)]
    result = read(tmp_path / "r", *rows)
    assert len(result.merges) <= MAX_COLUMNS
    assert any("more than 1,000 figures" in text for text in result.missing)
    assert all(len(column) == 30 for column in result.merges.values())

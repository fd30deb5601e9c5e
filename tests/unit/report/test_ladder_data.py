"""Ladders in reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lte_ray.config.ladder import RESULTS
from lte_ray.errors import StorageError
from lte_ray.ladder import ArmResult, Point, ResultsFile
from lte_ray.report import write_report
from lte_ray.report.ladder_data import read_ladder
from lte_ray.storage import RunDirectory


def make_ladder(folder: Path, **more: Any) -> RunDirectory:
    """A ladder of two rates of a rung and one that failed, as `lte-ray ladder` writes it."""
    folder.mkdir()
    directory = RunDirectory.open(str(folder.parent), folder.name)
    file = ResultsFile(directory, RESULTS, {"program": "gpt", "steps": 20})
    for number, rate in enumerate((0.5, 1.0)):
        points = tuple(Point(step, 8 * step, {"loss": 3.0 - number - 0.1 * step}) for step in (10, 20))
        file.add(ArmResult(f"a{number}", "lte every 10", rate, 0, points, 61.0, sent=2_000_000))
    file.add(ArmResult("b", "mhlora", 1.0, 0, (), 1.0, failed="it diverged"))
    file.write(**more)
    return directory


def test_a_ladder_has_a_line_for_each_training(tmp_path: Path) -> None:
    """The best rate of a rung is marked, and the table has them all."""
    data = read_ladder(make_ladder(tmp_path / "steps", figure="loss", best={"lte every 10": 1.0}))
    assert [(curve.label, curve.is_best) for curve in data.curves] == [
        ("lte every 10 (rate x0.5, seed 0)", False),
        ("lte every 10 (rate x1.0, seed 0)", True),
    ]
    assert data.curves[1].columns["samples"].tolist() == [80, 160]
    assert data.curves[1].columns["eval/loss"].tolist() == [1.0, 0.0]
    assert data.rows[0] == ["lte every 10", "0.5", "0", "1", "160", "2 MB", "1:01", ""]
    assert data.rows[2][-1] == "it diverged"
    assert data.settings == {"program": "gpt", "steps": "20"}
    assert data.missing == []
    page = write_report(tmp_path / "steps", tmp_path / "out.html").path.read_text()
    assert "Trainings of steps" in page
    assert "it diverged" in page


def test_a_ladder_that_goes_on_says_so(tmp_path: Path) -> None:
    """So does one whose results are damaged in part."""
    directory = make_ladder(tmp_path / "steps")
    assert any("hasn't ended" in text for text in read_ladder(directory).missing)
    content = json.loads(directory.read(RESULTS))
    content["arms"] += [3, {"points": [{"step": "a"}, 5, {"step": 1, "samples": 2, "figures": {"loss": None}}]}]
    directory.write(RESULTS, json.dumps(content).encode())
    data = read_ladder(directory)
    assert "1 results can't be read and are left out." in data.missing
    assert len(data.rows) == 4


@pytest.mark.parametrize("text", ["{", "[]", '{"arms": 3}', "\xff"])
def test_a_damaged_ladder_is_one_error(tmp_path: Path, text: str) -> None:
    """That names the file."""
    directory = make_ladder(tmp_path / "steps")
    directory.write(RESULTS, text.encode("latin-1"))
    with pytest.raises(StorageError, match=r"ladder\.json is damaged"):
        read_ladder(directory)

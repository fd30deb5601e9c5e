"""The file of results: complete after each arm, and refused where settings differ."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lte_ray.errors import StorageError
from lte_ray.ladder import ResultsFile
from lte_ray.storage import RunDirectory
from tests.support.ladders import make_arm, make_result

SETTINGS = {"steps": 100, "worker": {"lr": 0.1, "width": 8}}


def open_file(folder: Path, settings: dict = SETTINGS) -> ResultsFile:
    file = ResultsFile(RunDirectory.open(str(folder), "ladder"), "ladder.json", settings)
    file.load()
    return file


def test_results_are_read_back_by_their_arms(tmp_path: Path) -> None:
    """By another object, with every value; a figure that isn't a number is null in the file."""
    first, second, third = make_arm("ordinary"), make_arm("mhlora"), make_arm("mhlora").with_rate(2.0, 5)
    file = open_file(tmp_path)
    results = [make_result(first, [2.0, 1.0], ddp=7), make_result(second, [math.nan], failed="refused")]
    for result in results:
        file.add(result)
    again = open_file(tmp_path)
    assert len(again) == 2
    assert again.get(first) == results[0]
    assert again.get(third) is None
    failed = again.get(second)
    assert failed is not None
    assert failed.failed == "refused"
    assert math.isnan(failed.points[0].figures["loss"])
    assert math.isnan(failed.final("loss"))
    text = (tmp_path / "ladder" / "ladder.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["arms"][0]["rung"] == "ordinary"


def test_other_settings_are_refused_with_what_differs(tmp_path: Path) -> None:
    """The message lists names and both values, and says what to do."""
    open_file(tmp_path).add(make_result(make_arm(), [1.0]))
    with pytest.raises(StorageError, match=r"settings: steps was 100 and is 50, worker.lr was 0.1 and is 0.2. .* --name"):
        open_file(tmp_path, {"steps": 50, "worker": {"lr": 0.2, "width": 8}})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 9, "settings": {}, "arms": []}', '{"format": 1, "arms": [{}]'])
def test_a_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    """Half-written, of another release, or of another program: nothing is overwritten."""
    (tmp_path / "ladder").mkdir()
    (tmp_path / "ladder" / "ladder.json").write_text(text)
    with pytest.raises(StorageError, match=r"ladder.json is damaged, or of another release"):
        open_file(tmp_path)

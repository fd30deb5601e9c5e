"""`lte-ray ladder` in one process: its files, continuing an interrupted ladder, and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lte_ray.cli.main import main
from lte_ray.ladder import Arm, ArmResult, ProcessRunner

WORKER = "workers.regression:Regression"
SMALL = "--worker.width 4 --worker.samples 64 --worker.batch-size 8 --lora-r 2 --steps 10 --threads-per-head 1"


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A ladder of a second, in a storage of its own."""
    monkeypatch.setenv("COLUMNS", "100")
    return ["ladder", WORKER, *SMALL.split(), "--merge-iters", "1", "2", "--storage", str(tmp_path), "--name", "mine"]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Labels of the arms that were really trained, in order."""
    labels: list[str] = []
    original = ProcessRunner.__call__

    def call(self: ProcessRunner, arm: Arm, *more: object) -> ArmResult:
        labels.append(arm.label)
        return original(self, arm, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(ProcessRunner, "__call__", call)
    return labels


def test_a_ladder_compares_all_rungs_and_writes_its_files(
    command: list[str], tmp_path: Path, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A line for each training, the table, advice; JSON, Markdown and the picture. The same command trains nothing again."""
    arguments = [*command, "--no-extend", "--rates", "1", "2", "--seeds", "3", "4", "--merge-iters", "2"]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    out = shown.out
    assert len(trained) == 3 * (2 + 1)
    assert "1/9  ordinary, rate x1, seed 3: validation_loss" in shown.err
    for word in ("mhlora", "merge_iter=2", "ratio", "rate: the best of x1, x2 on seed 3", "advice"):
        assert word in out
    folder = tmp_path / "mine"
    content = json.loads((folder / "ladder.json").read_text())
    assert len(content["arms"]) == 9
    assert content["settings"]["worker"]["width"] == 4
    assert (folder / "ladder.md").read_text().startswith("# workers.regression:Regression: 2 heads, 10 steps, 160 samples")
    pytest.importorskip("matplotlib")
    assert (folder / "ladder.svg").exists()
    assert main(arguments) == 0
    assert len(trained) == 9
    repeated = capsys.readouterr()
    again = repeated.out
    assert "9 trainings are done" in repeated.err
    assert again[again.index("rung ") :] == out[out.index("rung ") :]


def test_an_interrupted_ladder_continues_and_may_grow(
    command: list[str], trained: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C in the third training: two stay. The same command trains the others; more seeds are added to them."""
    arguments = [*command, "--rates", "1", "--rungs", "ordinary", "lte", "--seeds", "0"]
    counting = ProcessRunner.__call__

    def interrupt(self: ProcessRunner, arm: Arm, *more: object) -> ArmResult:
        if len(trained) == 2:
            raise KeyboardInterrupt
        return counting(self, arm, *more)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(ProcessRunner, "__call__", interrupt)
        assert main(arguments) == 130
    output = capsys.readouterr()
    assert "2 trainings are done. Give --name mine to continue." in output.err
    assert "Trainings that are done are kept." in output.err
    assert main(arguments) == 0
    assert trained == [f"{rung}, rate x1, seed 0" for rung in ("ordinary", "merge_iter=1", "merge_iter=2")]
    assert main([*arguments[:-1], "0", "5"]) == 0
    assert trained[3:] == [f"{rung}, rate x1, seed 5" for rung in ("ordinary", "merge_iter=1", "merge_iter=2")]


def test_other_settings_in_the_same_folder_are_refused(
    command: list[str], trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """With what differs; --overwrite starts again."""
    arguments = [*command, "--rates", "1", "--rungs", "lte"]
    assert main(arguments) == 0
    assert main([*arguments, "--worker.lr", "0.5", "--lora-alpha", "8"]) == 2
    assert "lora_alpha was 4.0 and is 8.0, worker.lr was 0.003 and is 0.5" in capsys.readouterr().err
    before = len(trained)
    assert main([*arguments, "--worker.lr", "0.5", "--overwrite"]) == 0
    assert len(trained) == 2 * before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ladder"], "lte-ray ladder needs a WORKER first"),
        (["ladder", "workers.regression:network"], "is a function, not a class"),
        (["ladder", WORKER, "--figure", "loss"], "--figure is 'loss', but evaluate() returns validation_loss"),
        (["ladder", WORKER, "--merge-iters", "9000"], "--merge-iters has 9000, but there are 700 steps"),
        (["ladder", WORKER, "--policy", "averge"], "averge"),
    ],
)
def test_bad_input_is_refused_before_anything_trains(
    arguments: list[str], message: str, tmp_path: Path, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, and no folder."""
    assert main([*arguments, *(["--storage", str(tmp_path)] if len(arguments) > 1 else [])]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())
    assert not trained


def test_a_folder_of_something_else_is_left_alone(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even with --overwrite."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    assert main([*command, "--overwrite"]) == 2
    assert "has no ladder.json, so it isn't a ladder's" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "mine" / "thesis.txt").exists()

"""``lte-ray check``: its lines, its JSON, its exit codes, and what it refuses."""

from __future__ import annotations

import json

import pytest

from lte_ray.cli.main import main

GOOD, MISTAKEN = "tests.support.mistaken_workers:Good", "tests.support.mistaken_workers:TwoMistakes"


def test_a_good_worker_ends_with_code_0(capsys: pytest.CaptureFixture[str]) -> None:
    """Each part has a line, and times and the result follow."""
    assert main(["check", GOOD, "--num-heads", "3", "--lora-r", "2"]) == 0
    out = capsys.readouterr().out
    for shown in (
        "ok      data       Batches of 4 samples",
        "ok      merge ",
        "Where time goes on cpu: model ",
        "Nothing is wrong",
    ):
        assert shown in out


def test_mistakes_end_with_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    """Every one has a line, and the user's code below it."""
    assert main(["check", MISTAKEN, "--quiet"]) == 1
    out = capsys.readouterr().out
    assert "error   evaluation evaluate() raised IndexError: tuple index out of range" in out
    assert 'return {"accuracy": self.points()[2]}' in out
    assert "3 mistakes and 0 warnings. Correct what is marked as an error, and check again." in out
    assert "sending" not in out


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    """--json prints the report alone, and the exit code is as without."""
    assert main(["check", MISTAKEN, "--json"]) == 1
    values = json.loads(capsys.readouterr().out)
    assert values["ok"] is False
    assert [each["part"] for each in values["findings"] if each["status"] == "error"] == ["data", "loss", "evaluation"]
    assert values["times"]["first batch"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "lte-ray check needs a WORKER first"),
        (["nothing:Net"], "nothing:Net"),
        ([GOOD, "--num-heads", "0"], "--num-heads is 0"),
        ([GOOD, "--reset", "B", "--no-wait"], "--reset B and --no-wait contradict each other"),
        ([GOOD, "--gpu", "80GB"], "lte-ray check has no flag --gpu"),
    ],
)
def test_bad_input_is_one_error(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, and a sentence on stderr."""
    assert main(["check", *flags]) == 2
    assert message in " ".join(capsys.readouterr().err.split())

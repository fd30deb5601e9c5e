"""``lte-ray plan``: its tables, its JSON, and what it refuses."""

from __future__ import annotations

import json

import pytest

from lte_ray.cli.main import main

WORKER = "workers.regression:Regression"


def test_tables_have_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    """Layers, memory, traffic and a command to train with are printed on stdout."""
    assert main(["plan", WORKER, "--num-heads", "3", "--lora-r", "4", "--gpu", "24GB", "--num-gpus", "4"]) == 0
    out = capsys.readouterr().out
    for shown in ("What Regression trains", "factors", "last contribution", "coordinator", "A merge of 3 heads", "DDP"):
        assert shown in out
    assert f"lte-ray train {WORKER} --num-heads 4 --gpus-per-head 1" in out


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    """--json prints the plan alone, with the settings of a flag and of the worker."""
    assert main(["plan", WORKER, "--num-heads", "3", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["num_heads"] == 3
    assert values["head"]["total"] == sum(size for name, size in values["head"].items() if name != "total")
    assert values["recommendation"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "lte-ray plan needs a WORKER first"),
        ([WORKER, "--gpu", "A100"], "Did you mean A100-80GB?"),
        ([WORKER, "--link", "1Gb"], "--link is '1Gb'"),
        ([WORKER, "--exclude", "nothing"], "--exclude 'nothing' matches no layer"),
        ([WORKER, "--gpus", "8"], "lte-ray plan has no flag --gpus"),
    ],
)
def test_bad_input_is_one_error(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, and a sentence on stderr."""
    assert main(["plan", *flags]) == 2
    assert message in " ".join(capsys.readouterr().err.split())

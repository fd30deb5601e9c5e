"""`lte-ray new`: the file that it writes trains as it is, and nothing is replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

from lte_ray.cli.main import main
from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.engine.in_process import evaluate_base, run_in_process
from lte_ray.engine.prepare import prepare
from lte_ray.engine.settings import Settings
from lte_ray.import_object import load_worker
from lte_ray.recipes import RECIPES


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Writes a file and returns the WORKER that the command names."""
    assert main(["new", *arguments]) == 0
    return capsys.readouterr().out.split()[-1]


def test_the_commented_worker_trains(capsys: pytest.CaptureFixture[str]) -> None:
    """It is named after the file, and its loss falls."""
    program = written(capsys, "my-net")
    assert program == "my-net.py:MyNet"
    worker = load_worker(program)()
    settings = Settings("x", LTEConfig(num_heads=2, lora_r=8), MergeConfig(merge_iter=10), TrainConfig(steps=60, warmup=5))
    initial = prepare(worker, settings)
    assert not initial.data_problem
    bases = (initial.base, run_in_process(worker, settings).base)
    before, after = (evaluate_base(worker, initial, base)["validation_loss"] for base in bases)
    assert after < 0.9 * before


@pytest.mark.parametrize("name", RECIPES)
def test_a_copy_of_a_recipe_can_be_loaded(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its neighbors are imported from where they are."""
    program = written(capsys, f"sub_{name}.py", "--from", name)
    kind = load_worker(program)
    assert kind.__name__ == load_worker(name).__name__
    assert kind is not load_worker(name)


def test_a_file_that_exists_stays(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With or without .py."""
    (folder / "net.py").write_text("mine")
    for name in ("net", "net.py"):
        assert main(["new", name]) == 2
        assert "net.py exists already" in " ".join(capsys.readouterr().err.split())
    assert (folder / "net.py").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["x", "--from", "gtp"], "--from is 'gtp', but it must be one of: causal-lm, classify"),
        (["none/x"], "none/x.py can't be written: No such file or directory"),
    ],
)
def test_what_cannot_be_written_is_refused(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With one sentence, and no file."""
    assert main(["new", *arguments]) == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert not list(Path().rglob("x.py"))

"""A run can be continued from the run.toml that `lte-ray train` writes: by name, by --config and in Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lte_ray.cli.main import main
from lte_ray.engine.settings import Settings
from lte_ray.export.worker_factory import make_worker
from lte_ray.merging.registry import make_policy
from lte_ray.run import record as run_record
from lte_ray.run import run_toml
from lte_ray.run import start as run_start
from lte_ray.storage import RunDirectory
from lte_ray.trainer import LTETrainer

NET = """
import enum
import pathlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

class Color(enum.Enum):
    RED = 1
    BLUE = 2

class Size(enum.IntEnum):
    SMALL = 1
    LARGE = 2

@dataclass
class Options:
    depth: int = 1

def shift(x):
    return x

@dataclass
class Net:
    value: {annotation} = {default}
    width: int = 3

    def build_model(self): ...
    def train_batches(self, shard): ...
    def loss(self, model, batch): ...
    def evaluate(self, model): ...
"""


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[LTETrainer]:
    """The trainers that the command line makes. Each writes run.toml, as a run that starts does, and trains nothing."""
    made: list[LTETrainer] = []

    def fit(self: LTETrainer) -> None:
        made.append(self)
        storage: Any = self.run_config
        if not storage.resume:
            settings = Settings(storage.name, self.lte, self.merge, self.train)
            record = run_record.make_record(self.worker, self.program, settings, self.scaling_config, storage, self.failure)  # type: ignore[arg-type]
            run_start.create_run(RunDirectory.open(storage.storage, storage.name), record, storage)

    monkeypatch.setattr(LTETrainer, "fit", fit)
    monkeypatch.setattr("lte_ray.cli.train._report", lambda result, call: 0)
    return made


CASES = [
    ("Callable | None", "None", []),
    ("object", "None", []),
    ("Any", "None", []),
    ("torch.dtype | None", "None", []),
    ("Literal['a', None]", "None", []),
    ("Options | None", "None", []),
    ("int | None", "5", ["None"]),
    ("Callable", "shift", []),
    ("torch.dtype", "torch.float32", []),
    ("type", "dict", []),
    ("object", "3", []),
    ("Options", "field(default_factory=Options)", []),
    ("dict[str, int]", "field(default_factory=dict)", []),
    ("dict[str, int]", "field(default_factory=lambda: {'a': 1})", []),
    ("tuple[tuple[int, int], ...]", "((1, 2), (3, 4))", []),
    ("Color", "Color.RED", []),
    ("Color", "Color.RED", ["BLUE"]),
    ("Size", "Size.SMALL", ["LARGE"]),
    ("tuple[Color, ...]", "(Color.RED,)", ["BLUE", "RED"]),
    ("set[str]", "field(default_factory=lambda: {'a'})", []),
    ("frozenset[int]", "frozenset()", ["3", "4"]),
    ("pathlib.Path", "pathlib.Path('/x')", ["/y"]),
    ("list[pathlib.Path] | None", "None", ["/x", "/y"]),
]


@pytest.mark.parametrize(("annotation", "default", "given"), CASES)
def test_a_run_is_continued_with_any_arguments_of_its_worker(
    tmp_path: Path, trainers: list[LTETrainer], annotation: str, default: str, given: list[str]
) -> None:
    """Arguments that can't be flags have their defaults again, the others their given values."""
    file = tmp_path / "net.py"
    file.write_text(NET.format(annotation=annotation, default=default))
    flags = ["--worker.width", "5", *(["--worker.value", *given] if given else [])]
    assert main(["train", f"{file}:Net", "--name", "r", "--storage", str(tmp_path), *flags]) == 0
    assert main(["train", "--resume", "r", "--storage", str(tmp_path)]) == 0
    record = str(tmp_path / "r" / "run.toml")
    assert main(["train", f"{file}:Net", "--name", "again", "--storage", str(tmp_path), "--config", record]) == 0
    first, resumed, again = (trainer.worker for trainer in trainers)
    assert first.width == 5
    assert vars(resumed) == vars(again) == vars(first)


@pytest.mark.slow
@pytest.mark.parametrize(("annotation", "default", "given"), CASES)
def test_the_worker_is_made_again_in_python(
    tmp_path: Path, trainers: list[LTETrainer], annotation: str, default: str, given: list[str]
) -> None:
    """With the same arguments of the same types, for `LTETrainer.restore` and exports."""
    file = tmp_path / "net.py"
    file.write_text(NET.format(annotation=annotation, default=default))
    flags = ["--worker.value", *given] if given else []
    assert main(["train", f"{file}:Net", "--name", "r", "--storage", str(tmp_path), *flags]) == 0
    made = make_worker(run_toml.read(RunDirectory.open(str(tmp_path), "r")).content)
    assert vars(made) == vars(trainers[0].worker)
    assert type(made.value) is type(trainers[0].worker.value)


def test_none_as_a_policys_argument_is_restored(tmp_path: Path, trainers: list[LTETrainer]) -> None:
    """By name and in Python, for any default."""
    (tmp_path / "mine.py").write_text("def mine(pending, roster, *, low: int | None = None, high: int | None = 5): ...")
    command = ["train", "workers.regression:Regression", "--name", "r", "--storage", str(tmp_path)]
    assert main([*command, "--policy", f"{tmp_path / 'mine.py'}:mine", "--policy.high", "None"]) == 0
    assert main(["train", "--resume", "r", "--storage", str(tmp_path)]) == 0
    restored = LTETrainer.restore(tmp_path / "r")
    assert trainers[1].merge.policy_args == restored.merge.policy_args == {"low": None, "high": None}
    make_policy(restored.merge)


def test_flags_win_over_a_named_runs_switches(tmp_path: Path, trainers: list[LTETrainer]) -> None:
    """A run without waiting is resumed with waiting."""
    command = ["train", "workers.regression:Regression", "--name", "r", "--storage", str(tmp_path)]
    assert main([*command, "--no-wait", "--when", "arrival"]) == 0
    assert main(["train", "--resume", "r", "--storage", str(tmp_path)]) == 0
    assert main(["train", "--resume", "r", "--storage", str(tmp_path), "--wait", "--when", "barrier"]) == 0
    assert [(t.merge.wait, t.merge.when) for t in trainers] == [(False, "arrival"), (False, "arrival"), (True, "barrier")]

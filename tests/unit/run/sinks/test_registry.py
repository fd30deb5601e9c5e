"""Which sinks a run has: by default, by name, one's own; and what is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from lte_ray.errors import ConfigError
from lte_ray.run.sinks import make_sinks, recordable_names, registry
from lte_ray.run.sinks.csv import CsvSink
from lte_ray.run.sinks.tensorboard import TensorBoardSink

OWN = """
class Mine:
    def open(self, run): ...
    def row(self, row): ...
    def close(self, status): ...

class Needy(Mine):
    def __init__(self, table): ...

class Half:
    def open(self, run): ...

def function(): return 5
"""


class Gauges(CsvSink):
    """Stands for the sink that needs Ray."""


@pytest.fixture
def own(tmp_path: Path) -> str:
    """A file with sinks."""
    (tmp_path / "own.py").write_text(OWN)
    return str(tmp_path / "own.py")


def made(*log: Any) -> dict[str, type]:
    """The classes of the sinks that are made."""
    return {name: type(sink) for name, sink in make_sinks(log, {"prometheus": Gauges}).items()}


def test_names_give_sinks() -> None:
    """By default TensorBoard and Ray's metrics; none gives none; each is there once."""
    assert made("auto") == {"tensorboard": TensorBoardSink, "prometheus": Gauges}
    assert made("csv", "auto", "csv", "prometheus") == {"csv": CsvSink, "tensorboard": TensorBoardSink, "prometheus": Gauges}
    assert made("none") == made() == {}


def test_own_sinks_come_by_path_and_as_objects(own: str) -> None:
    """Several of one class have names of their own. Only names are recorded."""
    sinks = make_sinks([f"{own}:Mine", CsvSink(), CsvSink()], {})
    assert list(sinks) == ["Mine", "CsvSink", "CsvSink-2"]
    assert recordable_names(["csv", CsvSink()]) == ("csv",)
    assert recordable_names([CsvSink()]) == ("none",)


def test_a_sink_that_is_not_installed_is_refused_by_name_and_left_out_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install."""
    find = importlib.util.find_spec
    absent = ("tensorboardX", "wandb", "mlflow")
    monkeypatch.setattr(registry, "find_spec", lambda name: None if name in absent else find(name))
    assert made("auto") == {"prometheus": Gauges}
    for name, package in (
        ("tensorboard", "tensorboardX"),
        ("wandb", r"'lte-ray\[wandb\]'"),
        ("mlflow", r"'lte-ray\[mlflow\]'"),
    ):
        with pytest.raises(ConfigError, match=rf"--log {name} needs .* isn't installed\. Run pip install {package}, or leave"):
            made(name)


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (["tensorbord"], "--log is 'tensorbord', but it must be one of: .* Did you mean tensorboard?"),
        (["none", "csv"], "--log is 'none csv', but none means no sink"),
        (["OWN:Needy"], r"making the sink without arguments raised TypeError: .*LTETrainer\(log=\[\.\.\.\]\)"),
        (["OWN:Half"], "The sink '.*own.py:Half' has no method row. A sink has the methods open, row, close"),
        (["OWN:Hal"], "has no Hal. Did you mean Half?"),
        (["OWN:function"], "The sink .* has no method open"),
        (["no.py:Sink"], "--log 'no.py:Sink': there is no file"),
        ([CsvSink], "The sink CsvSink is a class, not an object of it"),
        ([5], "The sink int has no method open"),
    ],
)
def test_what_is_no_sink_is_refused(own: str, log: list[Any], said: str) -> None:
    """One sentence says what is wrong, and what a sink has."""
    with pytest.raises(ConfigError, match=said):
        made(*(entry.replace("OWN", own) if isinstance(entry, str) else entry for entry in log))

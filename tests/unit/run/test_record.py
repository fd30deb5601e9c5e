"""``run.toml`` of a run, read again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from lte_ray.cli.flags import Parsed
from lte_ray.config import FailureConfig, LTEConfig, MergeConfig, PlacementConfig, StorageConfig, TrainConfig
from lte_ray.engine.settings import Settings
from lte_ray.errors import StorageError
from lte_ray.run.record import format_record, make_record
from lte_ray.run.run_toml import RunRecord
from lte_ray.storage import RunDirectory
from tests.support.config_files import GOOD, parse_config
from workers.regression import Regression


def test_a_run_toml_names_sinks_in_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a file becomes absolute; --config gives the same sinks to another run."""
    monkeypatch.chdir(tmp_path)
    storage = StorageConfig(log=("csv", "mine.py:Sink"))
    settings = Settings("a", LTEConfig(), MergeConfig(), TrainConfig())
    record = make_record(Regression(), GOOD, settings, PlacementConfig(), storage, FailureConfig())
    (tmp_path / "run.toml").write_text(format_record(record))
    parsed = parse_config(tmp_path / "run.toml")
    assert isinstance(parsed, Parsed)
    assert parsed.storage.log == ("csv", f"{tmp_path}/mine.py:Sink")


@dataclass
class Refusing:
    """Settings that can't be made."""

    size: int = 1

    def __post_init__(self) -> None:
        raise TypeError("size makes no sense")


def test_settings_that_cannot_be_made_are_damage(tmp_path: Path) -> None:
    """A TypeError of the settings class names the file."""
    record = RunRecord(RunDirectory.open(str(tmp_path), "bert"), {"size": 2})
    with pytest.raises(StorageError, match=r"run\.toml is damaged: size makes no sense\.$"):
        record.settings(Refusing)

"""``run.toml`` of a run, read again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from lte_ray.errors import StorageError
from lte_ray.run.record import RunRecord
from lte_ray.storage import RunDirectory


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

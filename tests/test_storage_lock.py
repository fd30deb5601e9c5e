"""One process trains a run at a time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lte_ray.errors import StorageError
from lte_ray.storage import RunDirectory, alone, check_alone


def test_a_run_that_is_being_trained_is_not_taken(tmp_path: Path) -> None:
    """Who does is named; afterwards the folder is as it was."""
    directory = RunDirectory.of(str(tmp_path), "r")
    directory.create()
    check_alone(directory)
    told = f"being trained by process {os.getpid()} on .* give another --name"
    with alone(directory), pytest.raises(StorageError, match=told):
        check_alone(directory)
    check_alone(directory)
    assert directory.names() == []


def test_a_lock_that_a_dead_process_left_behind_holds_nobody_up(tmp_path: Path) -> None:
    """The lock ended with the process; only its file is still there."""
    directory = RunDirectory.of(str(tmp_path), "r")
    directory.create()
    (tmp_path / "r" / ".lock").write_text("4711 on elsewhere")
    check_alone(directory)
    with alone(directory):
        assert (tmp_path / "r" / ".lock").read_text().startswith(f"{os.getpid()} on ")

"""Whether a process trains a run, as others find out by its lock."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lte_ray.storage import LOCK, Driver, RunDirectory, default_storage, exclusive_lock, find_driver
from lte_ray.storage import lock as locking


def test_the_driver_is_found_by_its_lock(tmp_path: Path) -> None:
    """While it lives, by number and host; afterwards there is none."""
    run = RunDirectory.open(str(tmp_path), "")
    assert find_driver(run) == Driver(False)
    with exclusive_lock(run):
        assert find_driver(run) == Driver(True, f"{os.getpid()} on {os.uname().nodename}")
    assert find_driver(run) == Driver(False)


@pytest.mark.parametrize(
    ("text", "alive"), [(f"1 on {os.uname().nodename}", False), ("1 on another-machine", None), ("", False)]
)
def test_a_lock_that_nobody_holds_says_something_only_of_this_machine(tmp_path: Path, text: str, alive: bool | None) -> None:
    """Another machine's may not be seen here. Looking changes nothing."""
    (tmp_path / LOCK).write_text(text)
    assert find_driver(RunDirectory.open(str(tmp_path), "")) == Driver(alive)
    assert (tmp_path / LOCK).read_text() == text


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    """Nothing is known then."""
    (tmp_path / LOCK).symlink_to(tmp_path / "elsewhere")
    assert find_driver(RunDirectory.open(str(tmp_path), "")) == Driver(None)


def test_a_look_at_the_lock_keeps_no_run_from_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that finds the lock taken looks once more a moment later."""
    fcntl = pytest.importorskip("fcntl")
    run = RunDirectory.open(str(tmp_path), "")
    (tmp_path / LOCK).touch()
    with (tmp_path / LOCK).open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        monkeypatch.setattr(locking.time, "sleep", lambda seconds: fcntl.flock(file, fcntl.LOCK_UN))
        with exclusive_lock(run):
            assert find_driver(run).alive


def test_the_default_storage_is_rays() -> None:
    """`lte_ray.storage` knows it without importing Ray."""
    train = pytest.importorskip("ray.train")
    assert default_storage() == train.RunConfig().storage_path

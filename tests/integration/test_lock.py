"""One process trains a run at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lte_ray import LTETrainer, checkpoint
from lte_ray.engine.prepare import prepare
from lte_ray.engine.settings import Settings
from lte_ray.errors import StorageError
from lte_ray.run.record import format_record
from lte_ray.run.start import RunClaim, changed_data
from lte_ray.run.stop_request import REQUEST
from lte_ray.runtime import placement
from lte_ray.storage import RunDirectory, check_unlocked, exclusive_lock, lock
from tests.support.ray_runs import settings, storage
from workers.regression import Regression


def test_a_run_in_training_is_locked(tmp_path: Path) -> None:
    """The error names the process that trains it; afterwards the folder is as before."""
    directory = RunDirectory.open(str(tmp_path), "r")
    directory.create()
    check_unlocked(directory)
    message = f"being trained by process {os.getpid()} on .* give another --name"
    with exclusive_lock(directory), pytest.raises(StorageError, match=message):
        check_unlocked(directory)
    check_unlocked(directory)
    assert directory.list_names() == []


def test_a_dead_process_lock_file_does_not_block(tmp_path: Path) -> None:
    """The lock ended with the process; only its file remains."""
    directory = RunDirectory.open(str(tmp_path), "r")
    directory.create()
    (tmp_path / "r" / ".lock").write_text("4711 on elsewhere")
    check_unlocked(directory)
    with exclusive_lock(directory):
        assert (tmp_path / "r" / ".lock").read_text().startswith(f"{os.getpid()} on ")


def test_a_lock_is_never_written_through_a_link(tmp_path: Path) -> None:
    """Otherwise a link in the storage could cause a file elsewhere to be overwritten."""
    directory = RunDirectory.open(str(tmp_path), "r")
    directory.create()
    (tmp_path / "victim").write_text("mine")
    for name in (".lock", "run.toml.part"):
        (tmp_path / "r" / name).symlink_to(tmp_path / "victim")
    with exclusive_lock(directory):
        directory.write("run.toml", b"x = 1")
        with pytest.raises(StorageError, match="being trained by process"):
            check_unlocked(directory)
    assert (tmp_path / "victim").read_text() == "mine"
    assert (tmp_path / "r" / "run.toml").read_text() == "x = 1"
    assert not (tmp_path / "r" / "run.toml").is_symlink()


def test_a_lock_whose_file_was_removed_meanwhile_is_acquired_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner ends between another process's open and lock of the file; a third process must not lock a new file as well."""
    directory = RunDirectory.open(str(tmp_path), "r")
    directory.create()
    flock, remove_once = lock.fcntl.flock, [(tmp_path / "r" / ".lock").unlink]

    def lock_late(*args: Any) -> None:
        if remove_once:
            remove_once.pop()()
        flock(*args)

    monkeypatch.setattr(lock.fcntl, "flock", lock_late)
    with exclusive_lock(directory), pytest.raises(StorageError, match="being trained by process"):
        check_unlocked(directory)
    assert directory.list_names() == []


def make_claim(path: Path, **storage_settings: bool) -> RunClaim:
    kwargs = settings()
    run = Settings("r", kwargs["lte"], kwargs["merge"], kwargs["train"])  # type: ignore[arg-type]
    return RunClaim(RunDirectory.open(str(path), "r"), storage(path, "r", **storage_settings), run, prepare(Regression(), run))


def test_an_overwritten_run_is_locked_before_it_is_removed(tmp_path: Path) -> None:
    """A second process that wants to overwrite it gets an error that names the first; the folder itself stays."""
    with make_claim(tmp_path).acquire({"old": 1}):
        (tmp_path / "r" / "checkpoints").mkdir()
    first, second = make_claim(tmp_path, overwrite=True), make_claim(tmp_path, overwrite=True)
    with first.acquire({"new": 1}) as (_, config, resume):
        assert (config, resume) == ("new = 1\n", None)
        assert sorted(file.name for file in (tmp_path / "r").iterdir()) == [".lock", "run.toml"]
        with pytest.raises(StorageError, match="is being trained by process"), second.acquire({"late": 1}):
            pass
        assert (tmp_path / "r" / "run.toml").read_text() == "new = 1\n"
    assert [file.name for file in (tmp_path / "r").iterdir()] == ["run.toml"]


def test_a_request_to_stop_ends_with_the_run_that_it_was_for(tmp_path: Path) -> None:
    """One that is left from before doesn't stop a run that starts, and none is left when a run ends."""
    with make_claim(tmp_path).acquire({"old": 1}):
        (tmp_path / "r" / REQUEST).write_text("{}")
    assert [file.name for file in (tmp_path / "r").iterdir()] == ["run.toml"]
    (tmp_path / "r" / REQUEST).write_text("{}")
    with make_claim(tmp_path, resume=True).acquire({"new": 1}):
        assert not (tmp_path / "r" / REQUEST).exists()


def test_a_link_to_a_run_is_overwritten_but_not_its_target(tmp_path: Path) -> None:
    """The linked run stays intact."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "run.toml").write_text("precious = 1")
    (tmp_path / "r").symlink_to(other)
    with make_claim(tmp_path, overwrite=True).acquire({"new": 1}):
        assert not (tmp_path / "r").is_symlink()
    assert (other / "run.toml").read_text() == "precious = 1"


def test_a_run_that_cannot_be_locked_is_one_clear_error(tmp_path: Path) -> None:
    """As in another user's folder; here a folder has the lock file's name."""
    directory = RunDirectory.open(str(tmp_path), "r")
    directory.create()
    (tmp_path / "r" / ".lock").mkdir()
    with pytest.raises(StorageError, match=r"can't be written: .*correct its permissions"):
        check_unlocked(directory)


@pytest.mark.parametrize("left", [(".writable",), (".lock", "run.toml.part"), ()])
@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_a_run_whose_driver_died_while_creating_it_is_started_by_the_same_command(
    tmp_path: Path, left: tuple[str, ...], how: str
) -> None:
    """Without run.toml and without any other file the folder may be used; with other files it isn't a run."""
    (tmp_path / "r").mkdir()
    for name in left:
        (tmp_path / "r" / name).touch()
    with make_claim(tmp_path, **{how: True}).acquire({"x": 1}) as (_, config, resume):
        assert (config, resume) == ("x = 1\n", None)
    (tmp_path / "r" / "run.toml").unlink()
    (tmp_path / "r" / "thesis.tex").touch()
    with pytest.raises(StorageError, match="isn't a run of lte-ray"):
        make_claim(tmp_path, **{how: True})


def test_settings_that_determine_batches_are_compared_on_resume() -> None:
    """Seed and the worker's arguments, unless the checkpoint doesn't have them or one of both lacks the argument."""
    worker = {"batch_size": 64, "rate": 0.1, "token": "x"}
    before = {"seed": 0, "steps": 10, "worker": worker}
    now = format_record({"seed": 1, "steps": 20, "worker": {"batch_size": 32, "rate": 0.1}})
    manifest = checkpoint.Manifest(2, (), (), {"config": format_record(before)})
    assert changed_data(manifest, now) == ["--seed was 0 and is 1", "--worker.batch-size was 64 and is 32"]
    described = [format_record({"seed": 0, "training_data": f"a.jsonl, {number}"}) for number in (1, 2)]
    manifest = checkpoint.Manifest(2, (), (), {"config": described[0]})
    assert changed_data(manifest, described[1]) == ["the data was a.jsonl, 1 and is a.jsonl, 2"]
    assert changed_data(manifest, described[0]) == []
    manifest = checkpoint.Manifest(2, (), (), {"config": format_record(before)})
    assert changed_data(manifest, format_record(before)) == []
    for facts in ({}, {"config": "= broken"}, {"config": "worker = 3"}):
        assert changed_data(checkpoint.Manifest(2, (), (), facts), now) == []


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("steps", [20, 10], ids=["steps left", "no steps left"])
def test_a_driver_that_waited_for_the_cluster_continues_from_what_another_trained(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, steps: int
) -> None:
    """The same run is started twice: the driver that gets its resources later resumes from the other's checkpoint."""
    run = {"run_config": storage(tmp_path, "r", resume=True)}
    reserve, other_driver = placement.reserve, [lambda: LTETrainer(Regression(), **run, **settings(steps=10)).fit()]

    def reserve_late(*args: object) -> object:
        if other_driver:
            other_driver.pop()()
        return reserve(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(placement, "reserve", reserve_late)
    result = LTETrainer(Regression(), **run, **settings(steps=steps)).fit()
    assert result.metrics["version"] == steps // 5
    assert ("has already taken all 10 local steps per head: only its model" in caplog.text) == (steps == 10)
    directory = RunDirectory.open(str(tmp_path), "r")
    assert 2 in checkpoint.complete_versions(directory)
    rows = (tmp_path / "r" / "metrics.jsonl").read_text()
    assert rows.count('"kind": "merge"') == steps // 5

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
from lte_ray.run.record import as_toml
from lte_ray.run.start import RunClaim, changed_data
from lte_ray.runtime import placement
from lte_ray.storage import RunDirectory, check_unlocked, exclusive_lock, lock
from tests.support.ray_runs import settings, storage
from workers.regression import Regression


def test_a_run_that_is_being_trained_is_not_taken(tmp_path: Path) -> None:
    """Who does is named; afterwards the folder is as it was."""
    directory = RunDirectory.open(str(tmp_path), "r")
    directory.create()
    check_unlocked(directory)
    told = f"being trained by process {os.getpid()} on .* give another --name"
    with exclusive_lock(directory), pytest.raises(StorageError, match=told):
        check_unlocked(directory)
    check_unlocked(directory)
    assert directory.list_names() == []


def test_a_lock_that_a_dead_process_left_behind_holds_nobody_up(tmp_path: Path) -> None:
    """The lock ended with the process; only its file is still there."""
    directory = RunDirectory.open(str(tmp_path), "r")
    directory.create()
    (tmp_path / "r" / ".lock").write_text("4711 on elsewhere")
    check_unlocked(directory)
    with exclusive_lock(directory):
        assert (tmp_path / "r" / ".lock").read_text().startswith(f"{os.getpid()} on ")


def test_a_lock_is_never_written_through_a_link(tmp_path: Path) -> None:
    """Whoever may write the storage could have a file elsewhere emptied."""
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


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its holder ends between another's opening the file and locking it: a third must not get a lock of its own beside that."""
    directory = RunDirectory.open(str(tmp_path), "r")
    directory.create()
    flock, ending = lock.fcntl.flock, [(tmp_path / "r" / ".lock").unlink]

    def late(*args: Any) -> None:
        if ending:
            ending.pop()()
        flock(*args)

    monkeypatch.setattr(lock.fcntl, "flock", late)
    with exclusive_lock(directory), pytest.raises(StorageError, match="being trained by process"):
        check_unlocked(directory)
    assert directory.list_names() == []


def claim_of(path: Path, **more: bool) -> RunClaim:
    kwargs = settings()
    made = Settings("r", kwargs["lte"], kwargs["merge"], kwargs["train"])  # type: ignore[arg-type]
    return RunClaim(RunDirectory.open(str(path), "r"), storage(path, "r", **more), made, prepare(Regression(), made))


def test_what_is_overwritten_is_locked_before_it_is_removed(tmp_path: Path) -> None:
    """Another that waits to overwrite it, too, finds who was faster; the folder itself stays."""
    with claim_of(tmp_path).acquire({"old": 1}):
        (tmp_path / "r" / "checkpoints").mkdir()
    first, second = claim_of(tmp_path, overwrite=True), claim_of(tmp_path, overwrite=True)
    with first.acquire({"new": 1}) as (config, resume):
        assert (config, resume) == ("new = 1\n", None)
        assert sorted(file.name for file in (tmp_path / "r").iterdir()) == [".lock", "run.toml"]
        with pytest.raises(StorageError, match="is being trained by process"), second.acquire({"late": 1}):
            pass
        assert (tmp_path / "r" / "run.toml").read_text() == "new = 1\n"
    assert [file.name for file in (tmp_path / "r").iterdir()] == ["run.toml"]


def test_a_link_to_a_run_is_overwritten_and_not_what_it_leads_to(tmp_path: Path) -> None:
    """The other run stays whole."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "run.toml").write_text("precious = 1")
    (tmp_path / "r").symlink_to(other)
    with claim_of(tmp_path, overwrite=True).acquire({"new": 1}):
        assert not (tmp_path / "r").is_symlink()
    assert (other / "run.toml").read_text() == "precious = 1"


def test_a_run_that_cannot_be_locked_is_one_error(tmp_path: Path) -> None:
    """As where the folder is another user's: here something else has the lock's name."""
    directory = RunDirectory.open(str(tmp_path), "r")
    directory.create()
    (tmp_path / "r" / ".lock").mkdir()
    with pytest.raises(StorageError, match=r"can't be written: .*correct its permissions"):
        check_unlocked(directory)


@pytest.mark.parametrize("left", [(".writable",), (".lock", "run.toml.part"), ()])
@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_a_run_whose_driver_died_while_it_was_made_is_started_by_the_same_command(
    tmp_path: Path, left: tuple[str, ...], how: str
) -> None:
    """There is no run.toml yet, and nothing else that anybody might miss; with anything else, it isn't ours."""
    (tmp_path / "r").mkdir()
    for name in left:
        (tmp_path / "r" / name).touch()
    with claim_of(tmp_path, **{how: True}).acquire({"x": 1}) as (config, resume):
        assert (config, resume) == ("x = 1\n", None)
    (tmp_path / "r" / "run.toml").unlink()
    (tmp_path / "r" / "thesis.tex").touch()
    with pytest.raises(StorageError, match="isn't a run of lte-ray"):
        claim_of(tmp_path, **{how: True})


def test_what_batches_depend_on_is_compared_when_a_run_goes_on() -> None:
    """Seed and the worker's arguments; nothing is said where the checkpoint doesn't know, or one of them was left out."""
    worker = {"batch_size": 64, "rate": 0.1, "token": "x"}
    before = {"seed": 0, "steps": 10, "worker": worker}
    now = as_toml({"seed": 1, "steps": 20, "worker": {"batch_size": 32, "rate": 0.1}})
    manifest = checkpoint.Manifest(2, (), (), {"config": as_toml(before)})
    assert changed_data(manifest, now) == ["--seed was 0 and is 1", "--worker.batch-size was 64 and is 32"]
    assert changed_data(manifest, as_toml(before)) == []
    for facts in ({}, {"config": "= broken"}, {"config": "worker = 3"}):
        assert changed_data(checkpoint.Manifest(2, (), (), facts), now) == []


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("steps", [20, 10], ids=["more to do", "nothing left"])
def test_what_others_trained_while_a_driver_waited_for_the_cluster_stays(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, steps: int
) -> None:
    """The same run is started twice: the one that gets its resources later goes on from what the other has made."""
    run = {"run_config": storage(tmp_path, "r", resume=True)}
    reserve, others = placement.reserve, [lambda: LTETrainer(Regression(), **run, **settings(steps=10)).fit()]

    def waits(*args: object) -> object:
        if others:
            others.pop()()
        return reserve(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(placement, "reserve", waits)
    result = LTETrainer(Regression(), **run, **settings(steps=steps)).fit()
    assert result.metrics["version"] == steps // 5
    assert ("has taken all 10 local steps a head already: only its model" in caplog.text) == (steps == 10)
    directory = RunDirectory.open(str(tmp_path), "r")
    assert 2 in checkpoint.complete_versions(directory)
    rows = (tmp_path / "r" / "metrics.jsonl").read_text()
    assert rows.count('"kind": "merge"') == steps // 5

"""One process trains a run at a time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ray_support import LONG, settings, storage

from lte_ray import LTETrainer, checkpoint
from lte_ray.claim import Claim
from lte_ray.engine.initial import prepare
from lte_ray.engine.settings import Settings
from lte_ray.errors import StorageError
from lte_ray.runtime import placement
from lte_ray.storage import RunDirectory, alone, check_alone
from workers.regression import Regression


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


def claim_of(path: Path, **more: bool) -> Claim:
    kwargs = settings()
    made = Settings("r", kwargs["lte"], kwargs["merge"], kwargs["train"])  # type: ignore[arg-type]
    return Claim(RunDirectory.of(str(path), "r"), storage(path, "r", **more), made, prepare(Regression(), made))


def test_what_is_overwritten_is_locked_before_it_is_removed(tmp_path: Path) -> None:
    """Another that waits to overwrite it, too, finds who was faster; the folder itself stays."""
    with claim_of(tmp_path).taken({"old": 1}):
        (tmp_path / "r" / "checkpoints").mkdir()
    first, second = claim_of(tmp_path, overwrite=True), claim_of(tmp_path, overwrite=True)
    with first.taken({"new": 1}) as (config, resume):
        assert (config, resume) == ("new = 1\n", None)
        assert sorted(file.name for file in (tmp_path / "r").iterdir()) == [".lock", "run.toml"]
        with pytest.raises(StorageError, match="is being trained by process"), second.taken({"late": 1}):
            pass
        assert (tmp_path / "r" / "run.toml").read_text() == "new = 1\n"
    assert [file.name for file in (tmp_path / "r").iterdir()] == ["run.toml"]


def test_a_link_to_a_run_is_overwritten_and_not_what_it_leads_to(tmp_path: Path) -> None:
    """The other run stays whole."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "run.toml").write_text("precious = 1")
    (tmp_path / "r").symlink_to(other)
    with claim_of(tmp_path, overwrite=True).taken({"new": 1}):
        assert not (tmp_path / "r").is_symlink()
    assert (other / "run.toml").read_text() == "precious = 1"


def test_a_run_that_cannot_be_locked_is_one_error(tmp_path: Path) -> None:
    """As where the folder is another user's: here something else has the lock's name."""
    directory = RunDirectory.of(str(tmp_path), "r")
    directory.create()
    (tmp_path / "r" / ".lock").mkdir()
    with pytest.raises(StorageError, match=r"can't be written: .*correct its permissions"):
        check_alone(directory)


@pytest.mark.ray
@LONG
@pytest.mark.parametrize("steps", [20, 10], ids=["more to do", "nothing left"])
def test_what_others_trained_while_a_driver_waited_for_the_cluster_stays(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """The same run is started twice: the one that gets its resources later goes on from what the other has made, or says so."""
    run = {"run_config": storage(tmp_path, "r", resume=True)}
    reserve, others = placement.reserve, [lambda: LTETrainer(Regression(), **run, **settings(steps=10)).fit()]

    def waits(*args: object) -> object:
        if others:
            others.pop()()
        return reserve(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(placement, "reserve", waits)
    late = LTETrainer(Regression(), **run, **settings(steps=steps))
    if steps == 10:
        with pytest.raises(StorageError, match="has taken all 10 local steps a head already"):
            late.fit()
    else:
        assert late.fit().metrics["version"] == 4
    directory = RunDirectory.of(str(tmp_path), "r")
    assert 2 in checkpoint.complete(directory)
    rows = (tmp_path / "r" / "metrics.jsonl").read_text()
    assert rows.count('"kind": "merge"') == steps // 5

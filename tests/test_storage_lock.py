"""One process trains a run at a time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ray_support import LONG, settings, storage

from lte_ray import LTETrainer, checkpoint
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


@pytest.mark.ray
@pytest.mark.parametrize("steps", [pytest.param(20, marks=LONG), 10], ids=["more to do", "nothing left"])
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

"""Heads that join, are dropped, or share a process, and runs that roll back, on a real Ray."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lte_ray import FailureConfig, LTEConfig, LTETrainer, MergeConfig, Shard, TrainConfig, fault_injection
from lte_ray.audit import Audit, audit
from lte_ray.config import PlacementConfig
from lte_ray.errors import CoordinatorLost
from lte_ray.run.metrics import SilentReporter
from tests.support.ray_runs import DropoutRegression, storage

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200), pytest.mark.slow]


@dataclass
class Faulty(DropoutRegression):
    """Steps of some milliseconds.

    `kills` is (head, step): the head's process dies each time at that step. From step `spikes` on, all heads get 12 batches
    with an absurd target. Files in `marks` record what has happened.
    """

    marks: str = ""
    kills: tuple[int, int] = (-1, -1)
    spikes: int = -1
    seconds: float = 0.05

    def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        for step, (x, y) in enumerate(super().train_batches(shard), shard.cursor + 1):
            time.sleep(self.seconds)
            if (shard.head, step) == self.kills:
                os.kill(os.getpid(), signal.SIGKILL)
            spiked = Path(self.marks, f"spiked-{shard.head}")
            if self.spikes >= 0 and step >= self.spikes and not spiked.exists():
                if step >= self.spikes + 12:
                    spiked.touch()
                yield x, y + 50.0
                continue
            yield x, y


class SlowUntilDrop(Faulty):
    """Heads are slow until one is dropped, so that the others haven't ended by then."""

    def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        rows = Path(self.marks, "r", "metrics.jsonl")
        for batch in super().train_batches(shard):
            if shard.head != self.kills[0] and not (rows.exists() and '"head_dropped"' in rows.read_text()):
                time.sleep(0.5)
            yield batch


def run(
    path: Path, worker: Faulty, heads: int, failure: FailureConfig, steps: int = 60, **merge: Any
) -> tuple[list[Any], Audit]:
    """Trains to the end; returns the rows of the metrics and their audit."""
    placement = PlacementConfig(cpus_per_head=0.5, heads_per_actor=merge.pop("heads_per_actor", 1))
    LTETrainer(
        worker,
        lte=LTEConfig(num_heads=heads, lora_r=8, lora_alpha=16),
        merge=MergeConfig(**{"merge_iter": 5, "merge_threads": 1, **merge}),
        train=TrainConfig(steps=steps, seed=3, budget="each", eval_every=0, checkpoint_every=2),
        scaling_config=placement,
        failure=failure,
        reporter=SilentReporter(),
        run_config=storage(path, "r"),
    ).fit()
    rows = [json.loads(line) for line in (path / "r" / "metrics.jsonl").read_text().splitlines()]
    return rows, audit(rows)


def events(rows: list[Any], name: str) -> list[Any]:
    return [row for row in rows if row.get("event") == name]


@pytest.mark.parametrize("merge", [{}, {"when": "arrival", "wait": False}], ids=["barrier", "async"])
def test_a_head_that_dies_repeatedly_is_dropped(local_ray: None, tmp_path: Path, merge: dict[str, Any]) -> None:
    """The others take over its data and finish; each of their batches is merged once."""
    failure = FailureConfig(head_failures=1, exhausted="drop", backoff=0.1)
    rows, report = run(tmp_path, SlowUntilDrop(marks=str(tmp_path), kills=(1, 12)), 3, failure, **merge)
    (dropped,) = events(rows, "head_dropped")
    assert dropped["heads"] == [1]
    assert len(events(rows, "head_lost")) in (2, 3)  # 3 if the driver learns of the last merge only after the first death
    assert report.clean, report.problems
    later = [row for row in rows if row["kind"] == "merge" and row["at"] > dropped["at"]]
    assert {head for row in later for head in row["heads"]} == {0, 2}


@pytest.mark.parametrize("merge", [{}, {"when": "arrival", "wait": False}], ids=["barrier", "async"])
def test_a_run_grows_if_resources_are_free(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merge: dict[str, Any]
) -> None:
    """A head joins, gets half of another head's data, and its contributions are merged."""
    monkeypatch.setattr("lte_ray.runtime.controller.failure_handling.GROW_EVERY", 1.0)
    rows, report = run(tmp_path, Faulty(seconds=0.1), 2, FailureConfig(max_heads=3), steps=150, **merge)
    assert [row["head"] for row in events(rows, "head_added")] == [2]
    assert any(2 in row["heads"] for row in rows if row["kind"] == "merge")
    assert report.clean, report.problems


def test_heads_that_share_a_process_die_and_restart_together(local_ray: None, tmp_path: Path) -> None:
    """Both heads of the process continue from what was merged of each, or both are dropped."""
    worker = Faulty(marks=str(tmp_path), kills=(1, 23))
    rows, report = run(tmp_path, worker, 4, FailureConfig(head_failures=0, exhausted="drop"), heads_per_actor=2)
    assert [row["heads"] for row in events(rows, "head_dropped")] == [[0, 1]]
    assert report.clean, report.problems
    once = tmp_path / "once"
    once.mkdir()

    class Once(Faulty):
        """The process dies only once."""

        def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
            for step, batch in enumerate(super().train_batches(shard), shard.cursor + 1):
                if (shard.head, step) == (2, 23) and not (once / "dead").exists():
                    (once / "dead").touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                yield batch

    rows, report = run(once, Once(), 4, FailureConfig(), heads_per_actor=2)
    assert [row["heads"] for row in events(rows, "head_restarts")] == [[2, 3]]
    assert report.clean, report.problems
    assert report.samples == 4 * 60 * DropoutRegression().batch_size


def test_a_run_rolls_back_after_a_loss_spike(local_ray: None, tmp_path: Path) -> None:
    """It continues from an earlier checkpoint with the data that comes next; batches in between are reported as skipped."""
    worker = Faulty(marks=str(tmp_path), spikes=80, seconds=0.03)
    rows, report = run(tmp_path, worker, 2, FailureConfig(), steps=160, rollback_z=6.0, max_norm_z=0.0)
    (rollback,) = events(rows, "rolled_back")
    assert 0 < rollback["version"] <= 16
    assert rollback["skipped_batches"] > 0
    assert report.clean, report.problems
    assert report.skipped == rollback["skipped_batches"]
    losses = [loss for row in rows if row["kind"] == "merge" for loss in row["train_loss"].values()]
    assert max(losses[-4:]) < 5.0
    assert torch.isfinite(torch.tensor(losses)).all()


def test_a_loader_that_hangs_is_reported_and_its_head_replaced(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its head answers but takes no step: the watchdog reports who waits for what, then the head is killed and restarted."""
    monkeypatch.setattr("lte_ray.runtime.controller.progress.STALLED_AFTER", 1.0)
    monkeypatch.setattr("lte_ray.engine.hang_detector.MIN_STANDSTILL", 4.0)

    class Stuck(Faulty):
        """The loader of head 1 blocks forever in step 23, once."""

        def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
            for step, batch in enumerate(super().train_batches(shard), shard.cursor + 1):
                if (shard.head, step) == (1, 23) and not Path(self.marks, "stuck").exists():
                    Path(self.marks, "stuck").touch()
                    threading.Event().wait()
                yield batch

    rows, report = run(tmp_path, Stuck(marks=str(tmp_path)), 2, FailureConfig())
    (hung,) = events(rows, "head_hung")
    assert hung["heads"] == [1]
    assert "it answers, but hasn't moved for" in hung["why"]
    reports = [row["why"] for row in events(rows, "still") if row["at"] < hung["at"]]
    assert any("head 0 is waiting" in why and "head 1 is training" in why for why in reports), reports
    assert [row["heads"] for row in events(rows, "head_restarts")] == [[1]]
    assert report.clean, report.problems
    assert report.samples == 2 * 60 * DropoutRegression().batch_size


def test_a_coordinator_that_keeps_dying_before_it_merges_ends_the_run(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may die as often as a head; then the run ends with an error that says so and saves what it has."""
    script = tmp_path / "script"
    script.mkdir()
    for number in range(5):
        fault = {"point": "decided", "version": 5, "signal": "SIGKILL"}
        (script / f"{number}.json").write_text(json.dumps(fault))
    monkeypatch.setenv(fault_injection.VARIABLE, str(script))
    with pytest.raises(CoordinatorLost, match=r"it died 3 times without a merge in between"):
        run(tmp_path, Faulty(), 2, FailureConfig(head_failures=1, backoff=0.1))
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert len(events(rows, "coordinator_lost")) == 3
    merged = [row["version"] for row in rows if row["kind"] == "merge"]
    assert merged in ([1, 2, 3], [1, 2, 3, 4])  # the driver may not have received the last one
    assert audit(rows).clean

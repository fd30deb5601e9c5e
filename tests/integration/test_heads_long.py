"""Heads that come, are given up, share a process, and a run that goes back, on a real Ray. `make chaos` runs these."""

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
from tests.support.ray_runs import Dropping, storage

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300), pytest.mark.slow]


@dataclass
class Marked(Dropping):
    """Steps of some milliseconds; `kills` names a head whose process dies each time at that step, `burns` a step with an
    absurd batch for all."""

    marks: str = ""
    kills: tuple[int, int] = (-1, -1)
    burns: int = -1
    seconds: float = 0.05

    def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        for step, (x, y) in enumerate(super().train_batches(shard), shard.cursor + 1):
            time.sleep(self.seconds)
            if (shard.head, step) == self.kills:
                os.kill(os.getpid(), signal.SIGKILL)
            burnt = Path(self.marks, f"burnt-{shard.head}")
            if self.burns >= 0 and step >= self.burns and not burnt.exists():
                if step >= self.burns + 12:
                    burnt.touch()
                yield x, y + 50.0
                continue
            yield x, y


class Unhurried(Marked):
    """Its heads take their time until one is dropped, so that the others haven't ended by then."""

    def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        rows = Path(self.marks, "r", "metrics.jsonl")
        for batch in super().train_batches(shard):
            if shard.head != self.kills[0] and not (rows.exists() and '"head_dropped"' in rows.read_text()):
                time.sleep(0.5)
            yield batch


def run(
    path: Path, worker: Marked, heads: int, failure: FailureConfig, steps: int = 60, **more: Any
) -> tuple[list[Any], Audit]:
    """The rows of a run to its end, and their audit."""
    placement = PlacementConfig(cpus_per_head=0.5, heads_per_actor=more.pop("heads_per_actor", 1))
    LTETrainer(
        worker,
        lte=LTEConfig(num_heads=heads, lora_r=8, lora_alpha=16),
        merge=MergeConfig(**{"merge_iter": 5, "merge_threads": 1, **more}),
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
def test_a_head_that_dies_again_and_again_is_dropped(local_ray: None, tmp_path: Path, merge: dict[str, Any]) -> None:
    """The others take its data, and end; each batch of theirs is merged once."""
    failure = FailureConfig(head_failures=1, exhausted="drop", backoff=0.1)
    rows, found = run(tmp_path, Unhurried(marks=str(tmp_path), kills=(1, 12)), 3, failure, **merge)
    (dropped,) = events(rows, "head_dropped")
    assert dropped["heads"] == [1]
    assert len(events(rows, "head_lost")) in (2, 3)  # the driver may hear of the merge before the first one after it
    assert found.clean, found.problems
    later = [row for row in rows if row["kind"] == "merge" and row["at"] > dropped["at"]]
    assert {head for row in later for head in row["heads"]} == {0, 2}


@pytest.mark.parametrize("merge", [{}, {"when": "arrival", "wait": False}], ids=["barrier", "async"])
def test_a_run_grows_where_there_is_room(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merge: dict[str, Any]
) -> None:
    """A head comes, is given half of somebody's data, and what it trains is merged."""
    monkeypatch.setattr("lte_ray.runtime.controller.failure_handling.GROW_EVERY", 1.0)
    rows, found = run(tmp_path, Marked(seconds=0.1), 2, FailureConfig(max_heads=3), steps=150, **merge)
    assert [row["head"] for row in events(rows, "head_added")] == [2]
    assert any(2 in row["heads"] for row in rows if row["kind"] == "merge")
    assert found.clean, found.problems


def test_heads_that_share_a_process_die_and_come_back_together(local_ray: None, tmp_path: Path) -> None:
    """Both of the process go on from what is merged of each."""
    worker = Marked(marks=str(tmp_path), kills=(1, 23))
    rows, found = run(tmp_path, worker, 4, FailureConfig(head_failures=0, exhausted="drop"), heads_per_actor=2)
    assert [row["heads"] for row in events(rows, "head_dropped")] == [[0, 1]]
    assert found.clean, found.problems
    once = tmp_path / "once"
    once.mkdir()

    class Once(Marked):
        """Dies the first time only."""

        def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
            for step, batch in enumerate(super().train_batches(shard), shard.cursor + 1):
                if (shard.head, step) == (2, 23) and not (once / "dead").exists():
                    (once / "dead").touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                yield batch

    rows, found = run(once, Once(), 4, FailureConfig(), heads_per_actor=2)
    assert [row["heads"] for row in events(rows, "head_restarts")] == [[2, 3]]
    assert found.clean, found.problems
    assert found.samples == 4 * 60 * Dropping().batch_size


def test_a_run_goes_back_after_a_spike(local_ray: None, tmp_path: Path) -> None:
    """To a checkpoint from before, with the data that comes next: what was trained in between is skipped, and said to be."""
    worker = Marked(marks=str(tmp_path), burns=80, seconds=0.03)
    rows, found = run(tmp_path, worker, 2, FailureConfig(), steps=160, rollback_z=6.0, max_norm_z=0.0)
    (back,) = events(rows, "rolled_back")
    assert 0 < back["version"] <= 16
    assert back["skipped_batches"] > 0
    assert found.clean, found.problems
    assert found.skipped == back["skipped_batches"]
    losses = [loss for row in rows if row["kind"] == "merge" for loss in row["train_loss"].values()]
    assert max(losses[-4:]) < 5.0
    assert torch.isfinite(torch.tensor(losses)).all()


def test_a_loader_that_stands_still_is_said_and_replaced(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its head answers, but takes no step: the watchdog says who waits for what, then the head is killed and started again."""
    monkeypatch.setattr("lte_ray.runtime.controller.progress.STALLED_AFTER", 1.0)
    monkeypatch.setattr("lte_ray.engine.hang_detector.MIN_STANDSTILL", 4.0)

    class Stuck(Marked):
        """Its loader waits for ever in step 23 of head 1, the first time."""

        def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
            for step, batch in enumerate(super().train_batches(shard), shard.cursor + 1):
                if (shard.head, step) == (1, 23) and not Path(self.marks, "stuck").exists():
                    Path(self.marks, "stuck").touch()
                    threading.Event().wait()
                yield batch

    rows, found = run(tmp_path, Stuck(marks=str(tmp_path)), 2, FailureConfig())
    (hung,) = events(rows, "head_hung")
    assert hung["heads"] == [1]
    assert "it answers, but hasn't moved for" in hung["why"]
    said = [row["why"] for row in events(rows, "still") if row["at"] < hung["at"]]
    assert any("head 0 is waiting" in why and "head 1 is training" in why for why in said), said
    assert [row["heads"] for row in events(rows, "head_restarts")] == [[1]]
    assert found.clean, found.problems
    assert found.samples == 2 * 60 * Dropping().batch_size


def test_a_coordinator_that_dies_without_a_merge_in_between_ends_the_run(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time before it merges anything: as often as a head may, then the run says so, and saves what there is."""
    script = tmp_path / "script"
    script.mkdir()
    for number in range(5):
        fault = {"point": "decided", "version": 5, "signal": "SIGKILL"}
        (script / f"{number}.json").write_text(json.dumps(fault))
    monkeypatch.setenv(fault_injection.VARIABLE, str(script))
    with pytest.raises(CoordinatorLost, match=r"it died 3 times without a merge in between"):
        run(tmp_path, Marked(), 2, FailureConfig(head_failures=1, backoff=0.1))
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert len(events(rows, "coordinator_lost")) == 3
    merged = [row["version"] for row in rows if row["kind"] == "merge"]
    assert merged in ([1, 2, 3], [1, 2, 3, 4])  # of the last one the driver may not have heard
    assert audit(rows).clean

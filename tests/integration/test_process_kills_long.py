"""Faults on a real Ray that take long to detect or to set up."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor

from lte_ray import Shard
from lte_ray.run.metrics import Progress
from tests.integration.test_process_kills import NOT_WAITING, STEPS, Chaos, Patient, fault
from tests.support.ray_runs import descendants

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200), pytest.mark.slow]


def test_a_head_and_a_coordinator_that_hang_before_their_first_answer(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are killed and replaced after a minute and a half without a first answer; the others train meanwhile."""
    faults = [
        fault("stepped", head=1, step=12),
        fault("begins", "SIGSTOP", head=1, incarnation=1),
        fault("decided", version=8),
        fault("coordinator begins", "SIGSTOP", epoch=1),
    ]
    chaos = Chaos(tmp_path, monkeypatch, faults, **NOT_WAITING)
    chaos.run()
    assert chaos.events["head_hung"] + chaos.events["head_lost"] >= 2
    assert chaos.events["coordinator_lost"] == 2
    assert any("since it was started" in row.get("why", "") for row in chaos.rows if row["kind"] == "event")


def test_a_coordinator_that_hangs_at_the_end_and_a_head_that_dies_while_it_saves(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint lacks that head's state; another coordinator ends the run."""
    faults = [fault("snapshot", head=1, step=STEPS), fault("finishes", "SIGSTOP")]
    chaos = Chaos(tmp_path, monkeypatch, faults)
    chaos.run()
    assert chaos.events["coordinator_lost"] == 1
    assert chaos.events["head_lost"] >= 1


class CountsResyncs:
    """A reporter that records the largest number of resyncs."""

    def __init__(self) -> None:
        self.resyncs = 0

    def update(self, progress: Progress) -> None:
        self.resyncs = max([self.resyncs, *(status.resyncs for status in progress.heads)])

    def close(self) -> None:
        """It displays nothing."""


@pytest.mark.parametrize("shards", [1, 2])
def test_heads_that_rejoin_fresh_leave_no_old_reference_anywhere(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    """Heads that redo merges from factors always have the coordinator's base: no checksum ever differs."""
    faults = [fault("stepped", head=1, step=22), fault("stepped", head=0, step=45)]
    chaos, counter = Chaos(tmp_path, monkeypatch, faults, shards=shards, send_down="factors", **NOT_WAITING), CountsResyncs()
    chaos.run(reporter=counter, rejoin="fresh")
    assert chaos.events["head_restarts"] == 2
    assert counter.resyncs == 0


@dataclass
class FastHeadZero(Patient):
    """Head 0 finishes long before the others, and writes its process id to a file."""

    def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        if shard.head == 0:
            Path(self.script, "head-0.pid").write_text(str(os.getpid()))
        for batch in super().train_batches(shard):
            if shard.head:
                time.sleep(0.1)
            yield batch


class KillsHeadAndCoordinator:
    """A reporter that kills head 0's process and the coordinator as soon as head 0 is done and all of it is merged."""

    def __init__(self, script: Path) -> None:
        self.script, self.done = script, False

    def update(self, progress: Progress) -> None:
        ended = any(status.head == 0 and status.state == "done" for status in progress.heads)
        if not ended or self.done:
            return
        self.done = True
        ours = descendants(os.getpid())
        pids = [pid for pid, line in ours.items() if "CoordinatorActor" in line]
        for pid in (int((self.script / "head-0.pid").read_text()), *pids):
            os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """It displays nothing."""


def test_a_finished_head_that_dies_with_the_coordinator_loses_nothing(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new process of the head trains again what no other process knows of its last merges."""
    chaos = Chaos(tmp_path, monkeypatch, [], merge_iter=20, max_lag=1000, **NOT_WAITING)
    killer = KillsHeadAndCoordinator(chaos.script)
    chaos.run(FastHeadZero, killer)
    assert killer.done
    assert chaos.events["coordinator_lost"] == 1
    assert max(row["step"] for row in chaos.rows if row["kind"] == "merge" and 0 in row["heads"]) == STEPS


def test_a_shard_and_an_evaluator_that_hang(local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are detected because they don't answer: coordinator and shards restart, and another process evaluates next."""
    monkeypatch.setattr("lte_ray.runtime.controller.evaluation.FIRST_ANSWER", 20.0)
    faults = [fault("shard receives", "SIGSTOP", head=1), fault("evaluates", "SIGSTOP")]
    chaos = Chaos(tmp_path, monkeypatch, faults, shards=2, **NOT_WAITING)
    chaos.run()
    assert chaos.events["coordinator_lost"] == chaos.events["evaluator_lost"] == 1
    assert any("hasn't answered for" in row["why"] for row in chaos.rows if row.get("event") == "coordinator_lost")

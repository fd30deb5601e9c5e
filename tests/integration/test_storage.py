"""Runs whose storage fails during training, on a real Ray: nothing is lost, and the failure is reported."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
import ray
import ray.train
import torch
from safetensors.torch import load_file
from torch import Tensor

from lte_ray import LTEConfig, LTETrainer, MergeConfig, Shard, TrainConfig, checkpoint, fault_injection
from lte_ray.audit import audit
from lte_ray.config import PlacementConfig, StorageConfig
from lte_ray.errors import RunError
from lte_ray.run import metrics
from lte_ray.run.metrics import Progress, SilentReporter
from lte_ray.run.metrics_files import MetricsReader
from lte_ray.storage import RunDirectory
from tests.support import faulty_storage
from tests.support.faulty_storage import FaultScript, FaultyHandler, fail
from tests.support.ray_runs import DropoutRegression

ray.cloudpickle.register_pickle_by_value(faulty_storage)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200), pytest.mark.slow]


HANG_SECONDS = 40.0


@dataclass
class Slow(DropoutRegression):
    """Steps take 30 ms, so that storage fails during training."""

    def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in super().train_batches(shard):
            time.sleep(0.03)
            yield batch


class StorageFault(SilentReporter):
    """Starts faults of the storage at a version and ends them after some seconds; records the notes it was to display."""

    def __init__(self, script: FaultScript, faults: list[dict[str, Any]], version: int, seconds: float) -> None:
        self.script, self.faults, self.version, self.seconds = script, faults, version, seconds
        self.since: float | None = None
        self.met = 0
        self.notes: set[str] = set()

    def update(self, progress: Progress) -> None:
        self.notes.add(progress.note)
        if self.since is None and progress.version >= self.version:
            self.since = time.monotonic()
            self.script.write(*self.faults)
        elif self.since is not None and time.monotonic() - self.since > self.seconds:
            self.met = self.script.count_met()
            self.script.write()
            self.seconds = float("inf")


def trainer(path: Path, reporter: StorageFault, steps: int = 120, **settings: Any) -> LTETrainer:
    return LTETrainer(
        Slow(),
        lte=LTEConfig(num_heads=2, lora_r=8, lora_alpha=16),
        merge=MergeConfig(merge_iter=5, merge_threads=1),
        train=TrainConfig(steps=steps, seed=3, eval_every=0, checkpoint_every=2),
        scaling_config=PlacementConfig(cpus_per_head=0.5),
        reporter=reporter,
        run_config=ray.train.RunConfig(
            name="r", storage_path=str(path), storage_filesystem=pafs.PyFileSystem(FaultyHandler(reporter.script.path))
        ),
        **settings,
    )


def rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in MetricsReader(RunDirectory.open(str(path), "r")).read().splitlines()]


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ([fail(errno="ENOSPC"), fail(op="append", errno="ENOSPC")], "No space left on device"),
        ([fail(op="*", errno="ETIMEDOUT")], "Connection timed out"),
        ([fail("slow", seconds=0.5), fail("slow", op="append", seconds=0.5)], None),
        ([fail("tear", errno="EIO")], "Input/output error"),
        ([fail("swallow")], "bytes have arrived"),
    ],
    ids=["full disk", "cut off", "slow", "torn", "swallowing"],
)
def test_a_run_waits_for_storage_that_fails_for_a_while(
    local_ray: None, tmp_path: Path, faults: list[dict[str, Any]], message: str | None
) -> None:
    """Training continues, failed writes are retried, and the run ends with its last checkpoint, all rows, and the model."""
    script = FaultScript(str(tmp_path / "script.json"))
    script.write()
    reporter = StorageFault(script, faults, version=5, seconds=4.0)
    result = trainer(tmp_path, reporter).fit()
    assert reporter.met > 0, "storage never failed"
    assert result.metrics is not None
    assert result.metrics["step"] == 120
    written = rows(tmp_path)
    assert [row["version"] for row in written if row["kind"] == "merge"] == list(range(1, 25))
    assert audit(written).clean
    assert message is None or any(message in note for note in reporter.notes), reporter.notes
    assert checkpoint.complete_versions(RunDirectory.open(str(tmp_path), "r"))[-1] == 24
    assert (tmp_path / "r" / "model.safetensors").exists()
    assert not list(tmp_path.rglob("*.part"))


class UpdateGaps(StorageFault):
    """Records the longest time between two updates from the driver."""

    longest, last = 0.0, float("inf")

    def update(self, progress: Progress) -> None:
        self.longest, self.last = max(self.longest, time.monotonic() - self.last), time.monotonic()
        super().update(progress)


def test_a_dead_head_is_replaced_while_storage_hangs(local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write of the metrics takes longer than the run; a head dies meanwhile, and nothing is lost."""
    script = FaultScript(str(tmp_path / "script.json"))
    script.write()
    faults = tmp_path / "faults"
    faults.mkdir()
    (faults / "00.json").write_text(json.dumps({"point": "stepped", "head": 1, "step": 80, "signal": "SIGKILL"}))
    monkeypatch.setenv(fault_injection.VARIABLE, str(faults))
    monkeypatch.setattr(metrics, "REMOTE_INTERVAL", 0.0)
    reporter = UpdateGaps(script, [fail("slow", match="*metrics-*.jsonl*", seconds=HANG_SECONDS)], version=5, seconds=2.0)
    result = trainer(tmp_path, reporter).fit()
    assert reporter.met > 0, "storage never hung"
    assert reporter.longest < HANG_SECONDS / 2
    assert result.metrics is not None
    assert result.metrics["step"] == 120
    written = rows(tmp_path)
    assert [row["event"] for row in written if row["kind"] == "event"][:2] == ["head_lost", "head_restarts"]
    versions = [row["version"] for row in written if row["kind"] == "merge"]  # for a while only of the other head
    assert versions == list(range(1, len(versions) + 1))
    assert audit(written).clean


def test_a_checkpoint_with_a_missing_part_does_not_count(local_ray: None, tmp_path: Path) -> None:
    """One head's files can't be written for a while: every complete checkpoint has all heads' states; the run says why."""
    script = FaultScript(str(tmp_path / "script.json"))
    script.write()
    reporter = StorageFault(script, [fail(match="*/head-0001*", errno="EACCES")], version=5, seconds=2.0)
    run = trainer(tmp_path, reporter, steps=200)
    run.run_config.checkpoint_config = ray.train.CheckpointConfig(num_to_keep=None)
    run.fit()
    assert reporter.met > 0, "storage never failed"
    directory = RunDirectory.open(str(tmp_path), "r")
    assert {checkpoint.read_manifest(directory, version).heads for version in checkpoint.complete_versions(directory)} == {
        (0, 1)
    }
    reasons = [row["why"] for row in rows(tmp_path) if row.get("event") == "storage"]
    assert any("couldn't be written: the state of head 1: " in why for why in reasons), reasons
    assert checkpoint.complete_versions(directory)[-1] == 40
    assert checkpoint.incomplete_versions(directory) == []


def test_a_run_whose_storage_never_recovers_exports_its_weights(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From some version on, no checkpoint can be written: the run trains to its end, exports, and says what is missing.

    The next driver resumes from the last complete checkpoint and reaches the same weights, bit by bit.
    """
    script = FaultScript(str(tmp_path / "script.json"))
    script.write()
    reporter = StorageFault(script, [fail(match="*/checkpoints/*", errno="ENOSPC")], version=5, seconds=float("inf"))
    failing = trainer(tmp_path, reporter)
    patience = StorageConfig(name="r", storage=str(tmp_path), storage_patience=2.0)
    monkeypatch.setattr("lte_ray.trainer._storage", lambda config, log: (patience, config.storage_filesystem))
    with pytest.raises(RunError, match=r"No space left on device.*The merged weights were exported"):
        failing.fit()
    monkeypatch.undo()
    last = checkpoint.complete_versions(RunDirectory.open(str(tmp_path), "r"))[-1]
    assert 4 <= last < 24
    assert audit(rows(tmp_path)).clean
    assert any("No space left on device" in row["why"] for row in rows(tmp_path) if row.get("event") == "storage")
    exported = load_file(tmp_path / "r" / "model.safetensors")
    resumed = trainer(tmp_path, reporter)
    resumed.run_config = StorageConfig(name="r", storage=str(tmp_path), resume=True)
    resumed.fit()
    merged = load_file(tmp_path / "r" / "model.safetensors")
    assert all(torch.equal(merged[name], value) for name, value in exported.items())
    assert audit(rows(tmp_path)).clean

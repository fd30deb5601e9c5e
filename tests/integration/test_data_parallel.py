"""Ordinary training in several processes by Ray Train: equal to one process, restarted when a process dies, and resumed."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lte_ray import LTEConfig, LTETrainer, MergeConfig, TrainConfig, fault_injection
from lte_ray.audit import audit
from lte_ray.config import FailureConfig, PlacementConfig
from lte_ray.errors import WorkerFailed
from lte_ray.run.metrics import SilentReporter
from tests.support.numerics import assert_near
from tests.support.ray_runs import FailingWorker, merged_in_process, storage
from workers.regression import Regression

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

HEADS = 4
EMA = 0.9


def trainer(path: Path, worker: Any = None, *, steps: int = 20, processes: int = 2, resume: bool = False) -> LTETrainer:
    return LTETrainer(
        worker or Regression(),
        lte=LTEConfig(num_heads=HEADS),
        merge=MergeConfig(merge_iter=5, merge_threads=1),
        train=TrainConfig(
            steps=steps,
            seed=3,
            baseline=True,
            baseline_processes=processes,
            ema=EMA,
            eval_every=2,
            checkpoint_every=1,
            threads_per_head=1,
        ),
        scaling_config=PlacementConfig(cpus_per_head=1),
        failure=FailureConfig(head_failures=2),
        reporter=SilentReporter(),
        run_config=storage(path, "r", resume=resume),
    )


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "r" / "metrics.jsonl").read_text().splitlines()]


def events_of(path: Path) -> list[str]:
    """The events of a run but for "still", which says that a loaded machine is slow to start."""
    return [row["event"] for row in rows_of(path) if row["kind"] == "event" and row["event"] != "still"]


def assert_near_one_process(path: Path) -> None:
    """The final weights and their moving average are those of one process, up to rounding."""
    train, merge = TrainConfig(steps=20, seed=3, baseline=True, ema=EMA), MergeConfig(merge_iter=5, merge_threads=1)
    for file, ema in (("model.safetensors", False), ("model-ema.safetensors", True)):
        expected = merged_in_process(Regression(), LTEConfig(num_heads=HEADS), merge, train, ema)
        model = load_file(path / "r" / file)
        assert model.keys() == expected.keys()
        for name, value in expected.items():
            assert_near(model[name], value, 1e-5)


def test_two_processes_equal_one_and_resume_as_one(shared_ray: None, tmp_path: Path) -> None:
    """Ten steps in two processes and ten in one: weights, losses, evaluations and records are those of one process."""
    first = trainer(tmp_path, steps=10).fit()
    assert first.metrics is not None
    assert (first.metrics["step"], first.metrics["samples"]) == (10, 10 * HEADS * 64)
    assert first.metrics["bytes_ddp"] > 0
    assert tomllib.loads((tmp_path / "r" / "run.toml").read_text())["baseline_processes"] == 2
    assert not (tmp_path / "r" / "ray-train").exists()
    result = trainer(tmp_path, processes=1, resume=True).fit()
    assert result.metrics is not None
    assert result.metrics["validation_loss"] < 0.3
    assert_near_one_process(tmp_path)
    rows = rows_of(tmp_path)
    merges = [row for row in rows if row["kind"] == "merge"]
    assert [(row["step"], row["samples"], row["heads"]) for row in merges] == [
        (n, 5 * HEADS * 64, [0]) for n in (5, 10, 15, 20)
    ]
    assert {row["version"] for row in rows if row["kind"] == "evaluation"} == {0, 2, 4}
    assert audit(rows).clean


@pytest.mark.slow
def test_the_workers_error_ends_the_run(shared_ray: None, tmp_path: Path) -> None:
    """As WorkerFailed, without another start; what was saved before it stays."""
    with pytest.raises(WorkerFailed, match="the disk of the data is gone"):
        trainer(tmp_path, FailingWorker(head=1, at=13)).fit()
    assert events_of(tmp_path) == ["ended_early"]
    assert (tmp_path / "r" / "checkpoints" / "000001" / "manifest.json").exists()


@pytest.mark.slow
def test_a_killed_process_restarts_all_from_the_newest_checkpoint(
    shared_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever process it is. No batch is lost or repeated, and the weights are those of a run without faults."""
    script = tmp_path / "script"
    script.mkdir()
    for rank, step in ((1, 10), (0, 15)):
        fault = {"point": "round", "signal": "SIGKILL", "head": rank, "step": step}
        (script / f"{rank}.json").write_text(json.dumps(fault))
    monkeypatch.setenv(fault_injection.VARIABLE, str(script))
    result = trainer(tmp_path).fit()
    assert not list(script.glob("*.json"))
    assert result.metrics is not None
    assert result.metrics["step"] == 20
    assert events_of(tmp_path) == ["processes_restart", "processes_restart", "finished"]
    assert audit(rows_of(tmp_path)).clean
    assert_near_one_process(tmp_path)

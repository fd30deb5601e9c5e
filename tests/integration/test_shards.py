"""Runs on a real Ray whose merging is spread over shard processes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch
from safetensors.torch import load_file
from torch import nn

from lte_ray import LTETrainer, Merge, MergeConfig, Pending, Roster
from lte_ray.config import FailureConfig
from lte_ray.errors import ConfigError, CoordinatorLost, PolicyError
from lte_ray.run.metrics import Progress
from tests.support.ray_runs import (
    DropoutRegression,
    assert_same_model,
    descendants,
    lte_actors,
    merged_in_process,
    settings,
    storage,
)
from workers.regression import Regression

pytestmark = pytest.mark.ray


class Deep(DropoutRegression):
    """Several adapted weights of several shapes, and dropout."""

    def build_model(self) -> nn.Module:
        more = [nn.Sequential(nn.Linear(self.width, k), nn.Tanh(), nn.Linear(k, self.width)) for k in (48, 16)]
        return nn.Sequential(*more, *list(super().build_model())[:-2], nn.Linear(2 * self.width, self.width), nn.Dropout(0.1))


ROUNDED: dict[str, Any] = {"send_down": "factors", "transfer": "int8"}


def fit(path: Path, name: str, steps: int = 20, worker: Any = None, resume: bool = False, **merge: Any) -> ray.train.Result:
    """A run of two heads that merge every five steps, with evaluations and checkpoints."""
    kwargs = settings(steps, eval_every=2, checkpoint_every=2)
    kwargs["merge"] = MergeConfig(**{"merge_iter": 5, "merge_threads": 1, **merge})
    return LTETrainer(worker or Deep(), run_config=storage(path, name, resume=resume), **kwargs).fit()


def model_of(result: ray.train.Result) -> dict[str, torch.Tensor]:
    return load_file(Path(result.path) / "model.safetensors")


def rows(result: ray.train.Result, kind: str) -> list[dict[str, Any]]:
    all_rows = [json.loads(line) for line in (Path(result.path) / "metrics.jsonl").read_text().splitlines()]
    return [row for row in all_rows if row["kind"] == kind]


def assert_equal(a: ray.train.Result, b: ray.train.Result) -> None:
    one, other = model_of(a), model_of(b)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def shards() -> list[int]:
    """Process ids of the shards among this process's descendants."""
    return [pid for pid, line in descendants(os.getpid()).items() if "ShardActor" in line]


def assert_no_processes_left() -> None:
    deadline = time.monotonic() + 120
    while (shards() or lte_actors()) and time.monotonic() < deadline:  # they were killed; the kernel takes a moment
        time.sleep(0.05)
    assert (shards(), lte_actors()) == ([], [])


@pytest.mark.slow
def test_a_run_with_shards_is_bitwise_the_simulated_one(local_ray: None, tmp_path: Path) -> None:
    """Heads redo merges from rounded factors that three shards hold, and their outer steps; no process is left."""
    how = {**ROUNDED, "policy": "nesterov", "policy_args": {"lr": 0.7, "momentum": 0.5, "final_lr": 0.5}}
    result = fit(tmp_path, "r", shards=3, **how)
    merge = MergeConfig(merge_iter=5, merge_threads=1, **how)
    assert_same_model(result.path, merged_in_process(Deep(), **settings(20) | {"merge": merge}))
    assert result.metrics["resyncs"] == 0
    assert_no_processes_left()


@pytest.mark.slow
@pytest.mark.parametrize("merge", [{}, ROUNDED], ids=["dense", "factors in int8"])
def test_a_run_with_shards_is_bitwise_the_one_without(local_ray: None, tmp_path: Path, merge: dict[str, Any]) -> None:
    """Weights, evaluations, checkpoints, and bytes are the same, and no process is left."""
    one, three = fit(tmp_path, "one", **merge), fit(tmp_path, "three", shards=3, **merge)
    assert_equal(one, three)
    assert [r["values"] for r in rows(one, "evaluation")][-1] == [r["values"] for r in rows(three, "evaluation")][-1]
    same = ("version", "step", "steps", "samples", "losses", "weight", "lag", "bytes_down")
    assert [[r.get(k) for k in same] for r in rows(one, "merge")] == [[r.get(k) for k in same] for r in rows(three, "merge")]
    saved = [load_file(tmp_path / name / "checkpoints" / "000004" / "base.safetensors") for name in ("one", "three")]
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])
    assert three.metrics["resyncs"] == 0
    assert_no_processes_left()


@pytest.mark.parametrize("down", ["dense", "factors"])
@pytest.mark.slow
def test_heads_that_never_wait_lose_no_step_with_shards(local_ray: None, tmp_path: Path, down: str) -> None:
    """Every step is merged once, evaluations and checkpoints are written during training, and the loss falls."""
    result = fit(tmp_path, "r", 60, Regression(), when="arrival", wait=False, shards=2, send_down=down)
    assert sum(row["steps"] for row in rows(result, "merge")) == 2 * 60
    assert [row["version"] for row in rows(result, "merge")] == list(range(1, result.metrics["version"] + 1))
    assert result.metrics["validation_loss"] < 0.3  # 0.67 before
    assert result.metrics["resyncs"] == 0
    assert_no_processes_left()


@pytest.mark.slow
def test_a_resumed_run_with_shards_is_bitwise_the_uninterrupted_run(local_ray: None, tmp_path: Path) -> None:
    """The shards read the references from the heads' files of the checkpoint and send them to the heads."""
    merge = {"shards": 2, **ROUNDED}
    uninterrupted = fit(tmp_path, "whole", 30, **merge)
    fit(tmp_path, "parts", 20, **merge)
    assert_equal(uninterrupted, fit(tmp_path, "parts", 30, resume=True, **merge))


class ReadsNorms:
    """Reads norms of contributions at the second merge."""

    def merge(self, pending: Sequence[Pending], roster: Roster) -> Merge:
        return Merge({p.head: 1 / roster.num_heads if roster.version < 1 else p.norm() for p in pending})


def test_a_built_in_policy_that_needs_tensors_is_refused(local_ray: None, tmp_path: Path) -> None:
    """The error comes before anything starts."""
    with pytest.raises(ConfigError, match=r"--policy median .*needs --shards 1, but --shards is 2"):
        fit(tmp_path, "r", policy="median", shards=2)
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_a_policy_that_needs_tensors_ends_a_run_with_shards(local_ray: None, tmp_path: Path) -> None:
    """A user's policy ends it when it reads them; no process is left."""
    with pytest.raises(PolicyError, match="ReadsNorms looked at the tensors of a contribution, which needs --shards 1"):
        fit(tmp_path, "r", policy=ReadsNorms(), shards=2)
    assert_no_processes_left()


def test_more_shards_than_weights_are_refused(local_ray: None, tmp_path: Path) -> None:
    """The message says how many are possible; no run directory is created."""
    with pytest.raises(ConfigError, match=r"--shards is 9, but the model has 6 adapted weights"):
        fit(tmp_path, "r", shards=9)
    assert not (tmp_path / "r").exists()


class ShardKiller:
    """A reporter that kills a shard's process after the second merge."""

    def update(self, progress: Progress) -> None:
        alive = shards()
        if progress.version >= 2 and alive:
            os.kill(min(alive), 9)

    def close(self) -> None:
        """It displays nothing."""


@pytest.mark.slow
def test_a_shard_that_dies_ends_the_run_and_is_named(local_ray: None, tmp_path: Path) -> None:
    """With max_failures=0; no head waits forever."""
    kwargs = settings(100_000) | {"merge": MergeConfig(merge_iter=5, merge_threads=1, shards=2)}
    with pytest.raises(CoordinatorLost, match=r"[Tt]he process of coordinator shard [01] died"):
        LTETrainer(
            Regression(),
            run_config=storage(tmp_path, "r"),
            failure=FailureConfig(max_failures=0),
            reporter=ShardKiller(),
            **kwargs,
        ).fit()
    assert_no_processes_left()

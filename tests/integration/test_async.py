"""Merging without waiting, on a real Ray: nothing is lost, and heads that redo merges get the coordinator's base."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray.train
from torch import Tensor

from lte_ray import LTETrainer, MergeConfig, Shard
from lte_ray.config import PlacementConfig
from tests.support.ray_runs import BatchNormRegression, assert_same_model, merged_in_process, settings, storage
from workers.regression import Regression

pytestmark = pytest.mark.ray


@dataclass
class Slow(Regression):
    """Each step sleeps, longer in head 0."""

    seconds: float = 0.01
    slow_seconds: float = 0.06

    def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in super().train_batches(shard):
            time.sleep(self.slow_seconds if shard.head == 0 else self.seconds)
            yield batch


def fit(path: Path, worker: Any, steps: int = 40, actors: dict[str, Any] | None = None, **merge: Any) -> ray.train.Result:
    """A run of two heads that merge every five steps."""
    kwargs = settings(steps, eval_every=0, checkpoint_every=0)
    kwargs["merge"] = MergeConfig(**{"merge_iter": 5, "merge_threads": 1, **merge})
    placement = PlacementConfig(**(actors or {}))
    return LTETrainer(worker, run_config=storage(path, "r"), scaling_config=placement, **kwargs).fit()


def merges(result: ray.train.Result) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (Path(result.path) / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "merge"]


def expected(worker: Any, steps: int, **merge: Any) -> dict[str, Tensor]:
    """The merged model of the same run without Ray."""
    return merged_in_process(worker, **(settings(steps) | {"merge": MergeConfig(merge_iter=5, merge_threads=1, **merge)}))


NESTEROV: dict[str, Any] = {"policy": "nesterov", "policy_args": {"lr": 0.7, "momentum": 0.5, "replica_lr": 0.9}}


@pytest.mark.slow
@pytest.mark.parametrize("policy", [{}, NESTEROV], ids=["average", "nesterov"])
def test_a_barrier_run_by_factors_is_bitwise_the_one_by_bases(local_ray: None, tmp_path: Path, policy: dict[str, Any]) -> None:
    """Heads that redo merges from each other's factors train on the same bits, dropout and statistics included."""
    result = fit(tmp_path, BatchNormRegression(), 30, send_down="factors", **policy)
    assert_same_model(result.path, expected(BatchNormRegression(), 30, **policy))
    assert result.metrics["resyncs"] == 0


@pytest.mark.parametrize(
    ("down", "policy"),
    [
        pytest.param("dense", {}, marks=pytest.mark.slow),
        ("factors", NESTEROV),
        pytest.param("int8", {"policy": "orthogonal"}, marks=pytest.mark.slow),
    ],
    ids=["dense", "factors", "int8"],
)
def test_heads_that_never_wait_lose_no_step(local_ray: None, tmp_path: Path, down: str, policy: dict[str, Any]) -> None:
    """Each step is merged exactly once; the faster head takes more of them, and the loss falls."""
    result = fit(tmp_path, Slow(), 60, when="arrival", wait=False, send_down=down, **policy)
    rows = merges(result)
    assert sum(row["steps"] for row in rows) == 2 * 60
    assert sum(row["samples"] for row in rows) == 2 * 60 * Regression().batch_size
    taken = {head: sum(row["steps"] for row in rows if row["heads"] == [head]) for head in (0, 1)}
    assert taken[1] > 2 * taken[0] > 0
    assert all(weight == 0.5 for row in rows for weight in row["weight"].values())
    assert result.metrics["validation_loss"] < 0.3  # 0.67 before
    assert result.metrics["resyncs"] == 0
    assert result.metrics["times"]["wait"] < 0.1 * result.metrics["times"]["train"] + 0.5  # the slow head's last round


@pytest.mark.slow
def test_a_head_that_falls_behind_is_rebased_within_a_round(local_ray: None, tmp_path: Path) -> None:
    """The other head is five times as fast: with max_lag 2, the slow one never contributes from a much older version."""
    lags = {}
    for max_lag in (2, 1000):
        result = fit(
            tmp_path / str(max_lag),
            Slow(seconds=0.02, slow_seconds=0.1),
            50,
            when="arrival",
            wait=False,
            max_lag=max_lag,
            merge_iter=5,
        )
        lags[max_lag] = max(row["lag"].get("0", 0) for row in merges(result))
    assert lags[2] <= 2 + 2  # two more may be published during one step
    assert lags[1000] >= 4


@pytest.mark.slow
@pytest.mark.parametrize("down", ["dense", "factors"])
def test_virtual_heads_never_wait(local_ray: None, tmp_path: Path, down: str) -> None:
    """Two heads of one actor share main weights; each adoption of a version updates the references of both."""
    one_actor = {"heads_per_actor": 2, "stack_heads": "never"}
    result = fit(tmp_path, Regression(), 60, one_actor, when="arrival", wait=False, send_down=down)
    assert sum(row["steps"] for row in merges(result)) == 2 * 60
    assert result.metrics["validation_loss"] < 0.3  # 0.67 before


@pytest.mark.slow
def test_a_deadline_ends_the_wait_for_a_quorum(local_ray: None, tmp_path: Path) -> None:
    """A quorum of both would wait for the slow head; after the deadline the fast one is merged alone."""
    result = fit(tmp_path, Slow(seconds=0.005, slow_seconds=0.3), 20, when="quorum", quorum=2, deadline=0.2, wait=False)
    assert any(row["heads"] == [1] for row in merges(result))
    assert sum(row["steps"] for row in merges(result)) == 2 * 20


@pytest.mark.slow
def test_heads_of_different_speed_contribute_together(local_ray: None, tmp_path: Path) -> None:
    """With match_speed the fast head takes more steps per round, so that it hardly waits for the slow one."""
    result = fit(tmp_path, Slow(seconds=0.02, slow_seconds=0.08), 60, match_speed=True)
    rows = merges(result)
    assert sum(row["steps"] for row in rows) == 2 * 60
    assert max(row["steps"] for row in rows) > 15  # the slow head takes 5, the other more than twice as many


@pytest.mark.slow
def test_contributions_can_be_due_by_time(local_ray: None, tmp_path: Path) -> None:
    """merge_every: once its speed is known, each head takes the steps that fit into the interval."""
    result = fit(tmp_path, Slow(seconds=0.02, slow_seconds=0.08), 60, merge_every="0.4s", when="arrival", wait=False)
    by_head = {head: [row["steps"] for row in merges(result) if row["heads"] == [head]] for head in (0, 1)}
    assert max(by_head[1]) > 2 * max(by_head[0][1:])


class KeepsImprovements:
    """Keeps only merges that lower the loss."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def merge(self, pending: Any, roster: Any) -> Any:
        from lte_ray.merging import Discard, Merge, Try

        merge = Merge({p.head: 0.5 for p in pending})
        heads = [p.head for p in pending]

        def judge(values: Any) -> Any:
            self.losses.append(values["validation_loss"])
            return merge if self.losses[-1] <= min(self.losses) else Discard(heads, "the loss rose")

        return Try(merge, judge)


def test_a_policy_can_try_a_merge_first(local_ray: None, tmp_path: Path) -> None:
    """The evaluator evaluates each candidate before any head gets it; losses of the kept ones only fall."""
    result = fit(tmp_path, Regression(), 30, policy=KeepsImprovements())
    assert 0 < len(merges(result)) <= 6
    assert result.metrics["validation_loss"] < 0.4


@pytest.mark.slow
def test_int8_and_topk_lose_little(local_ray: None, tmp_path: Path) -> None:
    """The next contribution includes what rounding left out: the loss is close to that of fp32, with a quarter of the bytes."""
    exact = fit(tmp_path / "a", Regression(), 60)
    compressed = fit(tmp_path / "b", Regression(), 60, transfer="int8", replica_topk=0.5)
    assert compressed.metrics["bytes_up"] < 0.3 * exact.metrics["bytes_up"]
    assert compressed.metrics["validation_loss"] < 1.5 * exact.metrics["validation_loss"] + 0.005


@pytest.mark.slow
@pytest.mark.parametrize(
    "merge", [{"when": "quorum", "quorum": 1}, {"when": "arrival"}, {"wait": False, "max_lag": 0}, {"wait": False}]
)
def test_virtual_heads_are_merged_one_by_one_and_saved(local_ray: None, tmp_path: Path, merge: dict[str, Any]) -> None:
    """Contributions of one actor's heads are answered at different times; a checkpoint at every merge delays no head."""
    kwargs = settings(30, eval_every=0, checkpoint_every=1, budget="each")
    kwargs["merge"] = MergeConfig(merge_iter=5, merge_threads=1, **merge)
    placement = PlacementConfig(heads_per_actor=2, stack_heads="never")
    result = LTETrainer(Regression(), run_config=storage(tmp_path, "r"), scaling_config=placement, **kwargs).fit()
    assert sum(row["steps"] for row in merges(result)) == 2 * 30
    assert result.checkpoint is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shards", "down"), [((1, 1), "factors"), ((2, 1), "factors"), ((1, 2), "factors"), ((1, 1), "int8"), ((2, 1), "int8")]
)
def test_a_resumed_run_keeps_momentum_residual_and_average(
    local_ray: None, tmp_path: Path, shards: tuple[int, int], down: str
) -> None:
    """Bitwise equal to the uninterrupted run, also with another number of shards: the checkpoint has them."""
    policy = {"policy": "nesterov", "policy_args": {"lr": 0.7, "momentum": 0.5, "warmup": 4}}
    for steps, count, resume in ((15, shards[0], False), (30, shards[1], True)):
        merge = MergeConfig(merge_iter=5, merge_threads=1, shards=count, send_down=down, **policy)  # type: ignore[arg-type]
        worker, config = BatchNormRegression(), storage(tmp_path, "r", resume=resume)
        resumed = LTETrainer(worker, run_config=config, **(settings(steps, ema=0.9) | {"merge": merge})).fit()
    assert resumed.metrics["resyncs"] == 0
    assert_same_model(resumed.path, expected(BatchNormRegression(), 30, send_down=down, **policy))
    in_process = settings(30, ema=0.9) | {"merge": MergeConfig(merge_iter=5, merge_threads=1, send_down=down, **policy)}  # type: ignore[arg-type]
    average = merged_in_process(BatchNormRegression(), **in_process, ema=True)  # type: ignore[arg-type]
    assert_same_model(resumed.path, average, "model-ema.safetensors")
    assert resumed.metrics["ema_validation_loss"] != resumed.metrics["validation_loss"]
    names = {path.name for path in (Path(resumed.path) / "checkpoints" / "000006").iterdir()}
    assert {"momentum.safetensors", "ema.safetensors"} <= names
    assert ("residual.safetensors" in names) == (down == "int8")

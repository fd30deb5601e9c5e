"""The baseline: ordinary training of the same worker on as many samples, by one process."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lte_ray.config import FailureConfig, LTEConfig, MergeConfig, TrainConfig
from lte_ray.config.baseline import baseline_failure
from lte_ray.config.cluster_model import ClusterModel
from lte_ray.data import Shard
from lte_ray.engine.in_process import InProcessRun, run_in_process
from lte_ray.engine.settings import Settings
from lte_ray.merging.flat_buffer import gather
from lte_ray.simulation import simulate_training
from lte_ray.worker import build_model, endless_batches
from tests.support.numerics import assert_near
from tests.support.tiny_worker import Tiny
from workers.regression import Regression


@dataclass
class Scheduled(Tiny):
    """The rate falls to zero."""

    def build_schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_steps)


def make(lte: LTEConfig | None = None, merge: MergeConfig | None = None, **train: object) -> Settings:
    settings = TrainConfig(**{"steps": 12, "seed": 3, "baseline": True} | train)  # type: ignore[arg-type]
    return Settings("test", lte or LTEConfig(num_heads=3), merge or MergeConfig(merge_iter=5), settings)


def run(settings: Settings, worker: Tiny | None = None) -> InProcessRun:
    return run_in_process(worker or Tiny(), settings, torch.float64)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_baseline_equals_a_plain_pytorch_loop(optimizer: str, accumulate: int) -> None:
    """Same seed, same batches, one concatenated batch of all heads' samples a step, with clipping and a schedule."""
    worker = Scheduled(optimizer=optimizer)
    settings = make(accumulate=accumulate, clip_norm=0.5)
    result = run(settings, worker)

    model = build_model(worker, 3)
    batches = [endless_batches(worker, Shard(head, 3, 3)) for head in range(3)]
    optimizer_ = worker.build_optimizer([{"params": list(model.parameters())}])
    schedule = worker.build_schedule(optimizer_, 12)
    for _ in range(12):
        parts = [next(each) for each in batches for _ in range(accumulate)]
        words, following = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        worker.loss(model, (words, following)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer_.step()
        optimizer_.zero_grad()
        schedule.step()
    expected = gather(result.plan.base, dict(model.named_parameters()), torch.float64)
    assert_near(result.base, expected, {"sgd": 1e-13, "adamw": 1e-11}[optimizer])
    assert [m.version for m in result.merges] == [1, 2, 3]
    assert sum(m.samples for m in result.merges) == 12 * 3 * accumulate * 4


@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 20))
def test_a_step_of_one_head_reads_the_batches_of_all_heads(heads: int, accumulate: int, step: int) -> None:
    """Slots N a t to N a (t + 1) - 1, in step t with N heads that accumulate `a` batches."""
    taken = sorted(
        slot for head in range(heads) for slot in islice(Shard(head, heads, 0, step * accumulate).slots(), accumulate)
    )
    assert taken == list(islice(Shard(0, 1, 0, step * accumulate * heads).slots(), accumulate * heads))


def test_float32_rounds_at_merges_only() -> None:
    """W' + (W - W') isn't exactly W: a run that is merged at each step differs by less than a millionth."""
    often, once = (
        run_in_process(Regression(samples=512), make(merge=MergeConfig(merge_iter=every), steps=40)).base for every in (1, 40)
    )
    assert not torch.equal(often, once)
    assert torch.linalg.vector_norm(often - once) <= 1e-6 * torch.linalg.vector_norm(once)


def test_settings_of_factors_and_merging_do_not_count() -> None:
    """One command line gives LTE and, with --baseline, the same ordinary training whatever else it says."""
    lte = LTEConfig(
        num_heads=3,
        lora_r=(1, 2, 3),
        lora_alpha=5.0,
        rslora=True,
        reset="B",
        lora_bias="lora",
        base_dtype="int8",
        layers=("up: lora_r=2 base_dtype=bf16", "down: lora_bias=frozen"),
    )
    merge = MergeConfig(
        merge_iter=5, policy="nesterov", when="arrival", transfer="int8", replica_topk=0.1, shards=2, match_speed=True
    )
    assert torch.equal(run(make(lte, merge, budget="shared")).base, run(make()).base)
    kept = make(LTEConfig(num_heads=3, layers=("up: lora_r=2 lr=0.5",), exclude=("down",), adapt=("linear",), strict=True))
    expected = LTEConfig(num_heads=1, full_rank=True, layers=("up: lr=0.5",), exclude=("down",), adapt=("linear",), strict=True)
    assert kept.resolved().lte == expected
    failure = baseline_failure(FailureConfig(min_heads=2, max_heads=4, max_failures=1))
    assert failure == FailureConfig(max_failures=1)


def test_resolving_twice_changes_nothing() -> None:
    """Callers may resolve settings that are resolved already; without --baseline they stay as they are."""
    once = make(accumulate=2).resolved()
    assert (once.train.accumulate, once.lte.num_heads, once.merge.merge_iter) == (6, 1, 5)
    assert once.resolved() == once
    lte = make(baseline=False)
    assert lte.resolved() is lte


def test_a_simulated_baseline_is_the_same() -> None:
    """Under the virtual clock it gives the same weights, bit by bit."""
    simulated = simulate_training(Tiny(), make(), ClusterModel(), torch.float64)
    assert torch.equal(simulated.base, run(make()).base)
    assert len(simulated.record.heads) == 1

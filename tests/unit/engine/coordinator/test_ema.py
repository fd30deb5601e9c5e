"""The moving average of the base: its decay per local step, and its values, against loops that take one step at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.config.cluster_model import ClusterModel
from lte_ray.data import Shard
from lte_ray.engine.coordinator.ema import keep_at_merge, kept_share, mean_step, with_ema
from lte_ray.engine.in_process import run_in_process
from lte_ray.engine.settings import Settings
from lte_ray.errors import WorkerError
from lte_ray.messages import CommittedPosition, MergeRecord
from lte_ray.simulation import simulate_training
from lte_ray.worker import build_model, endless_batches
from tests.support.numerics import assert_near
from tests.support.tiny_worker import Tiny

decays = st.floats(0.01, 0.9999)


def decay_at(decay: float, step: int) -> float:
    return min(decay, (1 + step) / (10 + step))


@given(decays, st.integers(0, 3000), st.integers(0, 300))
def test_a_merge_keeps_the_product_of_its_steps_decays(decay: float, start: int, steps: int) -> None:
    """Each step's decay is at most (1 + n) / (10 + n)."""
    expected = math.prod(decay_at(decay, step) for step in range(start, start + steps))
    assert math.isclose(kept_share(decay, start, start + steps), expected, rel_tol=1e-9, abs_tol=1e-300)


@given(decays, st.floats(0, 3000), st.floats(0, 300), st.floats(0, 300))
def test_two_merges_keep_what_one_with_the_steps_of_both_keeps(decay: float, start: float, one: float, other: float) -> None:
    """Also between whole steps; a share is from 0 to 1."""
    whole = kept_share(decay, start, start + one + other)
    parts = kept_share(decay, start, start + one) * kept_share(decay, start + one, start + one + other)
    assert 0 <= whole <= 1
    assert math.isclose(whole, parts, rel_tol=1e-6, abs_tol=1e-300)


def test_a_merge_of_one_of_n_heads_counts_an_nth_of_its_steps() -> None:
    """Merges of 4 heads, one after the other, keep what one merge of all four keeps; heads that have left don't count."""
    positions = {head: CommittedPosition(step=500) for head in range(5)}
    together = keep_at_merge(0.99, positions, range(4), dict.fromkeys(range(4), 510))
    product = 1.0
    for head in range(4):
        keep = keep_at_merge(0.99, positions, range(4), {head: 510})
        assert keep is not None
        product *= keep
        positions[head] = CommittedPosition(step=510)
    assert together is not None
    assert math.isclose(product, together, rel_tol=1e-9)
    assert mean_step(positions, range(4)) == 510
    assert keep_at_merge(0.0, positions, range(4), {0: 520}) is None


class Normed(nn.Module):
    """A linear layer, running statistics, and another."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.norm(self.up(x))))


@dataclass
class Recording:
    """Its evaluation records the model's weights and statistics."""

    seen: list[Tensor] = field(default_factory=list)

    def build_model(self) -> nn.Module:
        return Normed().double()

    def train_batches(self, shard: Shard) -> Iterator[Tensor]:
        x = torch.randn(64, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        for indices in shard.indices(64, 8):
            yield x[indices]

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) - batch[:, :2].square()).square().mean()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        self.seen.append(flat(model))
        return {"sum": float(self.seen[-1].sum())}

    def build_optimizer(self, params: list[dict]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.05)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([t.detach().flatten().clone() for t in model.state_dict().values() if t.is_floating_point()])


def make(decay: float, heads: int = 2, steps: int = 12, merge: MergeConfig | None = None, **train: Any) -> Settings:
    lte = LTEConfig(num_heads=heads, lora_r=2)
    return Settings("test", lte, merge or MergeConfig(merge_iter=3), TrainConfig(steps=steps, seed=3, ema=decay, **train))


def run(settings: Settings) -> tuple[Recording, list[MergeRecord], list[Mapping[str, float]]]:
    worker, records, figures = Recording(), list[MergeRecord](), list[Mapping[str, float]]()

    def on_merge(record: MergeRecord, evaluate: Callable[[], Mapping[str, float]]) -> None:
        records.append(record)
        figures.append(evaluate())

    run_in_process(worker, settings, torch.float64, on_merge=on_merge)
    return worker, records, figures


@pytest.mark.parametrize(
    "merge",
    [
        {},
        {"policy": "nesterov", "policy_args": {"lr": 0.7, "momentum": 0.5}},
        {"policy": "median"},
        {"send_down": "int8"},
        {"when": "arrival"},
        {"merge_schedule": "0:1 0.5:4"},
    ],
    ids=str,
)
def test_the_average_is_that_of_a_loop_over_the_bases(merge: dict[str, Any]) -> None:
    """In float64, with running statistics, for every way of merging. A merge moves the step by its steps per head."""
    worker, records, figures = run(make(0.9, merge=MergeConfig(**{"merge_iter": 3} | merge)))
    start = flat(build_model(worker, 3))
    average, half_steps = start.clone(), 0
    for record, values, base, ema in zip(records, figures, worker.seen[::2], worker.seen[1::2], strict=True):
        keep = kept_share(0.9, half_steps / 2, (half_steps + record.steps) / 2)
        assert record.ema_keep is not None
        assert math.isclose(record.ema_keep, keep, rel_tol=1e-12)
        half_steps += record.steps
        average = keep * average + (1 - keep) * base
        assert_near(ema, average, 1e-12)
        assert set(values) == {"sum", "ema_sum"}
        assert math.isclose(values["ema_sum"], float(ema.sum()), rel_tol=1e-12)
    assert half_steps == 24
    assert not torch.equal(average, base)


def test_it_is_torchs_averaged_model_of_a_plain_loop() -> None:
    """--baseline that merges every step: `AveragedModel` with buffers, updated after each optimizer step."""
    worker, _, _ = run(make(0.7, heads=1, merge=MergeConfig(merge_iter=1), baseline=True))
    model, steps = build_model(worker, 3), 0

    def update(average: Tensor, new: Tensor, count: Any) -> Tensor:
        return torch.lerp(average, new, 1 - decay_at(0.7, steps)) if new.is_floating_point() else new

    average = AveragedModel(model, avg_fn=update, use_buffers=True)
    average.update_parameters(model)  # the first call copies
    optimizer = worker.build_optimizer(list(model.parameters()))  # type: ignore[arg-type]
    for batch in islice(endless_batches(worker, Shard(0, 1, 3)), 12):
        optimizer.zero_grad()
        worker.loss(model, batch).backward()
        optimizer.step()
        average.update_parameters(model)
        steps += 1
    assert_near(worker.seen[-1], flat(average.module), 1e-12)


def test_a_run_without_it_is_unchanged() -> None:
    """The same bases and figures, and no average; with it, a worker's random evaluation draws what it draws without."""

    @dataclass
    class Random(Tiny):
        def evaluate(self, model: nn.Module) -> dict[str, float]:
            return {"draw": float(torch.rand(()))}

    def draws(decay: float) -> list[Mapping[str, float]]:
        torch.manual_seed(1)
        figures: list[Mapping[str, float]] = []
        run_in_process(Random(), make(decay), torch.float64, on_merge=lambda _, evaluate: figures.append(evaluate()))
        return figures

    assert [values["draw"] for values in draws(0.9)] == [values["draw"] for values in draws(0.0)]
    with_average, without = run(make(0.9)), run(make(0.0))
    assert all(map(torch.equal, with_average[0].seen[::2], without[0].seen))
    assert all(record.ema_keep is None for record in without[1])


def test_a_simulation_has_it() -> None:
    """Its final evaluation has the average's figures, which are those of a run in one process."""
    settings = make(0.9)
    simulated = simulate_training(Recording(), settings, ClusterModel(), torch.float64)
    done = run_in_process(Recording(), settings, torch.float64)
    assert simulated.coordinator.ema is not None
    assert done.coordinator.ema is not None
    assert torch.equal(simulated.coordinator.ema, done.coordinator.ema)
    assert set(simulated.record.evaluation) == {"sum", "ema_sum"}


def test_a_figure_with_the_average_s_name_is_refused() -> None:
    """One sentence names it."""
    assert with_ema({"loss": 1.0}, {"loss": 2.0}) == {"loss": 1.0, "ema_loss": 2.0}
    with pytest.raises(WorkerError, match=r"evaluate\(\) returns 'ema_loss', but with --ema that is a figure of the moving"):
        with_ema({"loss": 1.0, "ema_loss": 1.0}, {"loss": 2.0, "ema_loss": 2.0})


def test_a_trained_average_forgets_the_initial_weights() -> None:
    """After 12 steps, whatever the decay, less than a thousandth of them is left."""
    assert kept_share(0.9999, 0, 12) < 1e-3

"""Workers that keep a state of their own: each head has it, and a resumed head has the state that it had."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.data import Shard
from lte_ray.engine.head.head import Head
from lte_ray.engine.head.snapshot import rejoin, restore, snapshot
from lte_ray.engine.head.virtual import HeadGroup, Unstackable
from lte_ray.engine.in_process import run_in_process
from lte_ray.engine.prepare import prepare
from lte_ray.engine.settings import Settings
from lte_ray.errors import WorkerError
from lte_ray.messages import CheckpointRequest


@dataclass
class Counting:
    """Counts its losses, and keeps the last batches in containers of all kinds."""

    lr: float = 0.1

    def __post_init__(self) -> None:
        self.calls, self.recent, self.array = 0, [torch.zeros(2)], np.zeros(3)

    def build_model(self) -> nn.Module:
        return nn.Linear(3, 3)

    def train_batches(self, shard: Shard) -> Iterator[Tensor]:
        for slot in shard.slots():
            yield torch.randn(4, 3, generator=torch.Generator().manual_seed(slot))

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        self.calls += 1
        self.recent = [*self.recent[-2:], batch.mean(0)]
        self.array += batch.numpy().sum(0)
        return model(batch).square().mean() / self.calls  # type: ignore[no-any-return]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": 0.0}

    def build_optimizer(self, params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=self.lr)

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls, "recent": self.recent, "more": {"array": self.array, "pair": (1, np.float64(2.5))}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls, self.recent, self.array = state["calls"], state["recent"], state["more"]["array"]
        assert state["more"]["pair"] == (1, 2.5)


def settings(heads: int = 2) -> Settings:
    lte = LTEConfig(num_heads=heads, lora_r=2)
    return Settings("zoo", lte, MergeConfig(merge_iter=3, policy="average"), TrainConfig(steps=12))


@pytest.mark.parametrize("together", [1, 2])
def test_each_head_has_a_state_of_its_own(together: int) -> None:
    """Whether heads share a process or not; the worker that was given stays as it was."""
    worker = Counting()
    done = run_in_process(worker, settings(), heads_per_actor=together)
    assert worker.calls == 0
    assert [head.worker.calls for head in done.heads] == [12, 12]  # type: ignore[attr-defined]
    assert not np.allclose(done.heads[0].worker.array, done.heads[1].worker.array)  # type: ignore[attr-defined]


def test_a_resumed_head_has_its_workers_state() -> None:
    """From a checkpoint exactly; a head that is started again has that of its last checkpoint."""
    run = settings(1)
    base = prepare(Counting(), run).base
    head = Head(Counting(), run, 0)
    head.start(0, base)
    head.train(4)
    saved = snapshot(head, CheckpointRequest(0, {0: 0}))
    resumed = Head(Counting(), run, 0)
    restore(resumed, saved, base)
    again = Head(Counting(), run, 0, incarnation=1)
    assert rejoin(again, head.state.merged, None, 0, base, saved) == ""
    for other in (resumed, again):
        assert other.worker.state_dict()["calls"] == 4  # type: ignore[attr-defined]
        np.testing.assert_array_equal(other.worker.array, head.worker.array)  # type: ignore[attr-defined]
    for each in (head, resumed):
        each.train(3)
    for name, parameter in head.trained_parameters.items():
        assert torch.equal(parameter, resumed.trained_parameters[name])


def test_what_cannot_be_saved_is_refused_before_the_run() -> None:
    """One of the two methods alone, a value that is neither number, text nor tensor, and heads in one batch."""

    class Half(Counting):
        load_state_dict = None  # type: ignore[assignment]

    class Odd(Counting):
        def state_dict(self) -> dict[str, Any]:
            return {"seen": {"last": {1, 2}}}

    class Keyed(Counting):
        def state_dict(self) -> dict[str, Any]:
            return {"seen": {1: 2}}

    for kind, words in (
        (Half, r"has state_dict\(\) but no load_state_dict\(\)"),
        (Odd, r"Odd\.state_dict\(\) can't be saved: seen\.last has the type set"),
        (Keyed, r"has a key in seen that isn't text"),
    ):
        with pytest.raises(WorkerError, match=words):
            prepare(kind(), settings())
    with pytest.raises(Unstackable, match=r"Counting has a state_dict\(\)"):
        HeadGroup(Counting(), settings(), range(2), stack_heads="always")

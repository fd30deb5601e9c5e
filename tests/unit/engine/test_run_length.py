"""The length of a run in epochs, samples and tokens becomes local steps of each head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lte_ray import Shard
from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.engine.in_process import run_in_process
from lte_ray.engine.prepare import prepare
from lte_ray.engine.settings import Settings
from lte_ray.errors import ConfigError, WorkerError
from lte_ray.worker import count_tokens


class Sized:
    """103 samples in batches of 10: 10 batches an epoch."""

    def build_model(self) -> nn.Module:
        return nn.Linear(4, 4)

    def train_batches(self, shard: Shard) -> Iterator[Any]:
        for rows in shard.indices(103, 10):
            yield torch.ones(len(rows), 4)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": 0.0}


class Endless(Sized):
    """A stream, whose batches have 10 samples of 7 tokens."""

    def train_batches(self, shard: Shard) -> Iterator[Any]:
        for _ in shard.slots():
            yield {"input_ids": torch.ones(10, 7, dtype=torch.long), "x": torch.ones(10, 4)}

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch["x"]).square().mean()


def steps(worker: Any, heads: int = 2, accumulate: int = 1, baseline: bool = False, **length: float) -> int:
    train = TrainConfig(accumulate=accumulate, baseline=baseline, **length)  # type: ignore[arg-type]
    settings = Settings("run", LTEConfig(num_heads=heads, lora_r=2), MergeConfig(), train).resolved()
    completed = prepare(worker, settings).complete(settings)
    assert completed.train.length is None
    return completed.train.steps


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize(
    ("heads", "accumulate", "epochs", "expected"),
    [(1, 1, 1, 10), (2, 1, 3, 15), (4, 1, 1, 3), (2, 5, 1, 1), (3, 2, 0.3, 1), (10, 1, 0.1, 1), (1, 1, 0.3, 3)],
)
def test_epochs_are_passes_of_all_heads_together(
    heads: int, accumulate: int, epochs: float, expected: int, baseline: bool
) -> None:
    """A step of all heads takes heads times accumulate batches; ordinary training takes as many steps."""
    assert steps(Sized(), heads, accumulate, baseline, epochs=epochs) == expected


@pytest.mark.parametrize(
    ("worker", "length", "expected"),
    [
        (Sized(), {"samples": 400}, 20),
        (Sized(), {"samples": 401}, 21),
        (Sized(), {"samples": 1}, 1),
        (Endless(), {"tokens": 1400}, 10),
        (Endless(), {"tokens": 1e3}, 8),
        (Sized(), {"steps": 12}, 12),
        (Sized(), {}, 700),
    ],
)
def test_samples_and_tokens_are_rounded_up_to_steps(worker: Any, length: dict[str, float], expected: int) -> None:
    """Two heads of one batch of 10 samples, or of 70 tokens, a step."""
    assert steps(worker, **length) == expected


def test_an_epoch_trains_each_batch_once() -> None:
    """Heads whose number divides the batches of an epoch take every one of its samples once."""
    seen: list[int] = []

    class Recording(Sized):
        def train_batches(self, shard: Shard) -> Iterator[Any]:
            for rows in shard.indices(40, 10):
                yield torch.from_numpy(rows).float().unsqueeze(1).expand(10, 4)

        def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
            seen.extend(batch[:, 0].int().tolist())
            return model(batch).square().mean()

    settings = Settings("run", LTEConfig(num_heads=2, lora_r=2), MergeConfig(policy="average"), TrainConfig(epochs=1))
    run_in_process(Recording(), settings)
    assert sorted(seen[-40:]) == list(range(40))  # before them, the check of the first batch
    assert len(seen) <= 60


def test_a_worker_says_its_own_epoch_and_tokens() -> None:
    """`batches_per_epoch` and `tokens_per_sample` may be numbers, properties or methods, and come first."""

    class Told(Endless):
        tokens_per_sample = 5

        def batches_per_epoch(self) -> int:
            return 6

    assert steps(Told(), epochs=2) == 6
    assert steps(Told(), tokens=500) == 5
    assert count_tokens(Told(), torch.ones(3, 9)) == 15
    assert count_tokens(Sized(), torch.ones(3, 9)) is None


@pytest.mark.parametrize(
    ("worker", "length", "message"),
    [
        (Endless(), {"epochs": 2}, "--epochs is 2, but Endless doesn't say how much data there is"),
        (Sized(), {"tokens": 1e6}, "--tokens is 1e\\+06, but Sized's batches have no input_ids"),
    ],
)
def test_a_length_that_the_worker_cannot_tell_is_refused(worker: Any, length: dict[str, float], message: str) -> None:
    """The error says what to give the worker."""
    with pytest.raises(ConfigError, match=message):
        steps(worker, **length)


@pytest.mark.parametrize("value", [0, -1, float("inf"), "3", True])
def test_what_the_worker_says_must_be_a_number(value: Any) -> None:
    """An error names the attribute."""
    worker = Sized()
    worker.batches_per_epoch = value  # type: ignore[attr-defined]
    with pytest.raises(WorkerError, match=r"Sized\.batches_per_epoch is .*, but it must be a number above 0"):
        steps(worker, epochs=1)

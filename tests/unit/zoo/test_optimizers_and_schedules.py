"""Optimizers and schedules that users build: resumed exactly, or with a new length, or refused before the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import lr_scheduler as schedulers

from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.data import Shard
from lte_ray.engine.head.head import Head
from lte_ray.engine.head.snapshot import restore, snapshot
from lte_ray.engine.in_process import run_in_process
from lte_ray.engine.prepare import prepare
from lte_ray.engine.settings import Settings
from lte_ray.errors import ConfigError, WorkerError
from lte_ray.messages import CheckpointRequest, ContributionResult

Build = Callable[..., Any]


def sgd(params: Any) -> optim.Optimizer:
    return optim.SGD(params, lr=0.1, momentum=0.9)


@dataclass
class Scheduled:
    """A worker with this optimizer and schedule."""

    schedule: Build | None = None
    optimizer: Build = sgd

    def __post_init__(self) -> None:
        if self.schedule is not None:
            self.build_schedule = self.schedule

    def build_model(self) -> nn.Module:
        return nn.Linear(3, 3).double()

    def train_batches(self, shard: Shard) -> Iterator[Tensor]:
        for slot in shard.slots():
            yield torch.randn(4, 3, generator=torch.Generator().manual_seed(slot), dtype=torch.float64)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean()  # type: ignore[no-any-return]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": 0.0}

    def build_optimizer(self, params: Any) -> Any:
        return self.optimizer(params)


def settings(steps: int = 20) -> Settings:
    return Settings(
        "zoo", LTEConfig(num_heads=1, lora_r=2), MergeConfig(merge_iter=10, policy="average"), TrainConfig(steps=steps)
    )


SCHEDULES: dict[str, Build] = {
    "cosine": lambda o, n: schedulers.CosineAnnealingLR(o, T_max=n),
    "one cycle": lambda o, n: schedulers.OneCycleLR(o, max_lr=[g["lr"] for g in o.param_groups], total_steps=n + 1),
    "one cycle without momentum": lambda o, n: schedulers.OneCycleLR(o, max_lr=0.1, total_steps=n + 1, cycle_momentum=False),
    "linear": lambda o, n: schedulers.LinearLR(o, 1.0, 0.0, total_iters=n),
    "polynomial": lambda o, n: schedulers.PolynomialLR(o, total_iters=n, power=2.0),
    "lambda": lambda o, n: schedulers.LambdaLR(o, lambda step: 1 - step / n),
    "sequential": lambda o, n: schedulers.SequentialLR(
        o,
        [schedulers.LinearLR(o, 0.1, 1.0, total_iters=n // 4), schedulers.CosineAnnealingLR(o, T_max=n - n // 4)],
        [n // 4],
    ),
    "chained": lambda o, n: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.1, total_iters=n // 4), schedulers.ExponentialLR(o, 0.9)]
    ),
    "steps": lambda o, n: schedulers.MultiStepLR(o, [n // 2, 3 * n // 4]),
    "restarts": lambda o, n: schedulers.CosineAnnealingWarmRestarts(o, T_0=max(1, n // 4)),
    "multiplied": lambda o, n: schedulers.MultiplicativeLR(o, lambda step: 0.95),
    "cyclic": lambda o, n: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=n // 2),
}


def rates(head: Head, steps: int) -> list[float]:
    """The rates of the next steps."""
    found = []
    for _ in range(steps):
        found.append(float(head.optimizer.param_groups[0]["lr"]))
        head.train(1)
    return [*found, float(head.optimizer.param_groups[0]["lr"])]


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
@pytest.mark.parametrize("longer", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_resumed_run_follows_the_schedule_of_its_length(name: str, longer: bool) -> None:
    """From step 20 on, rates are those of a run that had all its steps from the start, of 20 or 40."""
    worker, first = Scheduled(SCHEDULES[name]), settings(40)
    short = settings(40 if not longer else 20)
    base = prepare(worker, first, torch.float64).base
    whole = Head(worker, first, 0, dtype=torch.float64)
    whole.start(0, base)
    expected = rates(whole, 40)[20:]
    head = Head(worker, short, 0, dtype=torch.float64)
    head.start(0, base)
    head.train(20)
    head.contribute()
    head.adopt(ContributionResult(0, 1, True, 1), 1, base)
    saved = snapshot(head, CheckpointRequest(1, {0: 1}))
    resumed = Head(worker, first, 0, dtype=torch.float64)
    restore(resumed, saved, base)
    assert rates(resumed, 20) == pytest.approx(expected, rel=1e-12, abs=1e-15)
    (state,) = {id(e["momentum_buffer"]) for e in list(resumed.optimizer.state.values())[:1]}
    assert state  # the optimizer's own state was taken over


class Unsavable(schedulers.LRScheduler):
    """Keeps a function in its state."""

    def __init__(self, optimizer: optim.Optimizer) -> None:
        self.function = lambda step: 1 / (1 + step)
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [base * self.function(self.last_epoch) for base in self.base_lrs]


class UnsavableOptimizer(optim.SGD):
    """Keeps a set in its state, from its first step on."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["seen"] = {1, 2}
        return super().step(closure)


class Closing(optim.SGD):
    """Computes the loss itself."""

    def step(self, closure: Any) -> Any:  # type: ignore[override]
        return super().step(closure)


REFUSED: dict[str, tuple[Scheduled, str]] = {
    "plateau": (Scheduled(lambda o, n: schedulers.ReduceLROnPlateau(o)), r"ReduceLROnPlateau, whose step\(\) needs metrics"),
    "no schedule": (Scheduled(lambda o, n: 0.1), r"build_schedule\(\) returned a float without step"),
    "list": (Scheduled(None, lambda p: [sgd(p)]), r"build_optimizer\(\) returned a list of 1\. A head steps one optimizer"),
    "dict": (Scheduled(None, lambda p: {"a": sgd(p)}), r"build_optimizer\(\) returned a dict of 1\."),
    "none": (Scheduled(None, lambda p: None), r"build_optimizer\(\) returned a NoneType without step"),
    "lbfgs": (Scheduled(None, lambda p: optim.LBFGS([t for g in p for t in g["params"]])), r"LBFGS, whose step\(\) .*closure"),
    "closure": (Scheduled(None, lambda p: Closing(p, lr=0.1)), r"Closing, whose step\(\) computes the loss again by a closure"),
    "schedule's state": (
        Scheduled(lambda o, n: Unsavable(o)),
        r"state can't be saved: schedule\.function has the type function",
    ),
    "optimizer's state": (
        Scheduled(None, lambda p: UnsavableOptimizer(p, lr=0.1)),
        r"can't be saved: state\.0\.seen has the type set",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_head_cannot_use_or_save_is_refused_before_the_run(kind: str) -> None:
    """In the words of the worker's methods, with what to write instead."""
    worker, words = REFUSED[kind]
    with pytest.raises((ConfigError, WorkerError), match=words):
        prepare(worker, settings())


@pytest.mark.parametrize(
    "optimizer",
    [
        optim.AdamW,
        optim.Adam,
        optim.NAdam,
        optim.RAdam,
        optim.Adagrad,
        optim.RMSprop,
        optim.Adamax,
        optim.Adadelta,
        optim.Rprop,
    ],
)
def test_optimizers_of_torch_pass_the_checks(optimizer: type[optim.Optimizer]) -> None:
    """They train, and their states are saved."""
    worker = Scheduled(None, lambda params: optimizer(params, lr=0.01))  # type: ignore[call-arg]
    run = run_in_process(worker, settings(), torch.float64)
    head = run.heads[0]
    saved = snapshot(head, CheckpointRequest(head.version, {0: head.sequence}))
    again = Head(worker, replace(settings(), train=TrainConfig(steps=40)), 0, dtype=torch.float64)
    restore(again, saved, run.base)
    again.train(2)
    assert again.step == 22

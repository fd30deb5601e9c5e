"""Optimizers and schedules survive a checkpoint: through safetensors and JSON they continue bitwise the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedules

from lte_ray.engine.head.optimizer_state import check_shapes, optimizer_state, restore_optimizer
from lte_ray.errors import WorkerError
from lte_ray.optim import LoRAMuon

Optimizer = torch.optim.Optimizer


def take_steps(optimizer: Optimizer, schedule: Any, first: int, count: int) -> list[tuple[Tensor, float]]:
    """Weights and learning rate after each step; the gradients depend on the step's number alone."""
    taken = []
    weight, *_ = optimizer.param_groups[0]["params"]
    for step in range(first, first + count):
        weight.grad = torch.randn(3, 2, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        if schedule is not None:
            schedule.step()
        taken.append((weight.detach().clone(), float(optimizer.param_groups[0]["lr"])))
    return taken


def check_round_trip(build: Callable[[nn.Parameter], Optimizer], plan: Callable[[Optimizer], Any] = lambda _: None) -> None:
    """Three steps, a checkpoint, and eight more steps, in the first process and in another."""
    weight = nn.Parameter(torch.ones(3, 2))
    optimizer = build(weight)
    schedule = plan(optimizer)
    take_steps(optimizer, schedule, 0, 3)
    tensors, meta = optimizer_state(optimizer, schedule)
    tensors, meta = safetensors.torch.load(safetensors.torch.save(tensors)), json.loads(json.dumps(meta))
    other = build(nn.Parameter(weight.detach().clone()))
    other_schedule = plan(other)
    restore_optimizer(other, other_schedule, tensors, meta)
    expected, found = take_steps(optimizer, schedule, 3, 8), take_steps(other, other_schedule, 3, 8)
    for (w, lr), (v, rate) in zip(expected, found, strict=True):
        assert rate == lr
        assert torch.equal(v, w)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("SGD", {}),
        ("SGD", {"momentum": 0.9, "nesterov": True}),
        ("Adam", {"amsgrad": True}),
        ("AdamW", {"betas": (0.8, 0.9), "lr": torch.tensor(0.01)}),
        ("Adafactor", {}),
        ("Adagrad", {}),
        ("RMSprop", {"centered": True}),
        ("Rprop", {}),
        ("NAdam", {}),
        ("ASGD", {}),
    ],
)
def test_an_optimizer_continues_as_without_the_checkpoint(kind: str, options: dict[str, Any]) -> None:
    """torch's optimizers take the steps that they would have taken without the checkpoint."""
    check_round_trip(lambda weight: getattr(torch.optim, kind)([weight], **({"lr": 0.01} | options)))


def test_lora_muon_continues_as_without_the_checkpoint() -> None:
    """The momentum of a weight, or of a pair of factors, and the pair's scalings."""
    check_round_trip(lambda weight: LoRAMuon([{"params": [weight], "name": "weight"}]))

    def pair(weight: nn.Parameter) -> Optimizer:
        return LoRAMuon([{"params": [weight, nn.Parameter(torch.ones(4, 3))], "name": "lora", "scalings": [2.0]}])

    check_round_trip(pair)


def test_lora_muons_state_of_another_shape_is_an_error() -> None:
    """It would fail only in the next step."""
    optimizer = LoRAMuon([{"params": [nn.Parameter(torch.ones(3, 2))], "name": "weight"}])
    with pytest.raises(ValueError, match=r"momentum of parameter 0 has the shape \(2, 2\), expected \(3, 2\)"):
        check_shapes(optimizer, {"optimizer.0.momentum": torch.ones(2, 2)}, {})


@pytest.mark.parametrize(
    "plan",
    [
        lambda o: schedules.LambdaLR(o, lambda step: 1 / (1 + step)),
        lambda o: schedules.OneCycleLR(o, 0.1, total_steps=20),
        lambda o: schedules.CosineAnnealingLR(o, 20),
        lambda o: schedules.CosineAnnealingWarmRestarts(o, 4),
        lambda o: schedules.SequentialLR(o, [schedules.LinearLR(o), schedules.ExponentialLR(o, 0.9)], [5]),
        lambda o: schedules.MultiStepLR(o, [5, 7]),
        lambda o: schedules.SequentialLR(o, [schedules.LinearLR(o), schedules.MultiStepLR(o, [2])], [5]),
    ],
    ids=["lambda", "one cycle", "cosine", "restarts", "sequential", "multi-step", "sequential multi-step"],
)
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")  # SequentialLR's own
def test_a_schedule_continues_as_without_the_checkpoint(plan: Callable[[Optimizer], Any]) -> None:
    """torch's schedules yield the rates that they would have yielded without the checkpoint."""
    check_round_trip(lambda weight: torch.optim.SGD([weight], lr=0.1, momentum=0.9), plan)


def test_a_state_that_is_neither_tensor_nor_json_is_an_error() -> None:
    """The error says that it thing has the type object."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    optimizer.param_groups[0]["thing"] = object()
    with pytest.raises(WorkerError, match="thing has the type object"):
        optimizer_state(optimizer, None)

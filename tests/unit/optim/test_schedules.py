"""Warm-ups and what follows them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lte_ray.optim import warmup_constant, warmup_cosine, warmup_linear


def rates(schedule: Callable[..., Any], total_steps: int, **options: Any) -> list[float]:
    """The first group's rate at each step, and at one step after the last; the second group's is half of it."""
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [p], "lr": lr} for p, lr in zip(parameters, (1.0, 0.5), strict=True)])
    made, taken = schedule(optimizer, total_steps, **options), []
    for _ in range(total_steps + 1):
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert second == pytest.approx(first / 2)
        taken.append(first)
        optimizer.step()
        made.step()
    return taken


@pytest.mark.parametrize(
    ("schedule", "decay"),
    [
        (warmup_constant, lambda done: 1.0),
        (warmup_cosine, lambda done: 0.55 + 0.45 * math.cos(math.pi * done)),
        (warmup_linear, lambda done: 1 - 0.9 * done),
    ],
)
def test_rates_rise_and_fall(schedule: Callable[..., Any], decay: Callable[[float], float]) -> None:
    """Ten steps up, thirty down to a tenth, each group from its own rate."""
    expected = [(n + 1) / 10 for n in range(10)] + [decay(n / 30) for n in range(31)]
    assert rates(schedule, 40, warmup=10) == pytest.approx(expected)


def test_the_final_rate_can_be_chosen() -> None:
    """Zero, for both that fall."""
    for schedule in (warmup_cosine, warmup_linear):
        assert rates(schedule, 20, warmup=2, final=0.0)[-1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("total_steps", [1, 3, 8])
def test_short_runs_have_short_warm_ups(total_steps: int) -> None:
    """At most a quarter of all steps."""
    taken = rates(warmup_cosine, total_steps, warmup=50)
    assert max(taken) == 1.0
    assert taken.index(1.0) == max(0, total_steps // 4 - 1)

"""Learning-rate schedules: a warm-up, then a constant, a cosine or a line."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR

WARMUP = 50
"""Steps of a warm-up by default."""


def warmup_constant(optimizer: torch.optim.Optimizer, total_steps: int, *, warmup: int = WARMUP) -> LambdaLR:
    """Returns a schedule whose rates rise to each group's own along a line, and stay there. See `warmup_cosine`."""
    return _make_schedule(optimizer, total_steps, warmup, lambda done: 1.0)


def warmup_cosine(optimizer: torch.optim.Optimizer, total_steps: int, *, warmup: int = WARMUP, final: float = 0.1) -> LambdaLR:
    """Returns a schedule whose rates rise along a line to each group's own, and fall along a cosine.

    Step n (from 0) of the warm-up has (n + 1) / warmup of the rate.

    Args:
        optimizer: its groups keep the ratios of their rates.
        total_steps: steps of the run.
        warmup: steps of the warm-up; at most a quarter of all are taken for it.
        final: the part of the rate that is left at the end.
    """
    return _make_schedule(optimizer, total_steps, warmup, lambda done: final + (1 - final) * (1 + math.cos(math.pi * done)) / 2)


def warmup_linear(optimizer: torch.optim.Optimizer, total_steps: int, *, warmup: int = WARMUP, final: float = 0.1) -> LambdaLR:
    """Returns a schedule whose rates rise along a line to each group's own, and fall along another. See `warmup_cosine`."""
    return _make_schedule(optimizer, total_steps, warmup, lambda done: 1 - (1 - final) * done)


def _make_schedule(
    optimizer: torch.optim.Optimizer, total_steps: int, warmup: int, decay: Callable[[float], float]
) -> LambdaLR:
    """Returns a schedule that multiplies the rates after the warm-up by `decay` of the part of the rest that is done."""
    rise = min(warmup, total_steps // 4)

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return decay(min(1.0, (step - rise) / max(1, total_steps - rise)))

    return LambdaLR(optimizer, factor)

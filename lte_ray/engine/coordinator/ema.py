"""The exponential moving average (EMA) of the base: how much of it stays at a merge.

After a merge that leads to the base W, the average E becomes keep E + (1 - keep) W. Decays are given per local step, so `keep`
follows from the steps that the merge holds: a run's average covers equally many steps however often its heads merge.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from lte_ray.errors import WorkerError
from lte_ray.messages import CommittedPosition

WARMUP = 10
"""The decay of step n, counted from 0, is at most (1 + n) / (WARMUP + n), as in TensorFlow's ExponentialMovingAverage,
torch-ema and diffusers. So a short run's average covers about the last tenth of its steps, and forgets the initial weights."""


def kept_share(decay: float, start: float, end: float) -> float:
    """The product of min(decay, (1 + n) / (10 + n)) over the steps n from `start` to `end`, which isn't one of them.

    The first factors' product is that of (start + j) / (end + j) over j = 1, ..., 9, which is also defined between whole steps:
    a merge of one of 8 heads moves the base by an eighth of a step. Shares multiply: those of two merges are that of one which
    holds the steps of both.
    """
    switch = max(0, math.floor((WARMUP * decay - 1) / (1 - decay)) + 1)  # the first step at which `decay` is the smaller
    middle = min(max(start, switch), end)
    warm = math.prod((start + j) / (min(switch, middle) + j) for j in range(1, WARMUP)) if start < switch else 1.0
    return float(warm * decay ** (end - middle))


def mean_step(positions: Mapping[int, CommittedPosition], members: Collection[int]) -> float:
    """The local steps that a base with these positions holds of its members, on average."""
    return sum(positions[head].step for head in members if head in positions) / max(1, len(members))


def keep_at_merge(
    decay: float, positions: Mapping[int, CommittedPosition], members: Collection[int], steps: Mapping[int, int]
) -> float | None:
    """The share of the average that a merge keeps; None if there is no average (`decay` is 0).

    Args:
        decay: per local step.
        positions: of the heads before the merge.
        members: the heads of the run.
        steps: by merged head, the local steps that it has taken in all.
    """
    if not decay:
        return None
    before = mean_step(positions, members)
    more = sum(max(0, step - positions[head].step) for head, step in steps.items()) / max(1, len(members))
    return kept_share(decay, before, before + more)


def with_ema(values: Mapping[str, float], of_ema: Mapping[str, float]) -> dict[str, float]:
    """Returns a base's figures, and those of its moving average as ``ema_NAME``.

    Raises:
        WorkerError: the worker has a figure of such a name itself.
    """
    added = {f"ema_{name}": value for name, value in of_ema.items()}
    taken = sorted(values.keys() & added.keys())
    if taken:
        raise WorkerError(
            f"evaluate() returns {taken[0]!r}, but with --ema that is a figure of the moving average. Rename it, or "
            "leave --ema out."
        )
    return {**values, **added}

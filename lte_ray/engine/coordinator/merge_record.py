"""What a merge's record says of the merged contributions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from lte_ray.engine.coordinator.aggregator import DecidedMerge
from lte_ray.layout import Plan
from lte_ray.messages import Contribution, MergeRecord


def describe_merge(
    decided: DecidedMerge, merged: Sequence[Contribution], plans: Sequence[Plan], itemsize: int, **more: Any
) -> MergeRecord:
    """Returns the record of a merge.

    Args:
        decided: the merge.
        merged: its contributions, at least one.
        plans: each head's.
        itemsize: bytes of an element of the base.
        more: fields that aren't known from the contributions.
    """
    version, heads = decided.version, tuple(c.head for c in merged)
    return MergeRecord(
        version=version,
        at=time.time(),
        heads=heads,
        step=max(c.step for c in merged),
        steps=sum(c.steps for c in merged),
        samples=sum(c.samples for c in merged),
        losses={c.head: c.loss for c in merged},
        figures=MergeRecord.collect_figures(merged),
        measures={c.head: c.measures for c in merged},
        base_error=max(c.base_error for c in merged),
        bytes_up=sum(plans[head].contribution.size for head in heads) * itemsize,
        bytes_down=plans[0].base.size * itemsize * len(heads),
        norms={c.head: c.norm for c in merged if c.norm is not None},
        weights=dict(decided.weights),
        outer_step=decided.step,
        ema_keep=decided.ema_keep,
        lags={c.head: version - 1 - c.version for c in merged},
        head_steps={c.head: c.steps for c in merged},
        stalls={c.head: c.stall for c in merged},
        **more,
    )

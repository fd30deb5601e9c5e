"""Loss-gated merging: a merge that makes the model worse is undone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lte_ray.merging.policies.trigger import get_policy_state, load_policy_state, to_decision
from lte_ray.merging.policy import Discard, Merge, MergeChange, Pending, Roster, Try
from lte_ray.merging.policy_args import check_range


class LossGate:
    """Has each merge of another policy evaluated, and keeps it only if the metric doesn't rise by more than `max_rise`.

    The metric is compared with that of the last version that was kept; the first version is kept if its metric is finite.
    A merge that isn't kept is discarded with the metric as the reason, and what the inner policy remembers of it (momentum)
    is restored. The heads send their progress again with their next contributions.

    Args:
        inner: the policy that merges, an object or a function.
        max_rise: how far the metric may rise, in its own unit.
        metric: name of the metric in the worker's evaluate(); by default its first.
        higher_is_better: whether the metric should rise, as an accuracy does; then it may fall by `max_rise`.
    """

    def __init__(self, inner: Any, *, max_rise: float = 0.0, metric: str = "", higher_is_better: bool = False) -> None:
        check_range("max_rise", max_rise, 0)
        self.inner, self.max_rise, self.metric, self.higher_is_better = inner, max_rise, metric, higher_is_better
        self._kept: float | None = None

    def merge(self, pending: Sequence[Pending], roster: Roster) -> Merge | MergeChange | Discard | Try:
        before = {name: tensor.clone() for name, tensor in get_policy_state(self.inner).items()}
        rule: Any = getattr(self.inner, "merge", self.inner)
        merge: Any = to_decision(rule(pending, roster), pending)
        if not isinstance(merge, Merge | MergeChange):
            return merge  # type: ignore[no-any-return]  # a Discard stands; anything else is for the coordinator to judge
        heads = list(merge.weights if isinstance(merge, Merge) else merge.heads)

        def judge(values: Mapping[str, float]) -> Merge | MergeChange | Discard:
            name, value = self._pick(values)
            cost = -value if self.higher_is_better else value
            if math.isfinite(value) and (self._kept is None or cost - self._kept <= self.max_rise):
                self._kept = cost
                return merge
            load_policy_state(self.inner, before)
            if self._kept is None or not math.isfinite(value):
                return Discard(heads, f"{name} would have been {value:.6g}")
            last = -self._kept if self.higher_is_better else self._kept
            return Discard(heads, f"{name} would have been {value:.6g} after {last:.6g}, worse by more than {self.max_rise:g}")

        return Try(merge, judge)

    def _pick(self, values: Mapping[str, float]) -> tuple[str, float]:
        name = self.metric or next(iter(values), "")
        if name not in values:
            asked = f"--policy.metric is {name!r}" if name else "gated needs a metric"
            raise ValueError(f"{asked}, but the evaluation gave: {', '.join(values) or 'nothing'}.")
        return name, float(values[name])

    def state(self) -> dict[str, Tensor]:
        inner = {f"inner.{name}": tensor for name, tensor in get_policy_state(self.inner).items()}
        return inner if self._kept is None else {**inner, "kept": torch.tensor(self._kept, dtype=torch.float64)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self._kept = float(tensors["kept"]) if "kept" in tensors else None
        load_policy_state(self.inner, {n.removeprefix("inner."): t for n, t in tensors.items() if n.startswith("inner.")})

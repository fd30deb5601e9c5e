"""Outer Nesterov momentum for contributions that arrive one by one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lte_ray.merging.arguments import within
from lte_ray.merging.average import average_weights
from lte_ray.merging.policy import MergeChange, Pending, Roster, combine


class DelayedNesterov:
    """Momentum moves once every K contributions only, by their mean; between, plain steps (arXiv 2401.09135, alg. 3, c = 0).

    Each merge: W += lr D with D = 1/N sum of its changes. When K contributions have come since the last time:
    m := beta m + their mean change, and W += lr beta m in the same merge. So K = N single arrivals move momentum and base
    like one `Nesterov` merge of all (exactly, if nobody trains on what is between); with ``--when barrier`` it *is* `Nesterov`.
    As of `Nesterov`, each change counts lr / (1 - beta) times in the long run: take a lower lr where heads train few steps
    between merges. Costs two tensors as large as the base.

    Args:
        lr: outer learning rate.
        momentum: beta.
        delay: K, contributions between two moves of the momentum; 0: as many as there are heads.
    """

    def __init__(self, *, lr: float = 0.7, momentum: float = 0.9, delay: int = 0) -> None:
        within("lr", lr, 0, above=True)
        within("momentum", momentum, 0, 1, below=True)
        within("delay", delay, 0)
        self.lr, self.momentum, self.delay = lr, momentum, delay
        self._m: Tensor | None = None
        self._sum: Tensor | None = None
        self._count = 0

    def merge(self, pending: Sequence[Pending], roster: Roster) -> MergeChange:
        change = combine(pending, average_weights(pending, roster))
        self._sum = change.clone() if self._sum is None else self._sum.add_(change)
        self._count += len(pending)
        if self._count >= (self.delay or roster.num_heads):
            mean = self._sum.mul_(roster.num_heads / self._count)
            self._m = mean.clone() if self._m is None else self._m.mul_(self.momentum).add_(mean)
            self._sum.zero_()
            self._count = 0
            change.add_(self._m, alpha=self.momentum)
        return MergeChange(change.mul_(self.lr), [p.head for p in pending])

    def state(self) -> dict[str, Tensor]:
        if self._sum is None:
            return {}
        held = {"sum": self._sum, "count": torch.tensor(self._count)}
        return held if self._m is None else {**held, "momentum": self._m}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self._sum = tensors["sum"].clone() if "sum" in tensors else None
        self._m = tensors["momentum"].clone() if "momentum" in tensors else None
        self._count = int(tensors["count"]) if "count" in tensors else 0

"""Outer momentum on the averaged change."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lte_ray.merging.arguments import within
from lte_ray.merging.average import average_weights
from lte_ray.merging.policy import MergeChange, Pending, Roster, combine


class Momentum:
    """m := beta m + D, W += lr m, with D = 1/N sum of the merge's changes (FedAvgM, arXiv 1909.06335).

    All in all each change counts lr / (1 - beta) times: once, with these defaults. Costs one tensor as large as the base.

    Args:
        lr: outer learning rate.
        momentum: beta.
    """

    def __init__(self, *, lr: float = 0.1, momentum: float = 0.9) -> None:
        within("lr", lr, 0, above=True)
        within("momentum", momentum, 0, 1, below=True)
        self.lr, self.momentum = lr, momentum
        self._m: Tensor | None = None

    def merge(self, pending: Sequence[Pending], roster: Roster) -> MergeChange:
        if self._m is not None:
            self._m.mul_(self.momentum)
        self._m = combine(pending, average_weights(pending, roster), out=self._m)
        return MergeChange(self._m * self.lr, [p.head for p in pending])

    def state(self) -> dict[str, Tensor]:
        return {} if self._m is None else {"momentum": self._m}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self._m = tensors["momentum"].clone() if tensors else None

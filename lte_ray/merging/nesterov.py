"""Outer Nesterov momentum, as in DiLoCo."""

from __future__ import annotations

from collections.abc import Sequence

from lte_ray.merging.average import average_weights
from lte_ray.merging.momentum import Momentum
from lte_ray.merging.policy import MergeChange, Pending, Roster, combine


class Nesterov(Momentum):
    """m := beta m + D, W += lr (D + beta m), with D = 1/N sum of the merge's changes (DiLoCo, arXiv 2311.08105).

    It is torch.optim.SGD(nesterov=True) on the gradient -D; the defaults are DiLoCo's, whose workers train hundreds of steps
    between merges. All in all each change counts lr / (1 - beta) times, 7 with these: where heads train few steps between
    merges, that overshoots, and lr = 1 - beta is safe. Meant for ``--when barrier``: with
    single arrivals momentum takes up stale changes N times as often (`DelayedNesterov` mends that). Costs one tensor as large
    as the base.

    Args:
        lr: outer learning rate.
        momentum: beta.
    """

    def __init__(self, *, lr: float = 0.7, momentum: float = 0.9) -> None:
        super().__init__(lr=lr, momentum=momentum)

    def merge(self, pending: Sequence[Pending], roster: Roster) -> MergeChange:
        change = combine(pending, average_weights(pending, roster))
        self._m = change.clone() if self._m is None else self._m.mul_(self.momentum).add_(change)
        return MergeChange(change.add_(self._m, alpha=self.momentum).mul_(self.lr), [p.head for p in pending])

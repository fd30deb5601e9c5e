"""Outer Adam on the averaged change."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lte_ray.merging.arguments import within
from lte_ray.merging.average import average_weights
from lte_ray.merging.policy import MergeChange, Pending, Roster, combine


class Adam:
    """m := b1 m + (1 - b1) D, v := b2 v + (1 - b2) D^2, W += lr m' / (sqrt(v') + eps), D = 1/N sum of the merge's changes.

    FedAdam (arXiv 2003.00295) with Adam's bias corrections m' = m / (1 - b1^t), v' = v / (1 - b2^t). A change far below
    `eps` counts lr / eps times (once, with these defaults), and no element moves by much more than `lr` in a merge. Costs two
    tensors as large as the base.

    Args:
        lr: outer learning rate: about the largest change of an element in a merge.
        beta1: decay of the first moment m.
        beta2: decay of the second moment v.
        eps: added to the root of the second moment.
    """

    def __init__(self, *, lr: float = 1e-3, beta1: float = 0.9, beta2: float = 0.99, eps: float = 1e-3) -> None:
        within("lr", lr, 0, above=True)
        within("beta1", beta1, 0, 1, below=True)
        within("beta2", beta2, 0, 1, below=True)
        within("eps", eps, 0, above=True)
        self.lr, self.beta1, self.beta2, self.eps = lr, beta1, beta2, eps
        self._m: Tensor | None = None
        self._v: Tensor | None = None
        self._merges = 0

    def merge(self, pending: Sequence[Pending], roster: Roster) -> MergeChange:
        change = combine(pending, average_weights(pending, roster))
        if self._m is None or self._v is None:
            self._m, self._v = torch.zeros_like(change), torch.zeros_like(change)
        self._merges += 1
        self._m.lerp_(change, 1 - self.beta1)
        self._v.mul_(self.beta2).addcmul_(change, change, value=1 - self.beta2)
        scale = torch.sqrt(self._v, out=change).div_((1 - self.beta2**self._merges) ** 0.5).add_(self.eps)
        step = torch.div(self._m, scale, out=scale).mul_(self.lr / (1 - self.beta1**self._merges))
        return MergeChange(step, [p.head for p in pending])

    def state(self) -> dict[str, Tensor]:
        if self._m is None or self._v is None:
            return {}
        return {"m": self._m, "v": self._v, "merges": torch.tensor(self._merges)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self._m, self._v = (tensors[name].clone() if tensors else None for name in ("m", "v"))
        self._merges = int(tensors["merges"]) if tensors else 0

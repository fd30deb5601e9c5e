"""Outer optimizers: the averaged change is treated as a gradient step, with momentum (plain, Nesterov, delayed) or Adam."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lte_ray.merging.policies.weighted import average_weights
from lte_ray.merging.policy import MergeChange, Pending, Roster, combine
from lte_ray.merging.policy_args import check_range


class Momentum:
    """m := beta m + D, W += lr m, with D = 1/N sum of the merge's changes (FedAvgM, arXiv 1909.06335).

    In total, each change counts lr / (1 - beta) times: once, with the defaults. Needs one tensor as large as the base.

    Args:
        lr: outer learning rate.
        momentum: beta.
    """

    def __init__(self, *, lr: float = 0.1, momentum: float = 0.9) -> None:
        check_range("lr", lr, 0, above=True)
        check_range("momentum", momentum, 0, 1, below=True)
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


class Nesterov(Momentum):
    """m := beta m + D, W += lr (D + beta m), with D = 1/N sum of the merge's changes (DiLoCo, arXiv 2311.08105).

    Equals torch.optim.SGD(nesterov=True) on the gradient -D. The defaults are those of DiLoCo, whose workers train hundreds of
    steps between merges. In total, each change counts lr / (1 - beta) times, here 7: that overshoots if heads train few steps
    between merges, and lr = 1 - beta is safe. Meant for ``--when barrier``: with single arrivals, momentum accumulates stale
    changes N times as often (`DelayedNesterov` avoids that). Needs one tensor as large as the base.

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


class DelayedNesterov:
    """Updates momentum once every K contributions, with their mean; plain steps in between (arXiv 2401.09135, alg. 3, c = 0).

    Each merge: W += lr D with D = 1/N sum of its changes. When K contributions have arrived since the last update of m:
    m := beta m + their mean change, and W += lr beta m in the same merge. So K = N single arrivals update momentum and base
    as one `Nesterov` merge of all does (exactly, if no head trains on the versions in between); with ``--when barrier`` it
    *is* `Nesterov`. As there, each change counts lr / (1 - beta) times in the long run: choose a lower lr if heads train few
    steps between merges. Needs two tensors as large as the base.

    Args:
        lr: outer learning rate.
        momentum: beta.
        delay: K, contributions between two updates of the momentum; 0: the number of heads.
    """

    def __init__(self, *, lr: float = 0.7, momentum: float = 0.9, delay: int = 0) -> None:
        check_range("lr", lr, 0, above=True)
        check_range("momentum", momentum, 0, 1, below=True)
        check_range("delay", delay, 0)
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
        sums = {"sum": self._sum, "count": torch.tensor(self._count)}
        return sums if self._m is None else {**sums, "momentum": self._m}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self._sum = tensors["sum"].clone() if "sum" in tensors else None
        self._m = tensors["momentum"].clone() if "momentum" in tensors else None
        self._count = int(tensors["count"]) if "count" in tensors else 0


class Adam:
    """m := b1 m + (1 - b1) D, v := b2 v + (1 - b2) D^2, W += lr m' / (sqrt(v') + eps), D = 1/N sum of the merge's changes.

    FedAdam (arXiv 2003.00295) with Adam's bias corrections m' = m / (1 - b1^t), v' = v / (1 - b2^t). A change far below
    `eps` counts lr / eps times (once, with the defaults), and no element moves by much more than `lr` in a merge. Needs two
    tensors as large as the base.

    Args:
        lr: outer learning rate: about the largest change of an element in a merge.
        beta1: decay of the first moment m.
        beta2: decay of the second moment v.
        eps: added to the root of the second moment.
    """

    def __init__(self, *, lr: float = 1e-3, beta1: float = 0.9, beta2: float = 0.99, eps: float = 1e-3) -> None:
        check_range("lr", lr, 0, above=True)
        check_range("beta1", beta1, 0, 1, below=True)
        check_range("beta2", beta2, 0, 1, below=True)
        check_range("eps", eps, 0, above=True)
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

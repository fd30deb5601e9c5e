"""Outer optimizers: the averaged change D = 1/N sum of the merge's changes is a negated gradient.

`Momentum`, `Nesterov` and `DelayedNesterov` decide by weights and give an `OuterStep`; the coordinator, its shards and heads
that redo merges keep the momentum. `Adam` isn't linear in D, so it gives a dense change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lte_ray.merging.policies.weighted import average_weights
from lte_ray.merging.policy import Merge, MergeChange, Pending, Roster, combine
from lte_ray.merging.policy_args import check_range
from lte_ray.messages import OuterStep, StepCoefficients

PLAIN = OuterStep(StepCoefficients(), StepCoefficients())
"""The step of the average."""


class MomentumPolicy:
    """What the policies with momentum share: their settings, and the schedules of lr and beta.

    With p the share of the run's local steps that is done and v the number of merges before this one:
    lr_p = lr (f + (1 - f) (1 + cos(pi p)) / 2), and beta_v = beta min(1, v / warmup).

    Args:
        lr: outer learning rate.
        momentum: beta.
        replica_lr, replica_momentum: those of the replica parameters; None: the same.
        final_lr: f.
        warmup: merges over which beta grows from 0; 0: none.
    """

    def __init__(
        self,
        lr: float,
        momentum: float,
        replica_lr: float | None,
        replica_momentum: float | None,
        final_lr: float,
        warmup: int,
    ) -> None:
        for name, rate in (("lr", lr), ("replica_lr", replica_lr)):
            check_range(name, 1.0 if rate is None else rate, 0, above=True)
        for name, beta in (("momentum", momentum), ("replica_momentum", replica_momentum)):
            check_range(name, beta or 0, 0, 1, below=True)
        check_range("final_lr", final_lr, 0, 1, above=True)
        check_range("warmup", warmup, 0)
        self.lr, self.momentum, self.final_lr, self.warmup = lr, momentum, final_lr, warmup
        self.replica_lr, self.replica_momentum = replica_lr, replica_momentum

    def merge(self, pending: Sequence[Pending], roster: Roster) -> Merge:
        has_momentum = self.momentum > 0 or bool(self.replica_momentum)  # else none need be kept

        def coefficients(lr: float, beta: float) -> StepCoefficients:
            return self._coefficients(lr, beta) if has_momentum else StepCoefficients(change=lr)

        step = OuterStep(*(coefficients(*each) for each in self._rates(roster)))
        return Merge(average_weights(pending, roster), None if step == PLAIN else step)

    def _coefficients(self, lr: float, beta: float) -> StepCoefficients:
        """The step with this learning rate and momentum."""
        raise NotImplementedError

    def _rates(self, roster: Roster) -> tuple[tuple[float, float], tuple[float, float]]:
        """(lr, beta) now, of weights with factors and of replicas."""
        decay = self.final_lr + (1 - self.final_lr) * (1 + math.cos(math.pi * roster.progress)) / 2
        growth = min(1.0, roster.version / self.warmup) if self.warmup else 1.0
        replica_lr = self.lr if self.replica_lr is None else self.replica_lr
        replica_momentum = self.momentum if self.replica_momentum is None else self.replica_momentum
        return (self.lr * decay, self.momentum * growth), (replica_lr * decay, replica_momentum * growth)

    def saved_momentum(self, tensors: Mapping[str, Tensor], num_heads: int) -> Tensor | None:
        """The momentum in the state that a release before this one saved, when policies kept it themselves; None if none is."""
        return tensors.get("momentum")


class Momentum(MomentumPolicy):
    """m := beta m + D, W += lr m, with D = 1/N sum of the merge's changes (FedAvgM, arXiv 1909.06335).

    In total, each change counts lr / (1 - beta) times: once, with the defaults. Each merge is a step of m, however many
    contributions it takes. Needs one more tensor as large as the base.

    Args:
        lr: outer learning rate.
        momentum: beta.
        replica_lr: outer learning rate of the replica parameters; None: lr.
        replica_momentum: beta of the replica parameters; None: momentum.
        final_lr: fraction of lr that is left at the end of the run, after a cosine decay; 1: constant.
        warmup: merges, from the run's first, over which beta grows from 0; 0: none.
    """

    def __init__(
        self,
        *,
        lr: float = 0.1,
        momentum: float = 0.9,
        replica_lr: float | None = None,
        replica_momentum: float | None = None,
        final_lr: float = 1.0,
        warmup: int = 0,
    ) -> None:
        super().__init__(lr, momentum, replica_lr, replica_momentum, final_lr, warmup)

    def _coefficients(self, lr: float, beta: float) -> StepCoefficients:
        return StepCoefficients(keep=beta, add=1.0, change=0.0, momentum=lr)


class Nesterov(MomentumPolicy):
    """m := beta m + D, W += lr (D + beta m), with D = 1/N sum of the merge's changes (DiLoCo, arXiv 2311.08105).

    Equals torch.optim.SGD(nesterov=True) on the gradient -D. The defaults are those of DiLoCo, whose workers train hundreds of
    steps between merges. In total, each change counts lr / (1 - beta) times, here 7: too often where heads train few steps
    between merges. Meant for ``--when barrier``: each merge is a step of m, so with single arrivals momentum decays N times as
    fast, and holds changes of a few heads only (`DelayedNesterov` avoids that). Needs one more tensor as large as the base.

    Args:
        lr: outer learning rate.
        momentum: beta.
        replica_lr: outer learning rate of the replica parameters; None: lr.
        replica_momentum: beta of the replica parameters; None: momentum.
        final_lr: fraction of lr that is left at the end of the run, after a cosine decay; 1: constant.
        warmup: merges, from the run's first, over which beta grows from 0; 0: none.
    """

    def __init__(
        self,
        *,
        lr: float = 0.7,
        momentum: float = 0.9,
        replica_lr: float | None = None,
        replica_momentum: float | None = None,
        final_lr: float = 1.0,
        warmup: int = 0,
    ) -> None:
        super().__init__(lr, momentum, replica_lr, replica_momentum, final_lr, warmup)

    def _coefficients(self, lr: float, beta: float) -> StepCoefficients:
        return StepCoefficients(keep=beta, add=1.0, change=lr, momentum=lr * beta)


class DelayedNesterov(MomentumPolicy):
    """Applies momentum once every K contributions; plain steps in between (arXiv 2401.09135, alg. 3, c = 0).

    Each merge: W += lr D with D = 1/N sum of its changes, and the changes are added to m, by 1/K each. The first merge after K
    contributions begins with m := beta m, and the one that completes K ends with W += lr beta m. So K = N single arrivals move
    m and base as one `Nesterov` merge of all does (exactly, if no head trains on the versions in between); with
    ``--when barrier`` it *is* `Nesterov`. As there, each change counts lr / (1 - beta) times in the long run if K = N: choose a
    lower lr if heads train few steps between merges. Needs one more tensor as large as the base.

    Args:
        lr: outer learning rate.
        momentum: beta.
        delay: K, contributions between two uses of the momentum; 0: the number of heads.
        replica_lr: outer learning rate of the replica parameters; None: lr.
        replica_momentum: beta of the replica parameters; None: momentum.
        final_lr: fraction of lr that is left at the end of the run, after a cosine decay; 1: constant.
        warmup: merges, from the run's first, over which beta grows from 0; 0: none.
    """

    def __init__(
        self,
        *,
        lr: float = 0.7,
        momentum: float = 0.9,
        delay: int = 0,
        replica_lr: float | None = None,
        replica_momentum: float | None = None,
        final_lr: float = 1.0,
        warmup: int = 0,
    ) -> None:
        super().__init__(lr, momentum, replica_lr, replica_momentum, final_lr, warmup)
        check_range("delay", delay, 0)
        self.delay = delay
        self._count = 0  # contributions since the momentum was used

    def merge(self, pending: Sequence[Pending], roster: Roster) -> Merge:
        begins, delay = not self._count, self.delay or roster.num_heads
        self._count += len(pending)
        ends = self._count >= delay
        if ends:
            self._count = 0

        def coefficients(lr: float, beta: float) -> StepCoefficients:
            keep, add = beta if begins else 1.0, roster.num_heads / delay
            return StepCoefficients(keep, add, lr, lr * beta if ends else 0.0)

        return Merge(average_weights(pending, roster), OuterStep(*(coefficients(*each) for each in self._rates(roster))))

    def state(self) -> dict[str, Tensor]:
        return {"count": torch.tensor(self._count)} if self._count else {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self._count = int(tensors["count"]) if "count" in tensors else 0

    def saved_momentum(self, tensors: Mapping[str, Tensor], num_heads: int) -> Tensor | None:
        momentum, total = tensors.get("momentum"), tensors.get("sum")
        if total is None or not int(tensors.get("count", 0)):
            return momentum
        total = total * (num_heads / (self.delay or num_heads))
        return total if momentum is None else total.add_(momentum, alpha=self.momentum)


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

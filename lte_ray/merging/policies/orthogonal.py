"""An outer step that gives every direction of the averaged change the size that the heads' own changes have."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lte_ray.layout import Plan
from lte_ray.merging.flat_buffer import replica_part, replica_views, views
from lte_ray.merging.low_rank import Share, squared_norms
from lte_ray.merging.policies.weighted import average_weights
from lte_ray.merging.policy import Merge, MergeChange, Pending, Roster, combine
from lte_ray.merging.policy_args import check_range
from lte_ray.optim import orthogonalize


class Orthogonal:
    """m := beta m + D, W += gain sigma msign(D + beta m) for each matrix, D the average change: Muon as outer optimizer.

    Heads with LoRA-Muon or Muon change a matrix about equally in all directions that they train. Their average doesn't: what
    only one of N heads changes counts 1/N, and noise cancels. msign, the matrix sign, sets all singular values to 1, as Muon
    does with the gradient of a whole batch (https://kellerjordan.github.io/posts/muon/). sigma is the root mean square of the
    singular values of a single head's change: the mean over the heads of |D_n| / sqrt(rank), with the largest rank that D_n
    can have.

    Replica parameters take Nesterov steps: m := beta_r m + D, p += lr_r (D + beta_r m).

    A step is taken at the end of a round: once as many contributions have come as there are heads, N. Merges within a round
    add the plain average, D_n / N each, so heads see each other's progress at once; the last one replaces what they added by
    the step. So one merge of all heads and N single arrivals move the base alike. If a round ends with k of N heads because
    others are gone, it is k/N of a step: m decays by beta^(k/N), and sigma counts k/N.

    Needs one tensor as large as the base, and another within a round. A step takes about 28 n^3 + 2 m n^2 multiplications for
    each m x n matrix, n its smaller side: use it if the coordinator can afford that.

    Args:
        gain: size of a step, relative to a head's.
        momentum: beta.
        replica_lr: lr_r.
        replica_momentum: beta_r.
    """

    def __init__(
        self, *, gain: float = 1.0, momentum: float = 0.7, replica_lr: float = 0.7, replica_momentum: float = 0.7
    ) -> None:
        check_range("gain", gain, 0, above=True)
        check_range("momentum", momentum, 0, 1, below=True)
        check_range("replica_lr", replica_lr, 0, above=True)
        check_range("replica_momentum", replica_momentum, 0, 1, below=True)
        self.gain, self.momentum, self.replica_lr, self.replica_momentum = gain, momentum, replica_lr, replica_momentum
        self._m: Tensor | None = None
        self._round = _Round()

    def merge(self, pending: Sequence[Pending], roster: Roster) -> Merge | MergeChange:
        weights, plan = average_weights(pending, roster), pending[0].share.plan
        change = combine(pending, weights)
        sizes = torch.stack([_singular_values(p.share) for p in pending]).sum(0)
        before, self._round = self._round, self._round.add(change, sizes, len(pending))
        if self._round.count < len(roster.live):
            return Merge(weights)
        step, self._round = self._step(self._round, plan, roster.num_heads), _Round()
        return MergeChange(step if before.change is None else step.sub_(before.change), [p.head for p in pending])

    def _step(self, done: _Round, plan: Plan, num_heads: int) -> Tensor:
        """Returns the step that a complete round takes; its tensor is changed."""
        assert done.change is not None
        assert done.sizes is not None
        self._m = torch.zeros_like(done.change) if self._m is None else self._m
        part = done.count / num_heads
        momenta, sizes = views(plan.base, self._m), (done.sizes / done.count * (self.gain * part)).tolist()
        by_name = dict(zip((name for name, _ in _matrices(plan)), sizes, strict=True))
        matrices = defaultdict(list)  # by shape, to be orthogonalized at once
        for name, new in views(plan.base, done.change).items():
            beta = self.momentum if name in by_name else self.replica_momentum
            new.add_(momenta[name].mul_(beta**part).add_(new), alpha=beta)
            if name in by_name:
                matrices[new.shape[0], new[0].numel()].append((new, by_name[name]))
            else:
                new.mul_(self.replica_lr)
        for shape, alike in matrices.items():
            signs = orthogonalize(torch.stack([new.reshape(shape) for new, _ in alike]))
            for sign, (new, size) in zip(signs, alike, strict=True):
                new.copy_(sign.view(new.shape)).mul_(size)
        return done.change

    def state(self) -> dict[str, Tensor]:
        momentum = {} if self._m is None else {"momentum": self._m}
        return momentum | self._round.tensors()

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self._m = tensors["momentum"].clone() if "momentum" in tensors else None
        self._round = _Round.from_tensors(tensors)


@dataclass(frozen=True)
class _Round:
    """What has been merged since the last step.

    Attributes:
        change: the sum of D_n / N; None if there is nothing.
        sizes: the sum of the heads' `_singular_values`.
        count: of contributions.
    """

    change: Tensor | None = None
    sizes: Tensor | None = None
    count: int = 0

    def add(self, change: Tensor, sizes: Tensor, count: int) -> _Round:
        """Returns the round with further contributions; this one stays as it is."""
        if self.change is None or self.sizes is None:
            return _Round(change, sizes, count)
        return _Round(self.change + change, self.sizes + sizes, self.count + count)

    def tensors(self) -> dict[str, Tensor]:
        if self.change is None or self.sizes is None:
            return {}
        return {"round": self.change, "round_sizes": self.sizes, "round_count": torch.tensor(self.count)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> _Round:
        if "round" not in tensors:
            return cls()
        return cls(tensors["round"].clone(), tensors["round_sizes"].clone(), int(tensors["round_count"]))


def _matrices(plan: Plan) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names and shapes, as they are stored, of what is orthogonalized: weights with factors, and weights trained in full."""
    for spec in plan.adapted:
        if len(spec.shape) > 1:
            yield spec.name, (spec.shape[0], math.prod(spec.shape[1:]))
    for replica in plan.replicas:
        if replica.weight:
            yield replica.name, (replica.shape[0], math.prod(replica.shape[1:]))


def _singular_values(share: Share) -> Tensor:
    """The root mean square of the singular values of a head's change of each of `_matrices`, in their order: (k,), float64."""
    plan, squares = share.plan, []
    norms = squared_norms(share)
    for spec, norm in zip(plan.adapted, norms, strict=True):
        if len(spec.shape) > 1:
            squares.append(norm / min(*spec.matrix, spec.rank if share.reference is None else 2 * spec.rank))
    changes = replica_views(plan, replica_part(plan, share.contribution))
    for replica in plan.replicas:
        if replica.weight:
            smaller = min(replica.shape[0], math.prod(replica.shape[1:]))
            squares.append(changes[replica.name].double().square().sum() / smaller)
    return torch.stack(squares).clamp_min(0).sqrt() if squares else norms.new_zeros(0)

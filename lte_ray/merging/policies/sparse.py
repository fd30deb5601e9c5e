"""TIES on products: small changes are dropped, and a sign is elected for each element.

DARE on products: elements are dropped at random and the rest scaled up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lte_ray.merging.policies.elementwise import by_elements, largest, share_of_all, sum_of_entries
from lte_ray.merging.policy import MergeChange, Pending, Roster
from lte_ray.merging.policy_args import within


class Ties:
    """Trim, elect sign, merge (TIES-Merging, arXiv 2306.01708), on the dense products, never on A and B apart.

    Of each layer's change only the share `density` of largest magnitude is kept. An element's sign is that of its sum over
    the k contributions; those of that sign are averaged, and count k/N. What is dropped is lost: a contribution counts as
    merged. Meant for ``--when barrier`` or ``quorum``; of one contribution it only drops.

    Args:
        density: share of each layer's elements to keep; the paper keeps 0.2.
    """

    def __init__(self, *, density: float = 0.2) -> None:
        within("density", density, 0, 1, above=True)
        self.density = density

    def merge(self, pending: Sequence[Pending], roster: Roster) -> MergeChange:
        change = by_elements(pending, roster, _elected_mean, prepare=lambda values: largest(values, self.density))
        return MergeChange(change.mul_(share_of_all(pending, roster)), [p.head for p in pending])


def _elected_mean(values: Tensor) -> Tensor:
    """(k, n) -> (n): the mean of the values that have the sign of their sum, 0 where there are none."""
    agreeing = values.sign() == values.sum(dim=0).sign()  # zeros agree with a sum of zero, and add nothing
    return (values * agreeing).sum(dim=0) / agreeing.sum(dim=0).clamp(min=1)


class Dare:
    """1/N sum of mask * D / (1 - p), each element dropped with probability p (DARE, arXiv 2311.03099), on the dense products.

    In expectation it is the average. The masks depend on (seed, version, head, layer) alone, so a run that is repeated or
    resumed drops the same elements.

    Args:
        drop: p.
        seed: of the masks.
    """

    def __init__(self, *, drop: float = 0.5, seed: int = 0) -> None:
        within("drop", drop, 0, 1, below=True)
        self.drop, self.seed = drop, seed

    def merge(self, pending: Sequence[Pending], roster: Roster) -> MergeChange:
        scale = 1 / ((1 - self.drop) * roster.num_heads)

        def kept(p: Pending, name: str, change: Tensor) -> Tensor:
            drawn = torch.rand(change.shape, generator=self._generator(roster.version, p.head, name))
            return change.mul_((drawn >= self.drop).to(change)).mul_(scale)

        return MergeChange(sum_of_entries(pending, roster, kept), [p.head for p in pending])

    def _generator(self, version: int, head: int, name: str) -> torch.Generator:
        """On the CPU, so that the masks are the same on every device."""
        digest = hashlib.sha256(f"{self.seed} {version} {head} {name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

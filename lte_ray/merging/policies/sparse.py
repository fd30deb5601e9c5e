"""Sparse merges on the dense products: TIES keeps the largest changes and elects signs, DARE drops elements at random."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lte_ray.merging.policies.elementwise import keep_largest, merged_fraction, reduce_elementwise, sum_entries
from lte_ray.merging.policy import MergeChange, Pending, Roster
from lte_ray.merging.policy_args import check_range


class Ties:
    """Trim, elect sign, merge (TIES-Merging, arXiv 2306.01708), on the dense products, never on A and B separately.

    Of each layer's change, keeps the fraction `density` of the elements with the largest magnitudes. An element's sign is that
    of its sum over the k contributions; the changes with this sign are averaged, and have weight k/N. Other changes are lost: a
    contribution counts as merged. Meant for ``--when barrier`` or ``quorum``; of a single contribution it only drops elements.

    Args:
        density: fraction of each layer's elements to keep; the paper keeps 0.2.
    """

    def __init__(self, *, density: float = 0.2) -> None:
        check_range("density", density, 0, 1, above=True)
        self.density = density

    def merge(self, pending: Sequence[Pending], roster: Roster) -> MergeChange:
        change = reduce_elementwise(pending, roster, _elected_mean, prepare=lambda values: keep_largest(values, self.density))
        return MergeChange(change.mul_(merged_fraction(pending, roster)), [p.head for p in pending])


def _elected_mean(values: Tensor) -> Tensor:
    """Returns the mean of the values with the sign of their sum, or 0 if there are none: (k, n) -> (n)."""
    agreeing = values.sign() == values.sum(dim=0).sign()  # zeros agree with a sum of zero and add nothing
    return (values * agreeing).sum(dim=0) / agreeing.sum(dim=0).clamp(min=1)


class Dare:
    """1/N sum of mask * D / (1 - p), each element dropped with probability p (DARE, arXiv 2311.03099), on the dense products.

    Its expected value is the average. The masks depend only on (seed, version, head, layer), so a repeated or resumed run drops
    the same elements.

    Args:
        drop: p, the fraction of elements to drop.
        seed: seed of the masks.
    """

    def __init__(self, *, drop: float = 0.5, seed: int = 0) -> None:
        check_range("drop", drop, 0, 1, below=True)
        self.drop, self.seed = drop, seed

    def merge(self, pending: Sequence[Pending], roster: Roster) -> MergeChange:
        scale = 1 / ((1 - self.drop) * roster.num_heads)

        def drop_and_scale(p: Pending, name: str, change: Tensor) -> Tensor:
            drawn = torch.rand(change.shape, generator=self._generator(roster.version, p.head, name))
            return change.mul_((drawn >= self.drop).to(change)).mul_(scale)

        return MergeChange(sum_entries(pending, roster, drop_and_scale), [p.head for p in pending])

    def _generator(self, version: int, head: int, name: str) -> torch.Generator:
        """Returns a generator on the CPU, so that the masks are the same on every device."""
        digest = hashlib.sha256(f"{self.seed} {version} {head} {name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

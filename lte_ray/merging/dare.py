"""DARE on products: elements are dropped at random and the rest scaled up."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lte_ray.merging.arguments import within
from lte_ray.merging.entries import sum_of_entries
from lte_ray.merging.policy import MergeChange, Pending, Roster


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

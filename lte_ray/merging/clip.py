"""Norm clipping: no contribution moves the base further than others do."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lte_ray.merging.arguments import within
from lte_ray.merging.policy import Merge, Pending, Roster
from lte_ray.merging.window import Window


class Clip:
    """w = 1/N min(1, c / |D|), |D| the Euclidean norm of the whole change (arXiv 1911.07963).

    c is `max_norm`, or else `times` the median norm of the last N contributions, those being merged among them. Norms come
    from the factors, and the merge stays one of weights.

    Args:
        max_norm: c; 0: relative to the other contributions.
        times: how many median norms a contribution may have.
    """

    def __init__(self, *, max_norm: float = 0.0, times: float = 2.0) -> None:
        within("max_norm", max_norm, 0)
        within("times", times, 0, above=True)
        self.max_norm, self.times = max_norm, times
        self._window = Window()

    def merge(self, pending: Sequence[Pending], roster: Roster) -> Merge:
        norms = {p.head: p.norm() for p in pending}
        self._window.add(norms, roster.num_heads)
        most = self.max_norm or self.times * self._window.median()
        return Merge({head: (most / norm if norm > most else 1.0) / roster.num_heads for head, norm in norms.items()})

    def state(self) -> dict[str, Tensor]:
        return {"norms": self._window.state()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self._window.load_state(tensors.get("norms"))

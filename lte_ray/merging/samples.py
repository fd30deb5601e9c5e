"""Weights by how much each head has trained."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lte_ray.merging.policy import Merge, Pending, Roster
from lte_ray.merging.window import Window


class Samples:
    """w_i = n_i / sum of n over the last N contributions, n the samples seen since the reference (FedAvg, arXiv 1602.05629).

    Where all heads merge together this is FedAvg's n_i / n. See `Window` for merges of fewer.
    """

    def __init__(self) -> None:
        self._window = Window()

    def merge(self, pending: Sequence[Pending], roster: Roster) -> Merge:
        return Merge(self._window.weights({p.head: p.samples for p in pending}, roster.num_heads))

    def state(self) -> dict[str, Tensor]:
        return {"samples": self._window.state()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self._window.load_state(tensors.get("samples"))

"""Stale contributions count less."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from lte_ray.merging.arguments import one_of, within
from lte_ray.merging.policy import Merge, Pending, Roster
from lte_ray.merging.window import Window


class Stale:
    """w_i = d_i / sum of d over the last N contributions, with a discount d of the lag (FedAsync, arXiv 1903.03934).

    With late = max(0, lag - fresh): ``none`` d = 1; ``constant`` d = factor where late > 0, else 1; ``polynomial``
    d = (1 + late)^-power. The weights stay normalised: see `Window` for the invariant. So what is taken from late
    contributions goes to fresh ones, and heads that are all equally late get the average.

    Args:
        discount: none, constant or polynomial.
        power: of the polynomial discount.
        factor: of the constant discount.
        fresh: lag, in versions, up to which a contribution isn't late. Where N heads merge one by one, N - 1 is usual.
        by_samples: whether the samples seen since the reference count, too: d_i times n_i.
    """

    def __init__(
        self,
        *,
        discount: Literal["none", "constant", "polynomial"] = "polynomial",
        power: float = 0.5,
        factor: float = 0.5,
        fresh: int = 0,
        by_samples: bool = False,
    ) -> None:
        one_of("discount", discount, ("none", "constant", "polynomial"))
        within("power", power, 0)
        within("factor", factor, 0, 1, above=True)
        within("fresh", fresh, 0)
        self.discount, self.power, self.factor, self.fresh, self.by_samples = discount, power, factor, fresh, by_samples
        self._window = Window()

    def merge(self, pending: Sequence[Pending], roster: Roster) -> Merge:
        amounts = {p.head: self.discounted(p.lag) * (p.samples if self.by_samples else 1) for p in pending}
        return Merge(self._window.weights(amounts, roster.num_heads))

    def discounted(self, lag: int) -> float:
        """d of a lag in versions; in (0, 1]."""
        late = max(0, lag - self.fresh)
        if self.discount == "polynomial":
            return float((1 + late) ** -self.power)
        return self.factor if self.discount == "constant" and late else 1.0

    def state(self) -> dict[str, Tensor]:
        return {"discounts": self._window.state()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self._window.load_state(tensors.get("discounts"))

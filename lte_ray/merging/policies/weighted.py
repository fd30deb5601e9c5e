"""The paper's merge: the mean of the heads' products.

Weights by how much each head has trained.

Stale contributions count less.

Weights in proportion to an amount that stay normalised, also where contributions are merged one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lte_ray.merging.policy import Merge, Pending, Roster
from lte_ray.merging.policy_args import one_of, within


class Average:
    """W_{v+1} = W_v + 1/N sum_n s (B_n A_n - B'_n A'_n) (LTE, eq. 7; reset-less, appendix).

    Each contribution counts 1/N with N the number of heads configured, so that N single arrivals equal one merge of all.
    """

    def merge(self, pending: Sequence[Pending], roster: Roster) -> Merge:
        return Merge(average_weights(pending, roster))


def average_weights(pending: Sequence[Pending], roster: Roster) -> dict[int, float]:
    """1/N for each contribution, N the number of heads configured."""
    return {p.head: 1 / roster.num_heads for p in pending}


class RollingWeights:
    """The amounts a of the last N contributions, N the number of heads configured: w_i = a_i / sum of the window.

    Weights that were normalised within each merge would all be 1/N where a merge takes one contribution: the amounts would
    cancel. So they are normalised over the last N contributions, whatever merges these were in. The contributions being
    merged are among them; until there have been N, the missing ones count as the mean of those seen.

    The invariant: **the weights that any N consecutive contributions would get in one merge sum to 1**, as the average's
    do. From it follows, to rounding:

    - one merge of all N heads: the weights sum to 1;
    - equal amounts: each weight is 1/N, so the result is the average's;
    - amounts that repeat every N contributions (each head once a cycle): the weights of each cycle sum to 1, in whatever
      order the heads arrive and however they are grouped into merges of one;
    - amounts in random order (exchangeable): each weight is 1/N in expectation;
    - the weights of one merge never sum to more than 1.
    """

    def __init__(self) -> None:
        self._last: list[float] = []

    def weights(self, amounts: Mapping[int, float], num_heads: int) -> dict[int, float]:
        """Takes the merge's amounts (head -> amount >= 0) into the window and gives their weights."""
        self.add(amounts, num_heads)
        mean = sum(self._last) / len(self._last)
        if not mean > 0:
            return dict.fromkeys(amounts, 1 / num_heads)
        return {head: amount / (num_heads * mean) for head, amount in amounts.items()}

    def add(self, amounts: Mapping[int, float], num_heads: int) -> None:
        """Takes amounts into the window, and what is older than the last N out."""
        self._last = [*self._last, *map(float, amounts.values())][-num_heads:]

    def median(self) -> float:
        """Of the amounts in the window: the middle one, or the mean of the two in the middle."""
        ordered, middle = sorted(self._last), len(self._last) // 2
        return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2

    def state(self) -> Tensor:
        """The amounts in the window, oldest first."""
        return torch.tensor(self._last, dtype=torch.float64)

    def load_state(self, amounts: Tensor | None) -> None:
        """Takes over what `state` gave; None empties the window."""
        self._last = [] if amounts is None else amounts.tolist()


class Samples:
    """w_i = n_i / sum of n over the last N contributions, n the samples seen since the reference (FedAvg, arXiv 1602.05629).

    Where all heads merge together this is FedAvg's n_i / n. See `RollingWeights` for merges of fewer.
    """

    def __init__(self) -> None:
        self._window = RollingWeights()

    def merge(self, pending: Sequence[Pending], roster: Roster) -> Merge:
        return Merge(self._window.weights({p.head: p.samples for p in pending}, roster.num_heads))

    def state(self) -> dict[str, Tensor]:
        return {"samples": self._window.state()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self._window.load_state(tensors.get("samples"))


class Stale:
    """w_i = d_i / sum of d over the last N contributions, with a discount d of the lag (FedAsync, arXiv 1903.03934).

    With late = max(0, lag - fresh): ``none`` d = 1; ``constant`` d = factor where late > 0, else 1; ``polynomial``
    d = (1 + late)^-power. The weights stay normalised: see `RollingWeights` for the invariant. So what is taken from late
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
        self._window = RollingWeights()

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

"""Merges by weights alone: the paper's average, weights by samples, and lower weights for stale contributions.

`RollingWeights` keeps weights normalized even if contributions are merged one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lte_ray.merging.policy import Merge, Pending, Roster
from lte_ray.merging.policy_args import check_choice, check_range


class Average:
    """W_{v+1} = W_v + 1/N sum_n s (B_n A_n - B'_n A'_n) (LTE, arXiv 2402.16828, eq. 7; reset-less: appendix).

    Each contribution has weight 1/N, with N the configured number of heads, so that N single arrivals equal one merge of all.
    """

    def merge(self, pending: Sequence[Pending], roster: Roster) -> Merge:
        return Merge(average_weights(pending, roster))


def average_weights(pending: Sequence[Pending], roster: Roster) -> dict[int, float]:
    """Returns the weight 1/N for each contribution, N being the configured number of heads."""
    return {p.head: 1 / roster.num_heads for p in pending}


class RollingWeights:
    """Weights in proportion to amounts, normalized over the last N contributions, with N the configured number of heads.

    w_i = a_i / sum of the amounts a in the window. Normalized within each merge, all weights would be 1/N if a merge takes one
    contribution: the amounts would cancel. So the window spans the last N contributions, regardless of the merges in which they
    were, and includes those being merged. Until there have been N, each missing one counts as the mean of the others.

    The invariant: **the weights that any N consecutive contributions would get in one merge sum to 1**, as those of the average
    do. It follows, up to rounding:

    - one merge of all N heads: the weights sum to 1;
    - equal amounts: each weight is 1/N, so the result is the average;
    - amounts that repeat every N contributions (each head once per cycle): the weights of each cycle sum to 1, in whatever
      order the heads arrive and however they are grouped into merges of one;
    - amounts in random order (exchangeable): each weight is 1/N in expectation;
    - the weights of one merge never sum to more than 1.
    """

    def __init__(self) -> None:
        self._amounts: list[float] = []

    def weights(self, amounts: Mapping[int, float], num_heads: int) -> dict[int, float]:
        """Adds the merge's amounts (head -> amount >= 0) to the window and returns their weights."""
        self.add(amounts, num_heads)
        mean = sum(self._amounts) / len(self._amounts)
        if not mean > 0:
            return dict.fromkeys(amounts, 1 / num_heads)
        return {head: amount / (num_heads * mean) for head, amount in amounts.items()}

    def add(self, amounts: Mapping[int, float], num_heads: int) -> None:
        """Adds amounts to the window, and drops all but the last N."""
        self._amounts = [*self._amounts, *map(float, amounts.values())][-num_heads:]

    def median(self) -> float:
        """Returns the median of the amounts in the window; of an even number, the mean of the middle two."""
        ordered, middle = sorted(self._amounts), len(self._amounts) // 2
        return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2

    def state(self) -> Tensor:
        """Returns the amounts in the window, oldest first."""
        return torch.tensor(self._amounts, dtype=torch.float64)

    def load_state(self, amounts: Tensor | None) -> None:
        """Restores what `state` returned; None empties the window."""
        self._amounts = [] if amounts is None else amounts.tolist()


class Samples:
    """w_i = n_i / sum of n over the last N contributions, n the samples seen since the reference (FedAvg, arXiv 1602.05629).

    If all heads merge together, this is FedAvg's n_i / n. See `RollingWeights` for merges of fewer.
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

    With late = max(0, lag - fresh): ``none`` d = 1; ``constant`` d = factor if late > 0, else 1; ``polynomial``
    d = (1 + late)^-power. The weights stay normalized (see `RollingWeights`): late contributions lose weight to fresh ones, and
    if all heads are equally late, the result is the average.

    Args:
        discount: none, constant or polynomial.
        power: exponent of the polynomial discount.
        factor: factor of the constant discount.
        fresh: largest lag, in versions, that isn't discounted. If N heads merge one by one, a lag of N - 1 is usual.
        by_samples: whether to weight by the samples seen since the reference, too: d_i times n_i.
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
        check_choice("discount", discount, ("none", "constant", "polynomial"))
        check_range("power", power, 0)
        check_range("factor", factor, 0, 1, above=True)
        check_range("fresh", fresh, 0)
        self.discount, self.power, self.factor, self.fresh, self.by_samples = discount, power, factor, fresh, by_samples
        self._window = RollingWeights()

    def merge(self, pending: Sequence[Pending], roster: Roster) -> Merge:
        amounts = {p.head: self.discount_for(p.lag) * (p.samples if self.by_samples else 1) for p in pending}
        return Merge(self._window.weights(amounts, roster.num_heads))

    def discount_for(self, lag: int) -> float:
        """Returns the discount d for a lag in versions; in (0, 1]."""
        late = max(0, lag - self.fresh)
        if self.discount == "polynomial":
            return float((1 + late) ** -self.power)
        return self.factor if self.discount == "constant" and late else 1.0

    def state(self) -> dict[str, Tensor]:
        return {"discounts": self._window.state()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self._window.load_state(tensors.get("discounts"))

"""Weights in proportion to an amount that stay normalised, also where contributions are merged one at a time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Window:
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

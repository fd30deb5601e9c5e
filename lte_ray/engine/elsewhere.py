"""What the coordinator knows of contributions whose tensors are in shards: numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from torch import Tensor

from lte_ray.merging.products import Share


@dataclass(frozen=True)
class Measured:
    """A contribution that every shard has decoded: the sum of squares of all its elements."""

    squares: float


class NeedsTensors(Exception):
    """A policy looked at the tensors of a contribution, which aren't in the coordinator's process."""


class Elsewhere(Share):
    """Stands for the share of a contribution whose tensors are in shards: to look at it is a `NeedsTensors`."""

    def __init__(self) -> None:
        """It has nothing."""

    def _missing(self) -> NoReturn:
        raise NeedsTensors

    @property
    def weight(self) -> float:
        self._missing()

    @property
    def contribution(self) -> Tensor:
        self._missing()

    @property
    def reference(self) -> Tensor | None:
        self._missing()

    @property
    def plan(self) -> NoReturn:
        self._missing()

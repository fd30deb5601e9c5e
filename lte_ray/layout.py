"""Which parts of a model are trained and merged, and where each part lies in a flat buffer.

A `Plan` describes a converted model by names and shapes alone, so it can cross processes, and the coordinator needs no model.
It has two layouts: `base` (main weights and replica parameters, which the coordinator owns and publishes) and `contribution`
(factors and replica changes, which a head sends). No tensors are kept here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Entry:
    """One named tensor in a flat buffer; `offset` and `size` count elements."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """Tensors laid end to end in one flat buffer of `size` elements."""

    entries: tuple[Entry, ...]

    @classmethod
    def from_shapes(cls, shapes: list[tuple[str, tuple[int, ...]]]) -> Layout:
        """Lays tensors of these names and shapes end to end, in their order."""
        entries, offset = [], 0
        for name, shape in shapes:
            entries.append(Entry(name, shape, offset))
            offset += math.prod(shape)
        return cls(tuple(entries))

    @cached_property
    def size(self) -> int:
        return sum(entry.size for entry in self.entries)


@dataclass(frozen=True)
class Adapted:
    """A main weight with factors. As a matrix it is W (out x in); the factors are A (rank x in) and B (out x rank).

    Attributes:
        name: of the parameter in the unconverted model.
        shape: as it is stored, with any number of dimensions.
        rank, scaling: r and s; the head computes with W~ + s B A.
        transposed: whether it is stored as in x out, as transformers' Conv1D does.
        lr: multiplier of the factors' learning rate.
        base_dtype: format of the heads' copies of W.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    scaling: float
    transposed: bool = False
    lr: float = 1.0
    base_dtype: str = "fp32"

    @property
    def matrix(self) -> tuple[int, int]:
        """(out, in): the first dimension and the product of all others; a vector of d elements is d x 1."""
        first, rest = self.shape[0], math.prod(self.shape[1:])
        return (rest, first) if self.transposed else (first, rest)

    @property
    def a_name(self) -> str:
        """Name of A in the contribution layout."""
        return f"{self.name}.lora_A"

    @property
    def b_name(self) -> str:
        """Name of B in the contribution layout."""
        return f"{self.name}.lora_B"


@dataclass(frozen=True)
class Replica:
    """A parameter that trains without LoRA: each head trains a copy, and merges average the changes.

    A `buffer` that training changes, such as BatchNorm's running statistics, is treated alike. A `weight` is a matrix, of
    two or more dimensions, that would have factors if the run weren't in full rank.
    """

    name: str
    shape: tuple[int, ...]
    lr: float = 1.0
    buffer: bool = False
    weight: bool = False


@dataclass(frozen=True)
class Plan:
    """The trained parts of one head's model, by parameter names of the unconverted model.

    Heads may differ in their ranks; their `base` is the same. With full rank, `adapted` is empty.
    """

    adapted: tuple[Adapted, ...]
    replicas: tuple[Replica, ...]

    def full_rank(self) -> Plan:
        """Returns the plan that trains the adapted weights themselves, as replicas. Its base layout is the same."""
        weights = tuple(Replica(a.name, a.shape, a.lr, weight=len(a.shape) > 1) for a in self.adapted)
        return Plan((), weights + self.replicas)

    @cached_property
    def base(self) -> Layout:
        """Main weights, then replica parameters."""
        return Layout.from_shapes([(a.name, a.shape) for a in self.adapted] + [(r.name, r.shape) for r in self.replicas])

    @cached_property
    def contribution(self) -> Layout:
        """A and B of each adapted weight, then the changes of the replica parameters."""
        factors: list[tuple[str, tuple[int, ...]]] = []
        for a in self.adapted:
            factors += [(a.a_name, (a.rank, a.matrix[1])), (a.b_name, (a.matrix[0], a.rank))]
        return Layout.from_shapes(factors + [(r.name, r.shape) for r in self.replicas])

    @cached_property
    def factors_size(self) -> int:
        """Elements of all factors, which come first in a contribution."""
        return sum(a.rank * sum(a.matrix) for a in self.adapted)

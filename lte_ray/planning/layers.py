"""Which parts of a model get factors, train as replicas or stay as they are; what repeats is one row."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lte_ray.engine.prepare import named_tensors
from lte_ray.layout import Plan
from lte_ray.planning.shapes import Shapes

FACTORS, REPLICA, STATISTICS, FROZEN = "factors", "replica", "statistics", "frozen"
"""What happens to a parameter or buffer; statistics are buffers that merges average."""


@dataclass(frozen=True)
class LayerRow:
    """Parameters of one shape and one kind of layer whose names differ in numbers only.

    Attributes:
        name: with ranges instead of these numbers: ``blocks.0..11.up.weight``.
        count: how many they are.
        shape: of each.
        how: "factors", "replica", "statistics" or "frozen".
        ranks: of the factors, by head; one number if the heads agree, none without factors.
        base_dtype: format of the heads' copies; empty without factors.
        parameters: elements of all of them.
        trained: elements that the first head trains for them.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    how: str
    ranks: tuple[int, ...]
    base_dtype: str
    parameters: int
    trained: int


def layer_rows(shapes: Shapes) -> tuple[LayerRow, ...]:
    """Returns the rows of an unconverted model: factors first, then replicas, then what is frozen."""
    groups: dict[tuple[object, ...], list[str]] = {}
    kinds = {name: type(module).__name__ for name, module in shapes.model.named_modules()}
    for name, key in _treatments(shapes):
        groups.setdefault((re.sub(r"(?<![^.])\d+(?![^.])", "#", name), kinds[name.rpartition(".")[0]], *key), []).append(name)
    rows = []
    for (_, _, shape, how, ranks, base_dtype), names in groups.items():
        assert isinstance(shape, tuple) and isinstance(ranks, tuple)
        size = math.prod(shape)
        first = shapes.plans[0]
        if how == FACTORS:
            spec = next(a for a in first.adapted if a.name == names[0])
            trained = spec.rank * sum(spec.matrix)
        else:
            trained = size if how == REPLICA else 0
        count = len(names)
        rows.append(LayerRow(join_names(names), count, shape, str(how), ranks, str(base_dtype), count * size, count * trained))
    order = (FACTORS, REPLICA, STATISTICS, FROZEN)
    return tuple(sorted(rows, key=lambda row: order.index(row.how)))


def _treatments(shapes: Shapes) -> Iterable[tuple[str, tuple[object, ...]]]:
    """The name of each parameter and merged buffer, and what its row must agree on."""
    plans = shapes.plans
    adapted = {spec.name: index for index, spec in enumerate(plans[0].adapted)}
    replicas = {replica.name: replica for replica in plans[0].replicas}
    parameters = dict(shapes.model.named_parameters())
    for name, tensor in named_tensors(shapes.model).items():
        shape = tuple(tensor.shape)
        if name in adapted:
            ranks = tuple(plan.adapted[adapted[name]].rank for plan in plans)
            one = ranks[:1] if len(set(ranks)) == 1 else ranks
            yield name, (shape, FACTORS, one, plans[0].adapted[adapted[name]].base_dtype)
        elif name in replicas:
            yield name, (shape, STATISTICS if replicas[name].buffer else REPLICA, (), "")
        elif name in parameters:
            yield name, (shape, FROZEN, (), "")


def join_names(names: Sequence[str]) -> str:
    """Returns names that differ in numbers only as one: ``h.0..2.w``, ``h.0,2.w``, or ``h.*.w`` if combinations are missing."""
    parts = [name.split(".") for name in names]
    if len(names) == 1:
        return names[0]
    columns = [sorted(set(column), key=lambda text: (not text.isdigit(), int(text) if text.isdigit() else 0)) for column in
               zip(*parts, strict=True)]  # fmt: skip
    complete = math.prod(len(column) for column in columns) == len(names)
    return ".".join(column[0] if len(column) == 1 else _range(column) if complete else "*" for column in columns)


def _range(column: Sequence[str]) -> str:
    numbers = [int(text) for text in column]
    contiguous = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    return f"{numbers[0]}..{numbers[-1]}" if contiguous else ",".join(column)


@dataclass(frozen=True)
class Counts:
    """Elements of a model: of all parameters, of those with factors, of the first head's factors, of replicas, and frozen."""

    parameters: int
    adapted: int
    factors: int
    replicas: int
    frozen: int

    @property
    def trained(self) -> int:
        """What a head trains."""
        return self.factors + self.replicas


def count_parameters(rows: Sequence[LayerRow], plan: Plan) -> Counts:
    """Returns the sums of the rows."""
    by = {how: [row for row in rows if row.how == how] for how in (FACTORS, REPLICA, FROZEN)}
    adapted, replicas, frozen = (sum(row.parameters for row in by[how]) for how in (FACTORS, REPLICA, FROZEN))
    return Counts(adapted + replicas + frozen, adapted, plan.factors_size, replicas, frozen)

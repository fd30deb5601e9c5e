"""All rows of a run's ``metrics.jsonl`` as columns of numbers, so that 100,000 rows fit into memory.

Rows may come from another release, or from a damaged file, so nothing in them is taken for granted.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lte_ray.run.metrics import Row
from lte_ray.run.metrics_files import METRICS, MetricsReader
from lte_ray.run.newest_rows import to_number
from lte_ray.run.sinks.figures import MAX_HEADS, NOT_FIGURES, name_figures
from lte_ray.run.tail import parse_row, read_lines
from lte_ray.storage import RunDirectory

Numbers = npt.NDArray[np.float64]

MAX_COLUMNS = 1000
"""Figures that are read. Only a damaged file, or a worker that makes up names as it goes on, has more."""

PLACES = ("at", "version", "step", "samples")
"""What says where a row belongs."""

NUMBERS = {int, float}
"""Types of JSON's numbers."""

LATER_FIELDS = {"bytes_up": "traffic/bytes_up", "stall_seconds": "merge/stall_seconds"}
"""Fields that rows of older releases lack, and what they are called as figures."""


class Columns:
    """Columns of numbers of equal length, NaN where a row has no number."""

    def __init__(self) -> None:
        self.length = 0
        self.left_out = False
        self._columns: dict[str, array[float]] = {}
        self._last: tuple[list[str], list[array[float]]] = [], []  # names and columns of the last row

    def add(self, values: Mapping[str, float]) -> None:
        """Adds a row. A name beyond `MAX_COLUMNS` is left out."""
        names = list(values)
        if names == self._last[0] and not self.left_out:  # as most rows
            for column, value in zip(self._last[1], values.values(), strict=True):
                column.append(value)
        else:
            self._add_other(values)
            self._last = names, [self._columns[name] for name in names if name in self._columns]
        self.length += 1

    def _add_other(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            column = self._columns.get(name)
            if column is None:
                if len(self._columns) >= MAX_COLUMNS:
                    self.left_out = True
                    continue
                column = self._columns[name] = array("d")
            missing = self.length - len(column)
            if missing:
                column.extend([math.nan] * missing)
            column.append(value)

    def names(self) -> list[str]:
        """The names of the columns, in the order in which they came."""
        return list(self._columns)

    def get(self, name: str) -> Numbers:
        """A column; all NaN if no row had it."""
        column = self._columns.get(name, array("d"))
        column.extend([math.nan] * (self.length - len(column)))
        return np.frombuffer(column, dtype=np.float64) if self.length else np.empty(0)


@dataclass
class RunRows:
    """The rows of a run.

    Attributes:
        merges, evaluations: figures, named as in sinks, and `PLACES`. Merges that the run went back from aren't among them.
        contributions: (k, 3): row among `merges`, head, and the seconds for which merging kept it from training before, NaN if
            not known.
        events: rows of kind "event".
        damaged: lines that aren't rows.
        rewound: merges that are left out, since the run went back and made them again.
        missing: what no row has, in words.
    """

    merges: dict[str, Numbers] = field(default_factory=dict)
    evaluations: dict[str, Numbers] = field(default_factory=dict)
    contributions: Numbers = field(default_factory=lambda: np.empty((0, 3)))
    events: list[Row] = field(default_factory=list)
    damaged: int = 0
    rewound: int = 0
    missing: tuple[str, ...] = ()


def read_columns(directory: RunDirectory, num_heads: int) -> RunRows:
    """Reads all rows of a run.

    Args:
        num_heads: of the run. Above `MAX_HEADS`, figures of single heads are left out.

    Raises:
        StorageError: the file can't be read.
    """
    rows, reader = RunRows(), _Reader(num_heads <= MAX_HEADS)
    for line in read_lines(MetricsReader(directory)):
        row = parse_row(line)
        if row is None or not reader.read(row, rows.events):
            rows.damaged += 1
    kept = _not_rewound(reader.merges.get("version"))
    rows.rewound = int(len(kept) - kept.sum())
    rows.merges = {name: reader.merges.get(name)[kept] for name in (*PLACES, *reader.merges.names())}
    rows.contributions = _renumbered(np.array(reader.contributions, dtype=np.float64).reshape(-1, 3), kept)
    evaluated = reader.evaluations
    order = np.argsort(evaluated.get("version"), kind="stable")
    rows.evaluations = {name: evaluated.get(name)[order] for name in (*PLACES, *evaluated.names())}
    rows.missing = tuple(_describe_missing(rows, reader))
    return rows


class _FigureNames:
    """Names the figures of many rows, as `name_figures` does, which is asked only once for each kind of table in them."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, ...], list[str]] = {}

    def name(self, row: Row) -> dict[str, float]:
        """The finite numbers of a merge or an evaluation by their names in sinks."""
        figures: dict[str, float] = {}
        fields = [field for field in row if field not in NOT_FIGURES and field != "figures"]
        for field_name in [*fields, "figures"] if "figures" in row else fields:
            for name, value in self._flatten(row["kind"], (field_name,), row[field_name]):
                figures.setdefault(name, value)
        return figures

    def _flatten(self, kind: str, path: tuple[str, ...], value: Any) -> Iterable[tuple[str, float]]:
        if isinstance(value, dict) and value:
            types = set(map(type, value.values()))
            if types <= NUMBERS and math.isfinite(total := sum(value.values())):
                names = self._known_names(kind, path, tuple(value))
                if len(names) == len(value):
                    return zip(names, value.values(), strict=True)
                if len(names) == len(value) + 1:  # by head, after the mean
                    return zip(names, (total / len(value), *value.values()), strict=True)
            elif types == {dict} and len(path) == 1:
                return [pair for name, inner in value.items() for pair in self._flatten(kind, (*path, name), inner)]
        elif type(value) in NUMBERS and len(path) == 1 and math.isfinite(value):
            return [(self._known_names(kind, path, ())[0], float(value))]
        return name_figures(_row_of(kind, path, value)).items()

    def _known_names(self, kind: str, path: tuple[str, ...], keys: tuple[str, ...]) -> list[str]:
        names = self._names.get((kind, *path, "", *keys))
        if names is None:
            table = dict.fromkeys(keys, 0.0) if keys else 0.0
            names = self._names[(kind, *path, "", *keys)] = list(name_figures(_row_of(kind, path, table)))
        return names


def _row_of(kind: str, path: tuple[str, ...], value: Any) -> Row:
    """A row with one field."""
    for name in reversed(path):
        value = {name: value}
    return {"kind": kind, **value}


class _Reader:
    """Sorts rows into columns."""

    def __init__(self, by_head: bool) -> None:
        self.merges, self.evaluations = Columns(), Columns()
        self.contributions: array[float] = array("d")
        self._by_head, self._names = by_head, _FigureNames()

    def read(self, row: Row, events: list[Row]) -> bool:
        """Takes a row. Returns whether it is one."""
        if row["kind"] == "event":
            events.append(row)
            return True
        into = {"merge": self.merges, "evaluation": self.evaluations}.get(row["kind"])
        if into is None or to_number(row.get("version")) is None:
            return False
        try:
            figures = self._names.name(row)
        except (RecursionError, OverflowError):  # an integer may be larger than any float
            return False
        if not self._by_head:
            figures = {name: value for name, value in figures.items() if "/head_" not in name}
        places = {name: number for name in PLACES if (number := to_number(row.get(name))) is not None}
        if into is self.merges:
            self.contributions.extend(_contributions(row, self.merges.length))
        into.add(places | figures)
        return True


def _contributions(row: Row, index: int) -> Iterator[float]:
    heads, stalls = row.get("heads"), row.get("stall_seconds")
    for head in heads if isinstance(heads, list) else ():
        if isinstance(head, int):
            stall = to_number(stalls.get(str(head))) if isinstance(stalls, dict) else None
            yield from (index, head, math.nan if stall is None else stall)


def _not_rewound(versions: Numbers) -> npt.NDArray[np.bool_]:
    """Which rows count: those after which no row has the same version, or an earlier one."""
    if not len(versions):
        return np.ones(0, dtype=bool)
    return versions < np.append(np.minimum.accumulate(versions[::-1])[::-1][1:], np.inf)


def _renumbered(contributions: Numbers, kept: npt.NDArray[np.bool_]) -> Numbers:
    """The contributions to kept rows, with the rows' new numbers."""
    if not len(contributions):
        return contributions
    rows = contributions[:, 0].astype(np.int64)
    numbers = np.cumsum(kept) - 1
    return np.column_stack([numbers[rows], contributions[:, 1:]])[kept[rows]]


def _describe_missing(rows: RunRows, reader: _Reader) -> Iterator[str]:
    if rows.damaged:
        yield f"{rows.damaged:,} lines of {METRICS} can't be read and are left out."
    if reader.merges.left_out or reader.evaluations.left_out:
        yield f"The rows have more than {MAX_COLUMNS:,} figures; the others are left out."
    if not reader.merges.length:
        yield "Nothing was merged yet."
        return
    lacking = [name for name in ("at", "step", "samples") if np.isnan(rows.merges[name]).any()]
    lacking += [name for name, figure in LATER_FIELDS.items() if figure not in rows.merges]
    if lacking:
        yield f"Rows of merges lack {', '.join(lacking)}, as those of older releases do. What follows from them is left out."

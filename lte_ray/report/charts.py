"""The charts of a report: which lines each has, and their thinned values as the page's script reads them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lte_ray.report.figures import LEFT_OUT, ZERO_LEFT_OUT, base_name, chart_kind, order
from lte_ray.report.ladder_data import LadderData
from lte_ray.report.run_data import AXES, RunData
from lte_ray.report.thinning import Numbers, edges, thin, thin_place

MAX_NUMBERS = 250_000
"""Numbers in all curves of a report, about 8 bytes each."""

MAX_STRETCHES, MIN_STRETCHES = 600, 40
"""Stretches of rows that a curve shows, at most and at least. Each has two points."""

DIGITS = 5
"""Significant digits of values."""

WAYS = {"dense": "heads with dense broadcasts", "ddp": "DDP", "diloco": "DiLoCo"}
"""Other ways of training whose traffic is compared."""


@dataclass
class ChartData:
    """What the page's script draws.

    Attributes:
        tables: by key, "axes" (by name, where the points are) and "columns".
        charts: each with "section", "title", "unit", "help" and "lines".
        notes: which curves are thinned, in words.
    """

    tables: list[dict[str, Any]] = field(default_factory=list)
    charts: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class _Line:
    """A line of a chart before it is thinned: a column of a table, how it is called, whose it is, and how it is drawn."""

    table: int
    name: str
    label: str
    color: int
    style: str


@dataclass
class _Source:
    """The columns that belong together, with where their rows are."""

    owner: str
    rows_are: str
    columns: dict[str, Numbers]
    used: list[str] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(next(iter(self.columns.values()), ()))


def make_charts(runs: Sequence[RunData], ladders: Sequence[LadderData]) -> ChartData:
    """Returns all charts. With several runs, each has one line of each figure; alone, also one for each head."""
    sources = []
    for run in runs:
        sources += [_Source(run.name, "merges", run.merges), _Source(run.name, "evaluations", run.evaluations)]
    charts: dict[str, list[_Line]] = {}
    for table, source in enumerate(sources):
        for name in [each for each in source.columns if each not in AXES]:
            figure, part = base_name(name)
            if _is_left_out(figure, source.columns[name]) or (part and len(runs) > 1):
                continue
            line = _make_line(table, name, part, runs[table // 2].name, table // 2, alone=len(runs) == 1)
            charts.setdefault(figure if not figure.startswith("traffic/sent") else "traffic/sent", []).append(line)
            source.used.append(name)
    for ladder in ladders:
        for number, curve in enumerate(ladder.curves):
            sources.append(_Source(ladder.name, "evaluations", curve.columns))
            for name in [each for each in curve.columns if each not in AXES]:
                label = f"{ladder.name}: {curve.label}" if len(ladders) + len(runs) > 1 else curve.label
                style = "main" if curve.is_best else "part"
                charts.setdefault(name, []).append(_Line(len(sources) - 1, name, label, number + len(runs), style))
                sources[-1].used.append(name)
    return _thin(sources, charts)


def _is_left_out(figure: str, column: Numbers) -> bool:
    if figure.startswith(LEFT_OUT) or not np.isfinite(column).any():
        return True
    return figure in ZERO_LEFT_OUT and not np.nan_to_num(column).any()


def _make_line(table: int, name: str, part: str, run: str, number: int, *, alone: bool) -> _Line:
    if name.startswith("traffic/sent/"):
        way = WAYS[name.rpartition("/")[2]]
        color = number + 1 + list(WAYS.values()).index(way) if alone else number
        return _Line(table, name, way if alone else f"{run}: {way}", color, "other")
    if not alone:
        return _Line(table, name, run, number, "main")
    if part:
        head = part.removeprefix("head ")
        return _Line(table, name, part, int(head) + 1 if head.isdigit() else 1, "part")
    return _Line(table, name, "this run" if name == "traffic/sent" else "mean", number, "main")


def _thin(sources: Sequence[_Source], charts: dict[str, list[_Line]]) -> ChartData:
    """Thins all columns that charts use."""
    data = ChartData()
    stretches = _stretches(sources)
    places: list[dict[str, int]] = []
    for source in sources:
        bounds = edges(source.length, stretches)
        axes = {name: _as_places(thin_place(source.columns[name], bounds)) for name in AXES if name in source.columns}
        columns = [_as_numbers(thin(source.columns[name], bounds)) for name in source.used]
        data.tables.append({"axes": axes, "columns": columns})
        places.append({name: number for number, name in enumerate(source.used)})
        if len(bounds) <= source.length:
            text = (
                f"{source.owner}: the curves of {source.length:,} {source.rows_are} are thinned. Each of {stretches} "
                "stretches of them shows its lowest and its highest value, so no peak is lost."
            )
            data.notes.append(text)
    for figure, lines in sorted(charts.items(), key=lambda item: order(item[0])):
        kind = chart_kind(figure)
        shown = [
            {
                "table": line.table,
                "column": places[line.table][line.name],
                "label": line.label,
                "color": line.color,
                "style": line.style,
            }
            for line in sorted(lines, key=lambda line: line.style == "main")  # which is drawn last, above the others
        ]
        only = len(shown) == 1 and len(sources) <= 2
        data.charts.append(
            {
                "figure": figure,
                "section": kind.section,
                "title": kind.title,
                "unit": kind.unit,
                "help": kind.help,
                "lines": [{**shown[0], "label": kind.title}] if only else shown,
            }
        )
    return data


def _stretches(sources: Sequence[_Source]) -> int:
    """How many stretches keep the page small enough."""
    long = [source for source in sources if source.length > 2 * MIN_STRETCHES]
    columns = sum(len(source.used) + len(AXES) for source in long)
    return max(MIN_STRETCHES, min(MAX_STRETCHES, MAX_NUMBERS // (2 * max(1, columns))))


def _as_numbers(column: Numbers) -> list[float | None]:
    return list(_rounded(column))


def _rounded(column: Numbers) -> Iterator[float | None]:
    for value in column.tolist():
        yield None if not math.isfinite(value) else _whole(float(f"{value:.{DIGITS}g}"))


def _as_places(column: Numbers) -> list[float]:
    return [_whole(round(value, 3)) for value in column.tolist()]


def _whole(value: float) -> float:
    return int(value) if value == int(value) else value

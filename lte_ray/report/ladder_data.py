"""A ladder or a sweep as a report shows it, read from ``ladder.json`` or ``sweep.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lte_ray.config.ladder import RESULTS
from lte_ray.config.sweep import RESULTS as SWEEP_RESULTS
from lte_ray.errors import StorageError
from lte_ray.redaction import printable
from lte_ray.report.thinning import Numbers
from lte_ray.run.display import format_bytes, format_duration
from lte_ray.run.newest_rows import to_number
from lte_ray.storage import RunDirectory


@dataclass(frozen=True)
class LadderCurve:
    """The evaluations of one training: its name, the columns, and whether it was the best of its rung, or of its sweep."""

    label: str
    columns: dict[str, Numbers]
    is_best: bool


@dataclass
class LadderData:
    """A ladder, or a sweep.

    Attributes:
        name, place: of the folder.
        curves: of the trainings that were evaluated.
        header, rows: of the table of all trainings.
        settings: that they share, by name, as text.
        missing: what can't be read, one sentence each.
    """

    name: str
    place: str
    curves: list[LadderCurve] = field(default_factory=list)
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def read_ladder(directory: RunDirectory) -> LadderData:
    """Reads the results of a ladder. Those that can't be read are missing in words.

    Raises:
        StorageError: the file is damaged.
    """
    data, content, arms = _read_arms(directory, RESULTS)
    best = _best(content)
    figures = _figures(arms)
    data.header = ["rung", "rate", "seed", *_titles(figures), "samples", "sent", "time", ""]
    for arm in arms:
        points, rung, rate = list(_points(arm)), str(arm.get("rung")), to_number(arm.get("rate"))
        data.rows.append(_row(arm, [arm.get("rung"), arm.get("rate"), arm.get("seed")], points, figures))
        if points:
            label = f"{rung} (rate x{arm.get('rate')}, seed {arm.get('seed')})"
            data.curves.append(_curve(label, points, best.get(rung) == rate))
    if arms and not best:
        data.missing.append("The ladder hasn't ended, or is of an older release: the best rate of each rung isn't marked.")
    return data


def read_sweep(directory: RunDirectory) -> LadderData:
    """Reads the results of a sweep, as `read_ladder`.

    Raises:
        StorageError: the file is damaged.
    """
    data, content, arms = _read_arms(directory, SWEEP_RESULTS)
    best = content.get("best")
    best_name = best.get("name") if isinstance(best, dict) else None
    figures, flags = _figures(arms), list(dict.fromkeys(str(flag) for arm in arms for flag in _values(arm)))
    data.header = ["trial", *map(printable, flags), "seed", *_titles(figures), "samples", "sent", "time", ""]
    for arm in arms:
        points, values, name = list(_points(arm)), _values(arm), arm.get("name")
        cells = [name, *(values.get(flag, "") for flag in flags), arm.get("seed")]
        data.rows.append(_row(arm, cells, points, figures))
        if points:
            label = " ".join([f"{name}:", *(f"{flag}={value}" for flag, value in values.items())])
            data.curves.append(_curve(label, points, name == best_name))
    if arms and best_name is None:
        data.missing.append("The sweep hasn't ended: the best trial isn't marked.")
    return data


def _read_arms(directory: RunDirectory, file: str) -> tuple[LadderData, dict[str, Any], list[dict[str, Any]]]:
    """What ladders and sweeps have in common: the settings, the content of the file, and its trainings.

    Raises:
        StorageError: the file is damaged.
    """
    where = printable(directory.path_to(file))
    try:
        content = json.loads(directory.read(file))
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{where} is damaged: {error}.") from error
    if not isinstance(content, dict) or not isinstance(content.get("arms"), list):
        raise StorageError(f"{where} is damaged: it has no list of trainings (arms).")
    data = LadderData(printable(directory.path.rpartition("/")[2]), printable(directory.display))
    settings = content.get("settings")
    if isinstance(settings, dict):
        data.settings = {printable(str(name)): printable(str(value)) for name, value in settings.items()}
    arms = [arm for arm in content["arms"] if isinstance(arm, dict)]
    if not arms:
        data.missing.append("No training is done yet.")
    if len(arms) < len(content["arms"]):
        data.missing.append(f"{len(content['arms']) - len(arms):,} results can't be read and are left out.")
    return data, content, arms


def _figures(arms: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for arm in arms for _, values in _points(arm) for name in values))


def _titles(figures: list[str]) -> list[str]:
    return [name.replace("_", " ") for name in figures]


def _values(arm: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of a trial."""
    values = arm.get("values")
    return values if isinstance(values, dict) else {}


def _best(content: Mapping[str, Any]) -> dict[str, float]:
    """The best rate of each rung; empty if the file doesn't say."""
    best = content.get("best")
    rates = {rung: to_number(rate) for rung, rate in best.items()} if isinstance(best, dict) else {}
    return {rung: rate for rung, rate in rates.items() if rate is not None}


def _points(arm: Mapping[str, Any]) -> Iterator[tuple[tuple[float, float], dict[str, float]]]:
    """The evaluations: (step, samples) and the figures."""
    points = arm.get("points")
    for point in points if isinstance(points, list) else ():
        values = point.get("figures") if isinstance(point, dict) else None
        step, samples = (to_number(point.get(name)) if isinstance(point, dict) else None for name in ("step", "samples"))
        if isinstance(values, dict) and step is not None and samples is not None:
            numbers = {printable(str(name)): to_number(value) for name, value in values.items()}
            yield (step, samples), {name: math.nan if value is None else value for name, value in numbers.items()}


def _row(arm: Mapping[str, Any], cells: list[Any], points: list[Any], figures: list[str]) -> list[str]:
    """The row of a training, which `cells` begin."""
    last = points[-1][1] if points else {}
    values = [f"{last[name]:.4g}" if math.isfinite(last.get(name, math.nan)) else "" for name in figures]
    sent, seconds = to_number(arm.get("sent")), to_number(arm.get("seconds"))
    return [
        *(printable(str(cell)) for cell in cells),
        *values,
        f"{points[-1][0][1]:,.0f}" if points else "",
        format_bytes(sent) if sent else "",
        format_duration(seconds) if seconds is not None else "",
        printable(str(arm.get("failed") or (f"stopped: {arm['stopped']}" if arm.get("stopped") else ""))),
    ]


def _curve(label: str, points: list[Any], is_best: bool) -> LadderCurve:
    places = np.maximum.accumulate(np.array([place for place, _ in points]), axis=0)
    names = list(dict.fromkeys(name for _, values in points for name in values))
    columns = {f"eval/{name}": np.array([values.get(name, math.nan) for _, values in points]) for name in names}
    return LadderCurve(printable(label), {"step": places[:, 0], "samples": places[:, 1], **columns}, is_best)

"""A run as a report shows it: what happened in numbers and words, read from its files."""

from __future__ import annotations

import calendar
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lte_ray.config import LTEConfig
from lte_ray.errors import LTEError, StorageError
from lte_ray.redaction import printable
from lte_ray.report.clock import RunClock
from lte_ray.report.columns import RunRows, read_columns
from lte_ray.report.heads import make_timeline, total_utilisation, utilisation
from lte_ray.report.thinning import Numbers, mean
from lte_ray.run.display import format_bytes, format_duration
from lte_ray.run.environment import ENVIRONMENT
from lte_ray.run.error_log import ERRORS
from lte_ray.run.inspect import RunStatus, inspect_run
from lte_ray.run.newest_rows import to_number
from lte_ray.run.run_toml import read
from lte_ray.run.sinks.figures import MAX_HEADS, describe_event
from lte_ray.storage import RunDirectory

MAX_EVENTS = 300
"""Events that a report shows of a run: the first and the last half of them."""

MAX_ERRORS = 2**16
"""Bytes of ``errors.log`` that a report shows: its end."""

AXES = {"samples": "samples", "step": "local steps", "seconds": "time", "bytes": "bytes sent"}
"""What curves can be drawn against, and how it is called."""


@dataclass
class RunData:
    """A run.

    Attributes:
        name: as the report calls it.
        place: its path or URI.
        facts: of the overview, by title.
        merges, evaluations: columns by the name of the figure; `AXES` are among them.
        timeline: as `make_timeline` gives it.
        events: time of the run, time of day and text of each.
        events_left_out: the number of those that aren't shown.
        errors: the end of ``errors.log``.
        settings, environment: by name, as text.
        missing: what can't be read, one sentence each.
    """

    name: str
    place: str
    facts: dict[str, str] = field(default_factory=dict)
    merges: dict[str, Numbers] = field(default_factory=dict)
    evaluations: dict[str, Numbers] = field(default_factory=dict)
    timeline: dict[str, Any] | None = None
    events: list[tuple[str, str, str]] = field(default_factory=list)
    events_left_out: int = 0
    errors: str = ""
    settings: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def read_run(directory: RunDirectory) -> RunData:
    """Reads all that a report shows of a run. What can't be read is missing in words.

    Raises:
        StorageError: there is no run, or storage fails.
    """
    status = inspect_run(directory)
    data = RunData(printable(status.progress.run or directory.path.rpartition("/")[2]), printable(directory.display))
    content = _read_settings(directory)
    data.settings = {name: value for name, value in _flatten(content) if name != "name"}
    starts, newest = _read_starts(directory)
    data.environment = dict(_flatten({name: value for name, value in newest.items() if name != "config"}))
    rows = read_columns(directory, _num_heads(content))
    data.missing = [printable(text) for text in status.missing if not _is_about_rows(text)] + list(rows.missing)
    clock = RunClock.make(starts, _all_times(rows))
    _add_curves(data, rows, clock)
    _add_events(data, rows, clock)
    data.errors = _read_errors(directory)
    data.facts = dict(_facts(data, status, rows, clock, content))
    if status.state == "running":
        data.missing.append("The run goes on: this shows it as it was when the report was made.")
    return data


# -- files ------------------------------------------------------------------------------------------------------------------


def _is_about_rows(text: str) -> bool:
    """Whether `inspect_run` says this of the newest rows; this module says it of all."""
    return "of the newest lines" in text or "newest rows" in text or "are of an older release" in text


def _read_settings(directory: RunDirectory) -> dict[str, Any]:
    try:
        return read(directory).content
    except StorageError:
        return {}  # inspect_run has said so


def _num_heads(content: Mapping[str, Any]) -> int:
    number = to_number(content.get("num_heads"))
    return LTEConfig().num_heads if number is None else int(number)


def _read_starts(directory: RunDirectory) -> tuple[list[float], dict[str, Any]]:
    """The Unix times of the run's starts, and what the environment has of the newest; inspect_run says what is wrong."""
    try:
        starts = [each for each in json.loads(directory.read(ENVIRONMENT))["starts"] if isinstance(each, dict)]
    except (LTEError, ValueError, KeyError, TypeError, RecursionError):
        return [], {}
    times = []
    for start in starts:
        try:
            times.append(float(calendar.timegm(time.strptime(str(start.get("at")), "%Y-%m-%dT%H:%M:%SZ"))))
        except (ValueError, OverflowError):
            continue
    return times, starts[-1] if starts else {}


def _read_errors(directory: RunDirectory) -> str:
    size = directory.size(ERRORS)
    if not size:
        return ""
    text = directory.read_range(ERRORS, max(0, size - MAX_ERRORS), MAX_ERRORS).decode(errors="replace")
    return "".join(each for each in text if each.isprintable() or each in "\n\t")


def _flatten(values: Mapping[str, Any], prefix: str = "", depth: int = 4) -> Iterator[tuple[str, str]]:
    """The values as text by their name, those in tables as TABLE.NAME."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value and depth:
            yield from _flatten(value, f"{prefix}{name}.", depth - 1)
        elif isinstance(value, list):
            yield printable(f"{prefix}{name}"), printable(" ".join(map(str, value)))
        else:
            yield printable(f"{prefix}{name}"), printable(str(value).lower() if isinstance(value, bool) else str(value))


def _all_times(rows: RunRows) -> Numbers:
    events = [number for row in rows.events if (number := to_number(row.get("at"))) is not None]
    return np.concatenate([rows.merges["at"], rows.evaluations["at"], np.array(events)])


# -- curves -----------------------------------------------------------------------------------------------------------------


def _add_curves(data: RunData, rows: RunRows, clock: RunClock) -> None:
    merges = rows.merges
    if not len(merges["at"]):
        return
    seconds, starts = clock.seconds(merges["at"]), clock.start_of(merges["at"])
    sent = _total(merges, "traffic/bytes_up") + _total(merges, "traffic/bytes_down")
    axes = {
        "samples": np.cumsum(np.nan_to_num(merges["samples"])),
        "step": np.maximum.accumulate(np.nan_to_num(merges["step"])),
        "seconds": np.maximum.accumulate(np.nan_to_num(seconds)),
        "bytes": sent,
    }
    figures = {name: column for name, column in merges.items() if name not in ("at", "version", "step", "samples")}
    data.merges = {**axes, **figures, "traffic/sent": sent}
    for way in ("dense", "ddp", "diloco"):
        if f"traffic/instead/{way}" in merges:
            data.merges[f"traffic/sent/{way}"] = _total(merges, f"traffic/instead/{way}")
    share = utilisation(rows, seconds, starts)
    if np.isfinite(share).any():
        data.merges |= _by_head("heads/utilisation", rows, share)
    evaluations = rows.evaluations
    places = np.searchsorted(merges["version"], evaluations["version"], side="right") - 1  # the merge that led to the version
    at_merge = {name: np.where(places >= 0, column[np.maximum(places, 0)], 0.0) for name, column in axes.items()}
    figures = {name: column for name, column in evaluations.items() if name.startswith("eval/")}
    data.evaluations = {**at_merge, **figures}
    data.timeline = make_timeline(rows, clock, seconds, starts, merges.get("merge/seconds"))


def _total(columns: Mapping[str, Numbers], name: str) -> Numbers:
    return np.cumsum(np.nan_to_num(columns[name])) if name in columns else np.zeros(len(columns["at"]))


def _by_head(name: str, rows: RunRows, values: Numbers) -> dict[str, Numbers]:
    """A value of each contribution as columns: the mean over the heads of each merge, and for few heads each head's own."""
    count, index = len(rows.merges["at"]), rows.contributions[:, 0].astype(np.int64)
    known = np.isfinite(values)
    sums = np.bincount(index[known], values[known], count)
    numbers = np.bincount(index[known], minlength=count)
    with np.errstate(invalid="ignore", divide="ignore"):
        columns = {name: np.where(numbers > 0, sums / numbers, np.nan)}
    heads = np.unique(rows.contributions[:, 1]).astype(int)
    for head in heads if len(heads) <= MAX_HEADS else ():
        mine = known & (rows.contributions[:, 1] == head)
        column = np.full(count, np.nan)
        column[index[mine]] = values[mine]
        columns[f"{name}/head_{head}"] = column
    return columns


# -- words ------------------------------------------------------------------------------------------------------------------


def _add_events(data: RunData, rows: RunRows, clock: RunClock) -> None:
    events = rows.events
    if len(events) > MAX_EVENTS:
        data.events_left_out = len(events) - MAX_EVENTS
        events = events[: MAX_EVENTS // 2] + events[-MAX_EVENTS // 2 :]
    for row in events:
        at = to_number(row.get("at"))
        known = at is not None and 0 <= at < 2**37
        passed = format_duration(clock.seconds(np.array([at]))[0]) if known else ""
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at)) if known else "at an unknown time"
        data.events.append((passed, when, printable(describe_event(row))[:1000]))


def _facts(
    data: RunData, status: RunStatus, rows: RunRows, clock: RunClock, content: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """The lines of the overview."""
    yield "State", f"{status.state}{f': {printable(status.why)}' if status.why else ''}"
    yield "Worker", printable(status.program) or "unknown"
    yield "Heads", "ordinary training" if status.progress.baseline else printable(str(content.get("num_heads", "unknown")))
    yield "Local steps", f"{status.progress.step:,} of {status.progress.steps:,}"
    yield "Time", format_duration(clock.end) + (f" in {len(clock.starts)} starts" if len(clock.starts) > 1 else "")
    yield from _evaluation_facts(data.evaluations)
    if data.merges:
        yield from _merge_facts(data.merges)
        used = total_utilisation(rows, data.merges["seconds"], clock.start_of(rows.merges["at"]))
        if math.isfinite(used):
            yield "Utilisation", f"{used:.1%}"
    losses = sum(row.get("event") in ("head_lost", "coordinator_lost", "evaluator_lost") for row in rows.events)
    yield "Events", f"{len(rows.events):,}" + (f", {losses:,} of them deaths" if losses else "")
    if rows.rewound:
        yield "Merges made again", f"{rows.rewound:,}"
    if status.progress.checkpoint is not None:
        yield "Newest checkpoint", f"version {status.progress.checkpoint:,}"


def _evaluation_facts(evaluations: Mapping[str, Numbers]) -> Iterator[tuple[str, str]]:
    for name, column in evaluations.items():
        if name.startswith("eval/") and np.isfinite(column).any():
            low, high = np.nanmin(column), np.nanmax(column)
            yield f"Evaluation: {name[5:].replace('_', ' ')}", f"{_number(_last(column))} ({_number(low)} to {_number(high)})"


def _merge_facts(merges: Mapping[str, Numbers]) -> Iterator[tuple[str, str]]:
    yield "Samples", f"{merges['samples'][-1]:,.0f}"
    yield "Merges", f"{len(merges['samples']):,}"
    if "train/loss" in merges:
        yield "Last training loss", _number(_last(merges["train/loss"]))
    if "speed/samples_per_second" in merges:
        yield "Samples per second", _rate(mean(merges["speed/samples_per_second"]))
    for name, title in {"traffic/sent": "Bytes sent", "traffic/sent/ddp": "DDP would have sent"}.items():
        if name in merges and merges[name][-1]:
            yield title, format_bytes(merges[name][-1])
    if "merge/lag" in merges:
        yield "Mean staleness", f"{mean(merges['merge/lag']):.2f} merges"
    for name, title in {"memory/process": "Peak memory of a head", "memory/gpu": "Peak GPU memory of a head"}.items():
        peaks = [np.nanmax(c) for n, c in merges.items() if (n == name or n.startswith(f"{name}/")) and np.isfinite(c).any()]
        if peaks:
            yield title, format_bytes(max(peaks))


def _last(column: Numbers) -> float:
    known = column[np.isfinite(column)]
    return float(known[-1]) if len(known) else math.nan


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else _number(value)


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "none"

"""How figures are called in sinks: ``train/loss``, ``eval/accuracy``, as TensorBoard and Weights & Biases group them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lte_ray.run.sinks.protocol import LogRow

MAX_HEADS = 16
"""Heads whose figures are logged one by one. If there are more, the lowest and the highest are logged instead."""

NAMES: Mapping[str, str] = {
    "train_loss": "train/loss",
    "figures": "train",
    "samples_per_second": "speed/samples_per_second",
    "tokens_per_second": "speed/tokens_per_second",
    "mfu": "speed/mfu",
    "gpu_memory": "memory/gpu",
    "memory": "memory/process",
    "steps": "merge/steps",
    "merge_seconds": "merge/seconds",
    "base_error": "merge/base_error",
    "lag": "merge/lag",
    "head_steps": "merge/head_steps",
    "weight": "merge/weight",
    "change_norm": "merge/change_norm",
    "change_alignment": "merge/change_alignment",
    "effective_rank": "merge/effective_rank",
    "outer_step": "merge/outer_step",
    "stall_seconds": "merge/stall_seconds",
    "bytes_up": "traffic/bytes_up",
    "bytes_down": "traffic/bytes_down",
    "bytes_instead": "traffic/instead",
}
"""Names of a merge row's fields. Those that aren't here are called ``train/FIELD``."""

NOT_FIGURES = {"kind", "at", "version", "step", "samples", "heads", "held"}
"""Fields that say where the row belongs, and those of the audit."""


def name_figures(row: Mapping[str, Any]) -> dict[str, float]:
    """Returns the finite numbers of a merge or an evaluation by their names in sinks.

    A field may be a number, a table of numbers by head, or a table of either by name, so that new fields need no code here. A
    figure of the worker's that is called like one of the run's is left out.
    """
    figures: dict[str, float] = {}
    for field, value in sorted(row.items(), key=lambda item: item[0] == "figures"):
        if field not in NOT_FIGURES:
            if row["kind"] == "evaluation":
                prefix = "eval" if field == "values" else f"eval/{field}"
            else:
                prefix = NAMES.get(field, f"train/{field}")
            for name, figure in _flatten(prefix, value):
                figures.setdefault(name, figure)
    return figures


def _flatten(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping) and value and all(str(key).isdigit() for key in value):
        yield from _flatten_heads(name, value)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flatten(f"{name}/{key}", inner)
    elif _is_figure(value):
        yield name, float(value)


def _flatten_heads(name: str, by_head: Mapping[Any, Any]) -> Iterator[tuple[str, float]]:
    """Yields the mean over the heads under `name`, and their own values below it."""
    tables = {head: value for head, value in by_head.items() if isinstance(value, Mapping)}
    for key in dict.fromkeys(key for table in tables.values() for key in table):
        yield from _flatten(f"{name}/{key}", {head: table[key] for head, table in tables.items() if key in table})
    numbers = {head: float(value) for head, value in by_head.items() if _is_figure(value)}
    if numbers:
        yield name, sum(numbers.values()) / len(numbers)
    if len(numbers) <= MAX_HEADS:
        yield from ((f"{name}/head_{head}", value) for head, value in numbers.items())
    else:
        yield f"{name}/min", min(numbers.values())
        yield f"{name}/max", max(numbers.values())


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def describe_event(row: Mapping[str, Any]) -> str:
    """An event in words: its name, then its values."""
    values = [f"{name}={value}" for name, value in row.items() if name not in ("kind", "at", "event")]
    return " ".join([str(row.get("event", "")), *values])


class RowNaming:
    """Turns rows of ``metrics.jsonl``, in their order, into those of sinks.

    Args:
        earlier: rows of the versions that the run starts from, for the sum of samples.
    """

    def __init__(self, earlier: Iterable[Mapping[str, Any]] = ()) -> None:
        self._positions = {0: (0, 0)}  # by version: step, and samples in all
        self._newest = 0
        for row in earlier:
            if row.get("kind") == "merge":
                self._advance(row)

    @property
    def step(self) -> int:
        """The step of the newest version."""
        return self._positions[self._newest][0]

    def name(self, row: Mapping[str, Any]) -> Iterator[LogRow]:
        """Yields a row as sinks get it, after a "rewind" if its version was merged before."""
        if row["kind"] == "merge":
            if row["version"] <= self._newest:
                yield self._rewind(row["version"] - 1, row["at"])
            self._advance(row)
        version = row["version"] if row["kind"] != "event" else self._newest
        step, samples = self._positions.get(version, self._positions[self._newest])
        if row["kind"] == "event":
            yield LogRow("event", step, samples, version, row["at"], {}, describe_event(row), row)
            return
        figures = name_figures(row) | {"progress/samples": float(samples), "progress/version": float(version)}
        yield LogRow(row["kind"], row["step"], samples, version, row["at"], figures, "", row)

    def _advance(self, row: Mapping[str, Any]) -> None:
        _, samples = self._positions[self._newest]
        self._newest = row["version"]
        self._positions[self._newest] = row["step"], samples + row["samples"]

    def _rewind(self, version: int, at: float) -> LogRow:
        self._positions = {known: position for known, position in self._positions.items() if known <= version}
        self._newest = max(self._positions)
        step, samples = self._positions[self._newest]
        return LogRow("rewind", step, samples, version, at)

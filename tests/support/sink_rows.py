"""Rows for sinks, as a run gives them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lte_ray.run.sinks import LogRow, RunInfo
from lte_ray.run.sinks.figures import RowNaming


def merge_row(version: int, loss: float = 1.0, **more: Any) -> dict[str, Any]:
    """A merge of two heads after ten steps and 100 samples."""
    place = {"kind": "merge", "at": 1000.0 + version, "version": version, "step": 10 * version, "samples": 100, "heads": [0, 1]}
    return {**place, "train_loss": {"0": loss, "1": loss}, **more}


def evaluation_row(version: int, accuracy: float) -> dict[str, Any]:
    """The evaluation of a version."""
    place = {"kind": "evaluation", "at": 1000.5 + version, "version": version, "step": 10 * version}
    return {**place, "values": {"accuracy": accuracy}}


def event_row(name: str, **values: Any) -> dict[str, Any]:
    """An event."""
    return {"kind": "event", "at": 1002.0, "event": name, **values}


def named(*rows: dict[str, Any], earlier: tuple[dict[str, Any], ...] = ()) -> Iterator[LogRow]:
    """The rows as sinks get them, after those of an earlier start."""
    naming = RowNaming(earlier)
    for row in rows:
        yield from naming.name(row)


def run_info(folder: Path, **more: Any) -> RunInfo:
    """A run, with settings of each kind."""
    folder.mkdir(exist_ok=True)
    config = {"name": "r", "steps": 7, "lora_r": [4, 8], "worker": {"width": 3}}
    environment = {"host": "h", "versions": {"torch": "2"}, "command": ["lte-ray", "train"]}
    return RunInfo("r", "ab12cd34", str(folder.parent), folder, **{"config": config, "environment": environment, **more})

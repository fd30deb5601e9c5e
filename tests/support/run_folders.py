"""Folders as runs leave them, made by hand: settings, an environment, rows, checkpoints, a model."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lte_ray.run.environment import ENVIRONMENT
from lte_ray.run.metrics_files import METRICS
from lte_ray.storage import LOCK, MODEL, RUN, RunDirectory, exclusive_lock

SETTINGS: Mapping[str, Any] = {"program": "workers.regression:Regression", "name": "r", "num_heads": 2, "steps": 100}


def make_run(folder: Path, *rows: Mapping[str, Any], started: float | None = None, **settings: Any) -> RunDirectory:
    """A run with these rows of ``metrics.jsonl`` and these settings in addition to `SETTINGS`.

    Args:
        started: when it was started (Unix time); None: a second before the first row, or now.
    """
    folder.mkdir(parents=True)
    values = {**SETTINGS, "name": folder.name, **settings}
    (folder / RUN).write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()))
    add_rows(folder, *rows)
    write_start(folder, started if started is not None else rows[0]["at"] - 1 if rows else time.time())
    return RunDirectory.open(str(folder.parent), folder.name, patience=0.0)


def add_rows(folder: Path, *rows: Mapping[str, Any]) -> None:
    """Adds rows, if there are any."""
    if rows:
        with (folder / METRICS).open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def write_start(folder: Path, at: float, **facts: Any) -> None:
    """Writes an environment with a start at this Unix time."""
    start = {"at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at)), "devices": {"0": "cpu", "1": "cuda:0"}, **facts}
    (folder / ENVIRONMENT).write_text(json.dumps({"id": "ab12", "starts": [start]}))


def merge_row(version: int, at: float, heads: tuple[int, ...] = (0, 1), steps: int = 10, **more: Any) -> dict[str, Any]:
    """A merge after `steps` more local steps of each of these heads, of 8 samples each."""
    held = {
        str(head): {
            "incarnation": 0,
            "sequence": version,
            "step": steps * version,
            "samples": 8 * steps * version,
            "batches": 1,
        }
        for head in heads
    }
    return {
        "kind": "merge", "at": at, "version": version, "step": steps * version, "steps": steps * len(heads),
        "samples": 8 * steps * len(heads), "heads": list(heads), "train_loss": {str(h): 1.0 / version + h for h in heads},
        "held": held, **more,
    }  # fmt: skip


def evaluation_row(version: int, at: float, **values: float) -> dict[str, Any]:
    """An evaluation of a version."""
    return {
        "kind": "evaluation",
        "at": at,
        "version": version,
        "step": 10 * version,
        "values": values or {"loss": 1.0 / version},
    }


def event_row(name: str, at: float, **values: Any) -> dict[str, Any]:
    """An event."""
    return {"kind": "event", "at": at, "event": name, **values}


def add_checkpoint(folder: Path, version: int) -> None:
    """A checkpoint that is complete, as far as its names say."""
    place = folder / "checkpoints" / f"{version:06d}"
    place.mkdir(parents=True)
    (place / "manifest.json").write_text("{}")


def add_model(folder: Path) -> None:
    """The exported weights."""
    (folder / MODEL).write_bytes(b"")


@contextlib.contextmanager
def driver(directory: RunDirectory) -> Iterator[None]:
    """A driver that trains the run during the block: this process."""
    with exclusive_lock(directory):
        yield


def leave_lock(folder: Path, text: str) -> None:
    """The lock that a driver leaves which was killed; the text names it."""
    (folder / LOCK).write_text(text)
    os.utime(folder / LOCK)

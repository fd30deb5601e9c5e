"""Observes a run for the soak: all rows of ``metrics.jsonl``, including those that are removed later, and memory."""

from __future__ import annotations

import contextlib
import json
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.soak_processes import Driver, actors, below

EVERY = 5.0
"""Seconds between two samples of memory."""

RESOURCE = 1e4
"""Ray counts resources in units of 1/10,000."""


@dataclass
class Memory:
    """One sample: Unix time, the coordinator's process and its bytes, the bytes in Ray's object store, and placement groups."""

    at: float
    pid: int
    coordinator: int
    store: int | None
    groups: int | None


@dataclass
class Watch:
    """Observes one run through all its drivers.

    Args:
        driver: the run's driver.
    """

    driver: Driver
    rows: dict[tuple[Any, ...], dict[str, Any]] = field(default_factory=dict)
    memory: list[Memory] = field(default_factory=list)
    _read: int = 0
    _due: float = 0.0

    def look(self) -> None:
        """Reads new rows, and samples memory when due. To be called several times per second."""
        with contextlib.suppress(OSError):
            self._follow()
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + EVERY
            for process in actors("CoordinatorActor")[:1]:
                store, groups = _read_debug_state(raylet_logs())
                self.memory.append(Memory(time.time(), process.pid, process.rss, store, groups))

    def _follow(self) -> None:
        size = self.driver.metrics.stat().st_size
        if size < self._read:  # the run was rewound, and the file rewritten
            self._read = 0
        with self.driver.metrics.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        whole = text.rfind(b"\n") + 1
        self._read += whole
        for line in text[:whole].splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                self.rows[row.get("kind"), row.get("at"), row.get("version"), row.get("event")] = row

    @property
    def merges(self) -> list[dict[str, Any]]:
        """All merges, including those that were undone, by time."""
        return sorted((row for row in self.rows.values() if row["kind"] == "merge"), key=lambda row: row["at"])

    @property
    def events(self) -> list[dict[str, Any]]:
        """All events, by time."""
        return sorted((row for row in self.rows.values() if row["kind"] == "event"), key=lambda row: row["at"])


def raylet_logs() -> Path | None:
    """The log folder of the Ray that this process's descendants run."""
    import os

    for process in below(os.getpid()):
        match = re.search(r"/[^ =]*/session_\d[\w-]*", process.line) if "raylet" in process.line.split(" ")[0] else None
        if match:
            return Path(match.group()) / "logs"
    return None


def _read_debug_state(logs: Path | None) -> tuple[int | None, int | None]:
    """Bytes in the object store and the number of placement groups, from the raylet's debug file, a few seconds old."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        text = (logs / "debug_state.txt").read_text()  # type: ignore[operator]
        total, available = re.search(r'"total":\{(.*?)\}, "available": \{(.*?)\}', text).groups()  # type: ignore[union-attr]
        of = [int(re.search(r"object_store_memory: \[(\d+)\]", each).group(1)) for each in (total, available)]  # type: ignore[union-attr]
        return round((of[0] - of[1]) / RESOURCE), len(set(re.findall(r"bundle_group_([0-9a-f]{20,})", total)))
    return None, None

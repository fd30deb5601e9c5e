"""Lets a script kill or stop a process at a named point of the protocol: how tests inject faults.

A script is a folder of JSON files, one fault each:

- `point`: the name that `inject` is called with;
- other keys, which the call must match: `head` exactly; `step`, `version` and others must be at least the number given;
- `signal`: what the process sends itself, e.g. SIGKILL.

A file is used once. It is renamed before the signal, so that the process's successor doesn't find it again.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path

VARIABLE = "LTE_RAY_FAULTS"
"""The driver's environment variable that names the script's folder."""

_script: list[Path | None] = [None]


def arm(folder: str | None) -> None:
    """Uses the script in `folder` in this process; None: no script."""
    _script[0] = Path(folder) if folder else None


def inject(point: str, **where: int) -> None:
    """Called when the process reaches a point of the protocol: sends itself the script's signal, if it has a fault for it.

    Does nothing without a script.
    """
    if _script[0] is not None:
        _run_faults(_script[0], point, where)


def _run_faults(folder: Path, point: str, where: dict[str, int]) -> None:
    for path in sorted(folder.glob("*.json")):
        try:
            fault = json.loads(path.read_text())
        except (OSError, ValueError):
            continue  # another process has used it
        conditions = {name: value for name, value in fault.items() if name not in ("point", "signal")}
        same_head = all(where.get("head") == value for name, value in conditions.items() if name == "head")
        reached = all(name in where and where[name] >= value for name, value in conditions.items() if name != "head")
        if fault["point"] != point or not same_head or not reached:
            continue
        with contextlib.suppress(OSError):
            path.rename(path.with_suffix(".done"))
            os.kill(os.getpid(), getattr(signal, fault["signal"]))

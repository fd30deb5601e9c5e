"""Points of the protocol at which a process can be made to die or stop, by a script: how faults are tested.

Without a script `reached` does nothing. A script is a folder of files, one a fault: JSON with the `point`, what it must be
reached with (`head`, and `step`, `version`, ... that are at least the number given), and the `signal` that the process sends
itself. A file is used once: it is renamed first, so that whoever takes the process's place doesn't meet it again.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path

VARIABLE = "LTE_RAY_FAULTS"
"""Environment variable of the driver that names the script's folder."""

_script: list[Path | None] = [None]


def arm(folder: str | None) -> None:
    """Uses the script in `folder` in this process."""
    _script[0] = Path(folder) if folder else None


def inject(point: str, **where: int) -> None:
    """The process is at this point of the protocol."""
    if _script[0] is not None:
        _meet(_script[0], point, where)


def _meet(folder: Path, point: str, where: dict[str, int]) -> None:
    for path in sorted(folder.glob("*.json")):
        try:
            fault = json.loads(path.read_text())
        except (OSError, ValueError):
            continue  # another process has taken it
        wanted = {name: value for name, value in fault.items() if name not in ("point", "signal")}
        exact = all(where.get("head") == value for name, value in wanted.items() if name == "head")
        others = all(name in where and where[name] >= value for name, value in wanted.items() if name != "head")
        if fault["point"] != point or not exact or not others:
            continue
        with contextlib.suppress(OSError):
            path.rename(path.with_suffix(".done"))
            os.kill(os.getpid(), getattr(signal, fault["signal"]))

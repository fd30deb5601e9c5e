"""What ``runs``, ``status``, ``watch``, ``logs`` and ``stop`` share: how they open a run, and how they show its state."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lte_ray.cli.run_argument import locate_run
from lte_ray.redaction import printable

if TYPE_CHECKING:
    from lte_ray.run.inspect import RunStatus
    from lte_ray.storage import RunDirectory

TIME = "%Y-%m-%d %H:%M:%S"

LOCAL_INTERVAL, REMOTE_INTERVAL = 1.0, 10.0
"""Seconds between two looks at a run's files: on a local disk, and elsewhere, where a run writes less often."""

sleep = time.sleep


def locate_directory(run: str, storage: str | None) -> RunDirectory:
    """The directory of a run, which may not exist.

    Raises:
        ConfigError, StorageError: as `locate_run`, and for storage that can't be opened.
    """
    from lte_ray.run.inspect import PATIENCE
    from lte_ray.storage import RunDirectory

    place, name = locate_run(run, storage)
    return RunDirectory.open(place, name, patience=PATIENCE)


def wait_for_more(directory: RunDirectory) -> None:
    """Waits until it is time to look at the run's files again."""
    sleep(LOCAL_INTERVAL if directory.is_local else REMOTE_INTERVAL)


def describe_state(status: RunStatus) -> str:
    """The state in one line, without what can be done about it."""
    driver = f", process {status.driver.name}" if status.driver.name else ""
    ago = "" if status.since is None else f"last sign of life {format_ago(time.time() - status.since)} ago"
    match status.state:
        case "running":
            return "running" + driver + (f", {ago}" if ago else "")
        case "finished":
            return "finished"
        case "stopped":
            return f"stopped before its last step: {printable(status.why)}"
        case "ended-early":
            return f"ended early: {printable(status.why)}"
        case _:
            since = "" if status.since is None else f" since {time.strftime(TIME, time.localtime(status.since))}"
            return f"no sign of life{since}: {status.why}"


def describe_rest(status: RunStatus) -> str:
    """What is kept of a run that isn't running, and how it continues."""
    checkpoint, where = status.progress.checkpoint, printable(status.directory.display)
    model = "The merged weights are exported. " if status.has_model else ""
    if status.is_resumable:
        return f"{model}Continue it from checkpoint {checkpoint}: lte-ray resume {where}"
    if status.state == "finished":
        return model.strip()
    return f"{model}It has no complete checkpoint." if checkpoint is None else model.strip()


def format_event(row: Mapping[str, Any]) -> str:
    """An event in one line: when, what, its values, and why."""
    at = row.get("at")
    when = time.strftime(TIME, time.localtime(at)) if isinstance(at, int | float) and 0 <= at < 2**40 else "at an unknown time"
    values = [f"{name} {_format_value(value)}" for name, value in row.items() if name not in ("kind", "at", "event", "why")]
    why = row.get("why")
    text = "  ".join([str(row.get("event")), *values])
    return printable(f"{when}  {text}: {why}" if why else f"{when}  {text}")


def _format_value(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, Mapping):
        return f"of {' '.join(map(str, value))}" if value else "none"
    return str(value)


def format_ago(seconds: float) -> str:
    """``12 s``, ``2:03`` or ``1:02:03``."""
    from lte_ray.run.display import format_duration

    return f"{max(0.0, seconds):.0f} s" if seconds < 60 else format_duration(seconds)

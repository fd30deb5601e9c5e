"""Whether a run's directory still belongs to the run that writes there: checked before each write where there is a lease.

The driver asks the lease that it holds. Its heads and its coordinator read who has it, now and then.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from lte_ray.errors import StorageError
from lte_ray.redaction import printable

LEASE = ".lease"

MAX_BYTES = 4096

CHECK_INTERVAL = 10.0
"""Seconds for which a process believes what it has read."""


class Readable(Protocol):
    """A run directory."""

    @property
    def display(self) -> str: ...

    def exists(self, relative: str = "") -> bool: ...

    def read(self, relative: str, limit: int | None = None) -> bytes: ...


_lock = threading.Lock()
_held: dict[str, Callable[[bool], None]] = {}
_checked: dict[str, float] = {}


def hold(owner: str, check: Callable[[bool], None]) -> None:
    """Has `check` called before each write of this process into a directory of this owner. It is told whether it may wait."""
    with _lock:
        _held[owner] = check


def release(owner: str) -> None:
    """Ends `hold`."""
    with _lock:
        _held.pop(owner, None)


def check_owner(directory: Readable, owner: str) -> None:
    """Checks whether the directory is this owner's.

    Raises:
        LeaseLost: in the driver; it isn't.
        StorageError: in another process; it isn't, or storage fails.
    """
    check = _held.get(owner)
    if check is not None:
        check(True)
        return
    now = time.monotonic()
    if now - _checked.get(owner, -CHECK_INTERVAL) < CHECK_INTERVAL:
        return
    content = read_lease(directory)
    if content.get("owner") != owner or content.get("released"):
        raise StorageError(
            f"{directory.display} isn't written any more: {describe_taker(content)}. The driver of this process has lost it."
        )
    with _lock:
        _checked[owner] = now


def check_held(owner: str) -> None:
    """Raises LeaseLost if this process is a driver that has lost the lease, as far as it knows now. Never waits."""
    check = _held.get(owner)
    if check is not None:
        check(False)


def read_lease(directory: Readable) -> dict[str, Any]:
    """What the lease says; empty if there is none, or if it can't be understood."""
    if not directory.exists(LEASE):
        return {}
    return parse_lease(directory.read(LEASE, MAX_BYTES))


def parse_lease(data: bytes) -> dict[str, Any]:
    """The content of a lease; empty if it can't be understood."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def describe_taker(content: dict[str, Any]) -> str:
    """Who has a lease that isn't this process's any more."""
    if not content:
        return "its lease was removed"
    return f"{printable(str(content.get('process', 'another process')))[:100]} has its lease now"

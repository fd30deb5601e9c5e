"""The lease of a run on an object store: a small object that says which driver trains the run.

Its holder renews it every `RENEW_INTERVAL` seconds, each time with another number. A driver that wants the run watches it. If
it doesn't change for `LIFETIME` seconds (it states how many), its holder is gone, and the lease is taken over. Only the
watcher's own clock measures that, and no time of day counts, so clocks of machines may differ. All writes are conditional: of
two drivers that take it at once, one gets it.

A holder that couldn't renew for `SAFE` seconds renews before it writes anything else. If another has the lease, it stops.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from lte_ray.errors import LeaseLost, StorageError
from lte_ray.redaction import printable
from lte_ray.storage import ownership
from lte_ray.storage.conditional import ConditionalObject, Tag, Unsupported
from lte_ray.storage.ownership import LEASE, parse_lease, read_lease
from lte_ray.storage.retry import retry
from lte_ray.storage.run_directory import RunDirectory

RENEW_INTERVAL = 10.0
"""Seconds between two renewals."""

LIFETIME = 60.0
"""Seconds without a change after which others may take it."""

SAFE = 40.0
"""Seconds since the last renewal after which its holder asks before it writes."""

LOOK_INTERVAL = 2.0
"""Seconds between two looks at a lease that another has."""

UNLOCKED = "Nothing keeps a second driver from training the run in %s at the same time: %s. Start it only once."

MADE_UP = '"00000000000000000000000000000000"'
"""An ETag that no object has."""

_expired: dict[str, dict[str, Any]] = {}
"""Leases that this process has watched for their lifetime, by the path of the run."""

log = logging.getLogger("lte_ray.storage")
sleep: Callable[[float], None] = time.sleep


def clock() -> float:
    """Seconds, also those for which the machine slept where the system counts them."""
    number = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if number is None else time.clock_gettime(number)


class Lease:
    """A lease that this process holds.

    Args:
        directory: of the run.
        stored: the object.
        owner: a name that no other driver has.
        tag: of the object as this process has written it at `written_at` (of `clock`).
    """

    def __init__(self, directory: RunDirectory, stored: ConditionalObject, owner: str, tag: Tag, written_at: float) -> None:
        self._directory, self._stored, self._owner, self._tag = directory, stored, owner, tag
        self._renewed_at = written_at  # when the last renewal that worked began
        self._number = 1
        self._lost = ""
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def start(self) -> None:
        """Begins to renew it, in a thread."""
        ownership.hold(self._owner, self.check)
        self._thread.start()

    def check(self, may_wait: bool = True) -> None:
        """Makes sure that this process may write.

        Args:
            may_wait: whether to renew it first if that is due.

        Raises:
            LeaseLost: another has the lease.
            OSError: it should be renewed first, but that fails.
        """
        if may_wait and not self._lost and clock() - self._renewed_at > SAFE:
            try:
                self.renew()
            except Unsupported as error:  # credentials that have ended, say: storage fails, for now
                raise OSError(str(error)) from error
        if self._lost:
            raise LeaseLost(self._lost)

    def renew(self) -> None:
        """Writes it once more, unless it was lost. Raises OSError if storage fails."""
        with self._lock:
            if self._lost or self._ended.is_set():
                return
            began, tag = clock(), self._write()
            if tag is None:  # written by another, or by a try of this process whose answer was lost
                own = self._tag_if_own()
                if own is None:
                    return
                self._tag = own
                tag = self._write()
                if tag is None:
                    raise OSError("the lease was written by others in the meantime")
            self._tag, self._renewed_at = tag, began

    def _write(self) -> Tag | None:
        self._number += 1
        return self._stored.replace(serialize(self._owner, self._number), self._tag)

    def release(self) -> None:
        """Gives it back, so that the next driver doesn't have to wait, if storage allows."""
        self._ended.set()
        with self._lock, contextlib.suppress(OSError, Unsupported):
            if not self._lost:
                self._stored.replace(serialize(self._owner, self._number + 1, released=True), self._tag)
        ownership.release(self._owner)

    def _tag_if_own(self) -> Tag | None:
        """The tag of what is there now, if this process wrote it. Otherwise the lease is lost."""
        now = self._stored.read()
        content = {} if now is None else parse_lease(now[0])
        if now is not None and content.get("owner") == self._owner:
            return now[1]
        self._lost = (
            f"The run in {self._directory.display} was taken over: {ownership.describe_taker(content)}. This driver hadn't "
            f"renewed it for {LIFETIME:.0f} s. It has stopped and writes nothing more."
        )
        log.warning("%s", self._lost)
        return None

    def _keep(self) -> None:
        while not self._ended.wait(RENEW_INTERVAL) and not self._lost:
            try:
                self.renew()
            except (OSError, Unsupported) as error:
                log.debug("The lease of %s wasn't renewed: %s", self._directory.display, error)


def serialize(owner: str, number: int, *, released: bool = False) -> bytes:
    """The content of a lease."""
    process = f"process {os.getpid()} on {socket.gethostname()}"
    content = {"owner": owner, "process": process, "number": number, "seconds": LIFETIME, "released": released}
    return json.dumps(content).encode()


@contextlib.contextmanager
def hold_lease(directory: RunDirectory) -> Iterator[RunDirectory]:
    """Holds the run's lease for the block, or says that it can't be held there.

    Yields:
        The directory that the block must write through, since it knows its owner.

    Raises:
        StorageError: another driver holds it, or storage fails.
    """
    try:
        lease, owner = _acquire(directory)
    except Unsupported as error:
        wait_until_free(directory)
        log.warning(UNLOCKED, directory.display, error)
        yield directory
        return
    lease.start()
    try:
        yield dataclasses.replace(directory, owner=owner)
    finally:
        lease.release()


def wait_until_free(directory: RunDirectory) -> dict[str, Any]:
    """Waits until no driver holds the lease, at most for its lifetime. Returns what it says then; empty if there is none.

    Raises:
        StorageError: its holder has renewed it.
    """
    first, began = read_lease(directory), clock()
    if not first or first.get("released") or first == _expired.get(directory.path):
        return first
    seconds = _lifetime(first)
    log.warning(
        "The run in %s may still be trained by %s: waiting %.0f s for a sign of it.", directory.display, _holder(first), seconds
    )
    while clock() - began <= seconds:
        sleep(min(LOOK_INTERVAL, seconds))
        now = read_lease(directory)
        if not now or now.get("released"):
            return now
        if now != first:
            raise StorageError(
                f"The run in {directory.display} is being trained by {_holder(now)}. Wait until it ends, stop it, or give "
                "another --name."
            )
    _expired[directory.path] = first
    return first


def _holder(content: dict[str, Any]) -> str:
    return printable(str(content.get("process", "another process")))[:100]


def _lifetime(content: dict[str, Any]) -> float:
    """The seconds that a lease states, up to an hour."""
    seconds = content.get("seconds")
    return min(float(seconds), 3600.0) if isinstance(seconds, int | float) and seconds > 0 else LIFETIME


def _acquire(directory: RunDirectory) -> tuple[Lease, str]:
    """Raises StorageError or `Unsupported`."""
    stored, owner = ConditionalObject(directory, LEASE), secrets.token_hex(8)
    seen = wait_until_free(directory)

    data, began = serialize(owner, 1), clock()  # the first of several tries counts

    def take() -> Tag:
        now = stored.read()
        content = {} if now is None else parse_lease(now[0])
        if now is not None and content.get("owner") == owner:  # a try whose answer was lost
            return now[1]
        tag = None
        if now is None:
            tag = stored.create(data)
        elif content == seen or content.get("released"):
            tag = stored.replace(data, now[1])
        if tag is None:
            now = stored.read()
            content = {} if now is None else parse_lease(now[0])
            if now is not None and content.get("owner") == owner:
                return now[1]
            raise StorageError(
                f"The run in {directory.display} has just been taken by {_holder(content)}. Wait until it ends, stop it, or "
                "give another --name."
            )
        return tag

    path = directory.path_to(LEASE)
    tag = retry(take, f"writing {path}", f"{path} can't be written", directory.patience)
    tag = retry(lambda: _probe(stored, owner, tag), f"writing {path}", f"{path} can't be written", directory.patience)
    return Lease(directory, stored, owner, tag, began), owner


def _probe(stored: ConditionalObject, owner: str, tag: Tag) -> Tag:
    """Finds out whether the store heeds conditions: some servers of S3's protocol ignore them. Returns the tag.

    Raises:
        Unsupported: it doesn't.
    """
    data = serialize(owner, 1, released=True)  # once this is written, no driver waits
    ignored = stored.create(data) is not None
    if not ignored and stored.kind == "s3":
        ignored = stored.replace(data, {"e_tag": MADE_UP}) is not None
    if ignored:
        raise Unsupported("the store ignores the conditions of writes")
    return tag

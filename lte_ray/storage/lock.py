"""The lock of a run directory: one process at a time trains a run. On object stores it is a lease."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from lte_ray.errors import StorageError
from lte_ray.redaction import printable
from lte_ray.storage.lease import UNLOCKED, hold_lease, wait_until_free
from lte_ray.storage.ownership import read_lease
from lte_ray.storage.retry import describe_error
from lte_ray.storage.run_directory import RunDirectory

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"

log = logging.getLogger("lte_ray.storage")

LOOK = 0.05
"""Seconds after which locking is tried once more, since `find_driver` may look at the lock at that moment."""


@dataclass(frozen=True)
class Driver:
    """What is known of the process that trains a run.

    Attributes:
        alive: whether there is one; None if nothing tells, as of a lease that isn't released.
        name: its number and its host; empty if it isn't alive or unnamed.
    """

    alive: bool | None
    name: str = ""


@contextlib.contextmanager
def exclusive_lock(directory: RunDirectory) -> Iterator[RunDirectory]:
    """Holds the run's lock for the block. On a disk the system releases it when the process ends, however it ends.

    Where there is neither a lock nor a lease, a warning says so. There it is up to the user to submit a run only once.

    Yields:
        The directory that the block must write through.

    Raises:
        StorageError: another process holds it.
    """
    if not directory.is_local:
        with hold_lease(directory) as owned:
            yield owned
        return
    if fcntl is None:
        yield directory
        return
    path = Path(directory.path_to(LOCK))
    with _open_lock(directory, path) as file:
        try:
            _lock(file)
        except BlockingIOError:
            raise StorageError(_locked_message(directory, path)) from None
        except OSError as error:
            log.warning(UNLOCKED, directory.display, f"its disk has no locks ({describe_error(error)})")
            yield directory
            return
        if not _is_same_file(path, file):  # its holder has just removed it, and others may hold a new one
            with exclusive_lock(directory) as same:
                yield same
            return
        with contextlib.suppress(OSError):  # on a full disk the holder stays unnamed
            file.truncate(0)
            file.write(f"{os.getpid()} on {socket.gethostname()}")
            file.flush()
        try:
            yield directory
        finally:
            path.unlink(missing_ok=True)


def check_unlocked(directory: RunDirectory) -> None:
    """Raises StorageError if another process trains the run. Keeps no lock.

    A lease that may have lost its driver is watched for its lifetime.
    """
    if not directory.is_local:
        wait_until_free(directory)
    elif os.path.exists(directory.path_to(LOCK)):
        with exclusive_lock(directory):
            pass


def find_driver(directory: RunDirectory) -> Driver:
    """Finds out whether a process trains the run. Writes nothing, and keeps none from starting."""
    if not directory.is_local:
        lease = read_lease(directory)
        name = printable(str(lease.get("process", "")))[:300]
        return Driver(False) if lease.get("released") else Driver(None, name.removeprefix("process "))
    if fcntl is None:
        return Driver(None)
    try:
        with open(os.open(directory.path_to(LOCK), os.O_RDONLY | os.O_NOFOLLOW), encoding="utf-8", errors="replace") as file:
            name = printable(file.read(300).strip())
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return Driver(False)
    except BlockingIOError:
        return Driver(True, name)
    except OSError:  # a disk that can't lock, or no permission
        return Driver(None)
    # Another machine's lock may not be seen here: the folder may be a copy, or on a disk that each machine locks by itself.
    host = name.rpartition(" on ")[2]
    return Driver(False if not name or host == socket.gethostname() else None)


def _lock(file: TextIO) -> None:
    """Locks the file. Raises BlockingIOError if another process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(LOOK)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _open_lock(directory: RunDirectory, path: Path) -> TextIO:
    """Opens the file to lock. Never follows a link, since the file is written to."""
    try:
        if path.is_symlink():
            path.unlink()
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666), "a+", encoding="utf-8")
    except OSError as error:
        raise directory.unwritable(error) from error


def _is_same_file(path: Path, file: TextIO) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _locked_message(directory: RunDirectory, path: Path) -> str:
    holder = ""
    with contextlib.suppress(OSError):  # it may end just now
        holder = path.read_text(encoding="utf-8", errors="replace").strip()
    return (
        f"The run in {directory.display} is being trained by process {holder or 'of another program'}. Wait until it ends, "
        "stop it, or give another --name."
    )

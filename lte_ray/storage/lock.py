"""One process trains a run at a time."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from lte_ray.errors import StorageError
from lte_ray.storage.run_directory import RunDirectory

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


@contextlib.contextmanager
def exclusive_lock(directory: RunDirectory) -> Iterator[None]:
    """For the block nobody else on this disk trains the run; the lock ends with the process, however that dies.

    Object stores, and disks that can't lock, have none: there it is up to whoever submits the run.

    Raises:
        StorageError: another process trains it.
    """
    if fcntl is None or not directory.is_local:
        yield
        return
    path = Path(directory.path_to(LOCK))
    with _opened(directory, path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(_taken(directory, path)) from None
        except OSError:
            yield
            return
        if not _is_there(path, file):  # its holder has just removed it; others may hold a new one
            with exclusive_lock(directory):
                yield
            return
        with contextlib.suppress(OSError):  # a full disk: then nobody is told who it is
            file.truncate(0)
            file.write(f"{os.getpid()} on {socket.gethostname()}")
            file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _opened(directory: RunDirectory, path: Path) -> TextIO:
    """The file to lock, never one elsewhere that a link leads to: it is written to."""
    try:
        if path.is_symlink():
            path.unlink()
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666), "a+", encoding="utf-8")
    except OSError as error:
        raise directory.unwritable(error) from error


def _is_there(path: Path, file: TextIO) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def check_unlocked(directory: RunDirectory) -> None:
    """Raises StorageError if another process trains the run; takes nothing for longer than that."""
    if directory.is_local and os.path.exists(directory.path_to(LOCK)):
        with exclusive_lock(directory):
            pass


def _taken(directory: RunDirectory, path: Path) -> str:
    who = ""
    with contextlib.suppress(OSError):  # it may end just now
        who = path.read_text(encoding="utf-8", errors="replace").strip()
    return (
        f"The run in {directory.display} is being trained by process {who or 'of another program'}. Wait until it ends, stop "
        "it, or give another --name."
    )

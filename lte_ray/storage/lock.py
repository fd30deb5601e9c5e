"""One process trains a run at a time."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from lte_ray.errors import StorageError
from lte_ray.storage.directory import RunDirectory

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


@contextlib.contextmanager
def alone(directory: RunDirectory) -> Iterator[None]:
    """For the block nobody else on this disk trains the run; the lock ends with the process, however that dies.

    Object stores, and disks that can't lock, have none: there it is up to whoever submits the run.

    Raises:
        StorageError: another process trains it.
    """
    if fcntl is None or not directory.is_local:
        yield
        return
    path = Path(directory.at(LOCK))
    try:
        opened = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise directory.unwritable(error) from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(_taken(directory, path)) from None
        except OSError:
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


def check_alone(directory: RunDirectory) -> None:
    """Raises StorageError if another process trains the run; takes nothing for longer than that."""
    if directory.is_local and os.path.exists(directory.at(LOCK)):
        with alone(directory):
            pass


def _taken(directory: RunDirectory, path: Path) -> str:
    who = path.read_text(encoding="utf-8", errors="replace").strip()
    return (
        f"The run in {directory.display} is being trained by process {who or 'of another program'}. Wait until it ends, stop "
        "it, or give another --name."
    )

"""``errors.log`` in the run's folder: the whole tracebacks of what went wrong while the run went on."""

from __future__ import annotations

import dataclasses
import os
import re
import sysconfig
import threading
import time
from concurrent.futures import wait

import lte_ray
from lte_ray.errors import LTEError, StorageError, WorkerFailed
from lte_ray.redaction import redact
from lte_ray.storage import RunDirectory, run_in_thread

ERRORS = "errors.log"

MAX_WRITE_WAIT = 0.5
"""Seconds that the run waits for an error to be written before it continues."""

_FRAME = re.compile(r'^  File "([^"]*)", line \d+.*\n(?:    .*\n?)*', re.MULTILINE)


class ErrorLog:
    """Adds errors to the file. Another thread writes, so a storage that hangs doesn't hang the run."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = dataclasses.replace(directory, patience=0.0)
        self._lock = threading.Lock()

    def record(self, error: LTEError, process: str) -> str:
        """Adds an error.

        Args:
            error: what was raised.
            process: which process it ended, for people.

        Returns:
            The file's path; empty if it couldn't be written in time.
        """
        text = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {process}: {summarize(error)}\n\n{_details(error)}\n\n"
        writing = run_in_thread(lambda: self._append(redact(text).encode()))
        if wait([writing], MAX_WRITE_WAIT).not_done or not writing.result():
            return ""
        return f"{self._directory.display}/{ERRORS}"

    def _append(self, data: bytes) -> bool:
        try:
            with self._lock:
                self._directory.append(ERRORS, data)
        except (StorageError, OSError):
            return False
        return True


def summarize(error: LTEError) -> str:
    """Returns what happened and why, in one line."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"{first} {reason(error.traceback)}".strip() if isinstance(error, WorkerFailed) else first


def reason(traceback: str) -> str:
    """Returns the line of a formatted traceback that has the exception. Its message may have more lines, which are left out."""
    frames = list(_FRAME.finditer(traceback))
    rest = traceback[frames[-1].end() :] if frames else traceback
    return next((line.strip() for line in rest.splitlines() if line.strip()), "")


def users_frames(traceback: str) -> str:
    """Returns the frames of a formatted traceback that are neither lte-ray's, nor Python's, nor an installed package's."""
    return "".join(frame.group(0) for frame in _FRAME.finditer(traceback) if not _is_installed(frame.group(1)))


def _is_installed(path: str) -> bool:
    folders = (os.path.dirname(lte_ray.__file__), sysconfig.get_path("stdlib"))
    parts = path.split("/")
    return path.startswith(("<", *(f"{folder}/" for folder in folders))) or "site-packages" in parts or "dist-packages" in parts


def _details(error: LTEError) -> str:
    if not isinstance(error, WorkerFailed):
        return str(error)
    traceback = error.traceback.rstrip()
    users = users_frames(traceback)
    return f"In your code:\n{users.rstrip()}\n{reason(traceback)}\n\nAll of it:\n{traceback}" if users else traceback

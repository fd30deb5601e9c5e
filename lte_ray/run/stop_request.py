"""``stop.json`` in a run's directory: by it, others ask the driver to end the run, without a way to the cluster.

The file can do nothing else. That it is there is the request; of its content only a reason is read, as text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from concurrent.futures import Future

from lte_ray.errors import StorageError
from lte_ray.redaction import printable, redact
from lte_ray.run.stopping import Stop, StopRules
from lte_ray.storage import RunDirectory, run_in_thread

REQUEST = "stop.json"

MAX_BYTES, MAX_REASON = 4096, 200
"""Bytes of the file, and characters of its reason, at most."""

LOCAL_INTERVAL, REMOTE_INTERVAL = 1.0, 10.0
"""Seconds between two looks for the file: on a local disk, and elsewhere."""

BRIEF = 5.0
"""Seconds for which removing the file is repeated while storage fails."""


def request_stop(directory: RunDirectory, reason: str) -> None:
    """Asks the run's driver to end the run. Raises StorageError if the file can't be written."""
    directory.write(REQUEST, json.dumps({"reason": reason, "at": time.time()}).encode())


def remove_request(directory: RunDirectory) -> None:
    """Removes the request, if there is one and storage allows."""
    with contextlib.suppress(StorageError):
        dataclasses.replace(directory, patience=min(directory.patience, BRIEF)).delete(REQUEST)


def read_request(directory: RunDirectory) -> str | None:
    """Returns the reason of the request, or None if there is no request. A reason that can't be read is left out."""
    with contextlib.suppress(StorageError):
        if directory.exists(REQUEST):
            return _read_reason(directory) or "lte-ray stop"
    return None


def _read_reason(directory: RunDirectory) -> str:
    with contextlib.suppress(StorageError, ValueError, KeyError, TypeError, RecursionError):
        if not directory.is_link(REQUEST):  # never remove what a link points to
            return printable(redact(str(json.loads(directory.read(REQUEST, MAX_BYTES))["reason"])))[:MAX_REASON].strip()
    return ""


class StopRequests:
    """Looks for a request now and then, in the driver. Another thread reads, so a storage that hangs doesn't hang the run.

    Args:
        directory: of the run.
        rules: are told of a request.
    """

    def __init__(self, directory: RunDirectory, rules: StopRules) -> None:
        self._directory, self._rules = dataclasses.replace(directory, patience=0.0), rules
        self._interval = LOCAL_INTERVAL if directory.is_local else REMOTE_INTERVAL
        self._reading: Future[str | None] | None = None
        self._next = 0.0

    def poll(self) -> None:
        """Takes the answer of the last look, and looks again if it is time. Never waits."""
        if self._reading is not None and self._reading.done():
            reason, self._reading = self._reading.result(), None
            if reason is not None:
                self._rules.request(Stop("request", reason))
        if self._reading is None and self._rules.stop is None and time.monotonic() >= self._next:
            self._next = time.monotonic() + self._interval
            self._reading = run_in_thread(lambda: read_request(self._directory))

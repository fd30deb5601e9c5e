"""Retries operations on storage while it fails, and says which operations are waiting and why.

A full disk, a slow store or a lost network may recover, so an operation is repeated after 0.1 s, then after twice as long each
time, at most 5 s, until its patience ends. A missing file or a missing permission stays as it is and fails at once
(`is_permanent`). `pending_problem` tells at any moment, from any thread, what is being repeated or doesn't return.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import dataclass
from typing import TypeVar

from lte_ray.errors import LTEError, StorageError
from lte_ray.redaction import redact
from lte_ray.storage.background import run_in_thread

T = TypeVar("T")

DEFAULT_PATIENCE = 60.0
"""Seconds for which a failing operation is repeated, unless settings say otherwise."""

FIRST_WAIT, LONGEST_WAIT = 0.1, 5.0
"""Seconds between two attempts: the first time, and at most. Each wait is twice the one before."""

SLOW_AFTER = 10.0
"""Seconds after which an attempt that hasn't returned is reported."""

LOG_INTERVAL = 30.0
"""Seconds between two log lines while the main thread waits for storage and can't report anything else."""

MAX_DESCRIBED = 3
"""Operations that `pending_problem` describes; further ones are counted."""

log = logging.getLogger("lte_ray.storage")
clock: Callable[[], float] = time.monotonic
sleep: Callable[[float], None] = time.sleep

PROGRAM_ERRORS = (LTEError, TypeError, AttributeError, NameError, AssertionError, ImportError)
"""Errors of the program, not of storage. They are raised as they are."""

PERMANENT_ERRORS = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    FileExistsError,
    ValueError,
    NotImplementedError,
)
"""pyarrow's ArrowInvalid is a ValueError; its ArrowNotImplementedError is a NotImplementedError."""

PERMANENT_NUMBERS = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG,
    errno.EINVAL, errno.ELOOP, errno.ENOTEMPTY, errno.EXDEV, errno.ENOTSUP, errno.ENOSYS,
}  # fmt: skip

PERMANENT_WORDS = (
    "ACCESS_DENIED", "NO_SUCH_BUCKET", "NO_SUCH_KEY", "RESOURCE_NOT_FOUND", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH",
    "PERMISSION_DENIED", "UNAUTHENTICATED",
)  # fmt: skip
"""What pyarrow's S3 and GCS say instead of an error number: no permission, or not found."""


def is_permanent(error: Exception) -> bool:
    """Whether repeating can't help: not found, not permitted, a folder, an impossible name. Anything else may pass."""
    number = getattr(error, "errno", None)
    if isinstance(number, int):
        return number in PERMANENT_NUMBERS
    return isinstance(error, PERMANENT_ERRORS) or any(word in str(error) for word in PERMANENT_WORDS)


def describe_error(error: Exception) -> str:
    """What went wrong, in a few words: the system's own if there are any."""
    number = getattr(error, "errno", None)
    text = os.strerror(number) if isinstance(number, int) and number > 0 else str(error).strip().partition("\n")[0][:200]
    return text.rstrip(".") or type(error).__name__


@dataclass
class _Operation:
    """An operation in progress. `attempt_began` and `first_failed` are times of `clock`."""

    what: str
    patience: float
    attempt_began: float
    failures: int = 0
    first_failed: float = 0.0
    reason: str = ""

    def record_failure(self, error: Exception) -> None:
        if not self.failures:
            self.first_failed = clock()
        self.failures, self.reason = self.failures + 1, redact(describe_error(error))

    @property
    def remaining(self) -> float:
        """Seconds for which it will be repeated."""
        return max(self.first_failed + self.patience - clock(), 0.0)

    def history(self) -> str:
        """How often it failed, and why."""
        if self.failures == 1:
            return f"has failed once ({self.reason})"
        return f"has failed {self.failures} times in {clock() - self.first_failed:.0f} s ({self.reason})"

    def problem(self) -> str:
        """What is wrong with it, or ''."""
        seconds = clock() - self.attempt_began
        if self.failures:
            slow = seconds > SLOW_AFTER
            now = f"this try has been going on for {seconds:.0f} s" if slow else f"trying for {self.remaining:.0f} s more"
            return f"{self.what} {self.history()}; {now}"
        return f"{self.what} has been going on for {seconds:.0f} s" if seconds > SLOW_AFTER else ""


_lock = threading.Lock()
_numbers = itertools.count()
_pending: dict[int, _Operation] = {}


def pending_problem() -> str:
    """What this process waits for from storage, or '' if all is well.

    That is operations that failed and are being repeated, and attempts that haven't returned for `SLOW_AFTER` seconds.
    """
    with _lock:
        problems = [problem for operation in _pending.values() if (problem := operation.problem())]
    more = [f"and {len(problems) - MAX_DESCRIBED} more"] if len(problems) > MAX_DESCRIBED else []
    return "; ".join([*problems[:MAX_DESCRIBED], *more])


def retry(attempt: Callable[[], T], what: str, failure: str, patience: float) -> T:
    """Repeats `attempt` until it succeeds, and returns its result. Repeating it must be harmless.

    The main thread never runs the filesystem's code, in which it couldn't handle signals. It waits for a thread, and logs if
    that takes long.

    Args:
        attempt: the operation.
        what: the operation in words, "writing PATH".
        failure: how the error begins, "PATH can't be written".
        patience: seconds after the first failure for which it is repeated.

    Raises:
        StorageError: the failure is permanent, or the patience has ended. Its cause is the last failure.
    """
    number, operation = next(_numbers), _Operation(redact(what), patience, clock())
    with _lock:
        _pending[number] = operation
    try:
        return _repeat(attempt, operation, failure)
    finally:
        with _lock:
            del _pending[number]


def run_once(call: Callable[[], T], what: str) -> T:
    """Makes a call without repeating it; `what` is it in words. The main thread waits for it as in `retry`."""
    return _run_attempt(call, _Operation(redact(what), 0.0, clock()))


def _repeat(attempt: Callable[[], T], operation: _Operation, failure: str) -> T:
    wait_seconds = FIRST_WAIT
    while True:
        operation.attempt_began = clock()
        try:
            result = _run_attempt(attempt, operation)
        except PROGRAM_ERRORS:
            raise
        except Exception as error:
            permanent = is_permanent(error)
            with _lock:
                operation.record_failure(error)
            if permanent or operation.remaining <= 0:
                if operation.failures > 1:
                    log.warning("%s %s: given up.", operation.what, operation.history())
                raise StorageError(f"{failure}: {_last_words(error, operation)}") from error
            if operation.failures == 1:
                log.warning(
                    "%s has failed (%s); trying for %.0f s more.", operation.what, operation.reason, operation.remaining
                )
            operation.attempt_began = clock()
            sleep(min(wait_seconds, operation.remaining))
            wait_seconds = min(2 * wait_seconds, LONGEST_WAIT)
        else:
            if operation.failures:
                log.warning("%s %s, and has worked now.", operation.what, operation.history())
            return result


def _run_attempt(attempt: Callable[[], T], operation: _Operation) -> T:
    if threading.current_thread() is not threading.main_thread():
        return attempt()
    running, limit = run_in_thread(attempt), SLOW_AFTER
    while wait([running], limit).not_done:
        log.warning("%s.", operation.problem() or f"{operation.what} takes long")
        limit = LOG_INTERVAL
    return running.result()


def _last_words(error: Exception, operation: _Operation) -> str:
    text = str(error).rstrip(".") or type(error).__name__
    if operation.failures == 1:
        return f"{text}."
    tried = f"{operation.failures} times in {clock() - operation.first_failed:.0f} s"
    return f"{text}. It was tried {tried} (--storage-patience)."

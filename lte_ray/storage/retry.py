"""Operations on storage that are tried again while it fails, and a register that says so in words.

A full disk, a slow store or a cut network is waited out for some time: 0.1 s, then twice as long each time, at most 5 s.
`trouble` tells at any moment, from any thread, what is being tried again or doesn't come back.

Which failures of storage can't be waited out: a wrong place stays wrong, a full disk or a cut network may not.
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

PROGRAM = (LTEError, TypeError, AttributeError, NameError, AssertionError, ImportError)
"""Errors of programs, not of storage: they go through as they are."""

KINDS = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    FileExistsError,
    ValueError,
    NotImplementedError,
)
"""pyarrow's ArrowInvalid is a ValueError; its ArrowNotImplementedError is a NotImplementedError."""

NUMBERS = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG,
    errno.EINVAL, errno.ELOOP, errno.ENOTEMPTY, errno.EXDEV, errno.ENOTSUP, errno.ENOSYS,
}  # fmt: skip

WORDS = (
    "ACCESS_DENIED", "NO_SUCH_BUCKET", "NO_SUCH_KEY", "RESOURCE_NOT_FOUND", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH",
    "PERMISSION_DENIED", "UNAUTHENTICATED",
)  # fmt: skip
"""What pyarrow's S3 and GCS say in place of a number: no permission, or not there."""


def is_permanent(error: Exception) -> bool:
    """Whether trying again is no use: not found, not permitted, a folder, a name that can't be; all else may pass."""
    number = getattr(error, "errno", None)
    if isinstance(number, int):
        return number in NUMBERS
    return isinstance(error, KINDS) or any(word in str(error) for word in WORDS)


def reason(error: Exception) -> str:
    """What went wrong, in a few words: the system's own where there are any."""
    number = getattr(error, "errno", None)
    text = os.strerror(number) if isinstance(number, int) and number > 0 else str(error).strip().partition("\n")[0][:200]
    return text.rstrip(".") or type(error).__name__


T = TypeVar("T")

PATIENCE = 60.0
"""Seconds for which a failing operation is tried again, by default."""

FIRST_WAIT, LONGEST_WAIT = 0.1, 5.0
"""Seconds between two tries: the first time, and at most; each wait is twice the one before."""

LONG = 10.0
"""Seconds after which an operation that goes on is worth a word."""

SAID_AGAIN = 30.0
"""Seconds between two words on it, where nobody else says them: to the main thread, which can't do anything else meanwhile."""

MOST = 3
"""Operations that `trouble` names; the others are counted."""

log = logging.getLogger("lte_ray.storage")
clock: Callable[[], float] = time.monotonic
sleep: Callable[[float], None] = time.sleep


@dataclass
class _Operation:
    """One that is under way. Times are those of `clock`; `failing` is that of the first failure."""

    what: str
    patience: float
    trying: float
    failures: int = 0
    failing: float = 0.0
    reason: str = ""

    def failed(self, error: Exception) -> None:
        if not self.failures:
            self.failing = clock()
        self.failures, self.reason = self.failures + 1, redact(reason(error))

    @property
    def left(self) -> float:
        """Seconds for which it will be tried again."""
        return max(self.failing + self.patience - clock(), 0.0)

    def history(self) -> str:
        """How often it failed, and why."""
        now = clock()
        if self.failures == 1:
            return f"has failed once ({self.reason})"
        return f"has failed {self.failures} times in {now - self.failing:.0f} s ({self.reason})"

    def sentence(self) -> str:
        """What there is to say about it, or ''."""
        on = clock() - self.trying
        if self.failures:
            more = f"this try has been going on for {on:.0f} s" if on > LONG else f"trying for {self.left:.0f} s more"
            return f"{self.what} {self.history()}; {more}"
        return f"{self.what} has been going on for {on:.0f} s" if on > LONG else ""


_lock = threading.Lock()
_numbers = itertools.count()
_under_way: dict[int, _Operation] = {}


def pending_problem() -> str:
    """What this process is waiting for from storage, '' if all is well.

    That is operations that have failed and are being tried again, and those that go on for longer than `LONG` seconds.
    """
    with _lock:
        said = [sentence for operation in _under_way.values() if (sentence := operation.sentence())]
    more = [f"and {len(said) - MOST} more"] if len(said) > MOST else []
    return "; ".join([*said[:MOST], *more])


def retry(attempt: Callable[[], T], what: str, impossible: str, patience: float) -> T:
    """What `attempt` gives, as soon as it doesn't fail; it must be harmless to try it again.

    The main thread is never inside the filesystem's code, where it would hear no signal: it waits, and says so if that is long.

    Args:
        attempt: the operation.
        what: it in words, "writing PATH".
        impossible: how the error begins, "PATH can't be written".
        patience: seconds after the first failure for which it is tried again.

    Raises:
        StorageError: the failure is permanent, or patience is at its end. Its cause is the last failure.
    """
    number, operation = next(_numbers), _Operation(redact(what), patience, clock())
    with _lock:
        _under_way[number] = operation
    try:
        return _until_it_works(attempt, operation, impossible)
    finally:
        with _lock:
            del _under_way[number]


def _until_it_works(attempt: Callable[[], T], operation: _Operation, impossible: str) -> T:
    wait = FIRST_WAIT
    while True:
        operation.trying = clock()
        try:
            result = _made(attempt, operation)
        except PROGRAM:
            raise
        except Exception as error:
            lasting = is_permanent(error)
            with _lock:
                operation.failed(error)
            if lasting or operation.left <= 0:
                if operation.failures > 1:
                    log.warning("%s %s: given up.", operation.what, operation.history())
                raise StorageError(f"{impossible}: {_ending(error, operation)}") from error
            if operation.failures == 1:
                log.warning("%s has failed (%s); trying for %.0f s more.", operation.what, operation.reason, operation.left)
            operation.trying = clock()
            sleep(min(wait, operation.left))
            wait = min(2 * wait, LONGEST_WAIT)
        else:
            if operation.failures:
                log.warning("%s %s, and has worked now.", operation.what, operation.history())
            return result


def run_once(call: Callable[[], T], what: str) -> T:
    """What `call` gives, or raises; `what` is it in words. The main thread waits for it as in `persist`."""
    return _made(call, _Operation(redact(what), 0.0, clock()))


def _made(attempt: Callable[[], T], operation: _Operation) -> T:
    """One try."""
    if threading.current_thread() is not threading.main_thread():
        return attempt()
    trying, limit = run_in_thread(attempt), LONG
    while wait([trying], limit).not_done:
        log.warning("%s.", operation.sentence() or f"{operation.what} takes long")
        limit = SAID_AGAIN
    return trying.result()


def _ending(error: Exception, operation: _Operation) -> str:
    text = str(error).rstrip(".") or type(error).__name__
    if operation.failures == 1:
        return f"{text}."
    tried = f"{operation.failures} times in {clock() - operation.failing:.0f} s"
    return f"{text}. It was tried {tried} (--storage-patience)."

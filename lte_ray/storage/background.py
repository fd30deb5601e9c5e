"""Runs calls that may never return in threads of their own, so that a filesystem that hangs doesn't hang its caller."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

THREAD_NAME = "storage"


def run_in_thread(call: Callable[[], T]) -> Future[T]:
    """Runs the call in a daemon thread, which doesn't keep the process alive. Returns a future of its result or error."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # raised again where the result is read
            future.set_exception(error)

    threading.Thread(target=run, name=THREAD_NAME, daemon=True).start()
    return future


def has_pending_calls() -> bool:
    """Whether some calls haven't returned. When a process ends, some libraries wait for theirs without a limit."""
    return any(thread.name == THREAD_NAME for thread in threading.enumerate())

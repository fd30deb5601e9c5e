"""Calls that may never come back, made in threads of their own: a filesystem that hangs must not hang who uses it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

NAME = "storage"
"""Of the threads."""


def run_in_thread(call: Callable[[], T]) -> Future[T]:
    """Makes the call in a thread that doesn't keep the process from ending; gives what will be its result, or its error."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # whoever asks for the result gets it
            future.set_exception(error)

    threading.Thread(target=run, name=NAME, daemon=True).start()
    return future


def has_pending_calls() -> bool:
    """Whether calls haven't come back. Libraries wait for theirs when the process ends, some for ever."""
    return any(thread.name == NAME for thread in threading.enumerate())

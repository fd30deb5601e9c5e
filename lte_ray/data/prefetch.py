"""Reads an iterator ahead in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


def read_ahead(items: Iterator[T], count: int, prepare: Callable[[T], T] = lambda item: item) -> Iterator[T]:
    """Yields the items in order, and reads up to `count` of them ahead in a thread.

    What the iterator raises is raised here, after the items before it. Closing the generator ends the thread.

    Args:
        items: must not draw from the global random generators, since the caller's thread uses them at the same time.
        count: at least 1.
        prepare: applied to each item, in the thread.
    """
    ready: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(count)
    closed = threading.Event()

    def put(kind: str, value: T | BaseException | None) -> bool:
        while not closed.is_set():
            try:
                ready.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        try:
            for item in items:
                if not put("item", prepare(item)):
                    return
            put("end", None)
        except BaseException as error:
            put("error", error)

    threading.Thread(target=read, name="lte-ray read ahead", daemon=True).start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                assert isinstance(value, BaseException)
                raise value
            yield value  # type: ignore[misc]
    finally:
        closed.set()

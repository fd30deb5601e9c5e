"""Futures and background tasks of the coordinator's process, which all fail together when the run does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


class BackgroundTasks:
    """Futures and tasks of one event loop.

    Args:
        on_failure: called when a background task fails, before the futures fail.
    """

    def __init__(self, on_failure: Callable[[], None]) -> None:
        self._on_failure = on_failure
        self._futures: set[asyncio.Future[Any]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.failure: Exception | None = None
        """The first error that ended the run; None while it continues."""

    def create_future(self) -> asyncio.Future[Any]:
        """Returns a new future, which fails with the run."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self.failure is not None:
            future.set_exception(self.failure)
            return future
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        return future

    def fail(self, error: Exception) -> None:
        """Fails all futures, present and future ones, with the first error: later ones follow from it."""
        self.failure = self.failure or error
        for future in [future for future in self._futures if not future.done()]:
            future.set_exception(error)

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs `work` in the background; if it fails, the run does."""
        task = asyncio.get_running_loop().create_task(self._run(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @property
    def busy(self) -> bool:
        """Whether a background task is running."""
        return bool(self._tasks)

    async def _run(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:
            self._on_failure()
            self.fail(error)

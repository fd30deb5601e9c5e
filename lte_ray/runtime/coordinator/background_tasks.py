"""Who waits in the coordinator's process, what is done there in the background, and the failure that all are told of."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


class BackgroundTasks:
    """Futures and tasks of one event loop, which fail together.

    Args:
        abandon: called when a background task fails, before anybody is told.
    """

    def __init__(self, abandon: Callable[[], None]) -> None:
        self._abandon = abandon
        self._futures: set[asyncio.Future[Any]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.failure: Exception | None = None

    def create_future(self) -> asyncio.Future[Any]:
        """A new future, which fails with the run."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self.failure is not None:
            future.set_exception(self.failure)
            return future
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        return future

    def fail(self, error: Exception) -> None:
        """Tells all who wait, now or later; what follows from the first failure is no news."""
        self.failure = self.failure or error
        for future in [future for future in self._futures if not future.done()]:
            future.set_exception(error)

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Does something that nobody waits for; if it fails, the run does."""
        task = asyncio.get_running_loop().create_task(self._guarded(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @property
    def busy(self) -> bool:
        """Whether something is being done in the background."""
        return bool(self._tasks)

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:
            self._abandon()
            self.fail(error)

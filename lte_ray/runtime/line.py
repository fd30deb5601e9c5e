"""A head process's line to the coordinator, which may be cut, and connected to another one."""

from __future__ import annotations

import threading
import time
from typing import Any

import ray

from lte_ray.errors import CoordinatorLost, LTEError
from lte_ray.runtime.told import DEAD
from lte_ray.runtime.transport import Gone

AGAIN = 0.5
"""Seconds after which a call is made again to a coordinator that can't be reached for the moment."""


class Cut(Exception):
    """The coordinator that gave an answer is gone: what it says doesn't count any more."""


class Line:
    """Calls the coordinator; while there is none, calls wait for the next.

    Args:
        coordinator: its handle.
        epoch: how many there were before it.
    """

    def __init__(self, coordinator: Any, epoch: int) -> None:
        self._coordinator, self.epoch = coordinator, epoch
        self._changed = threading.Condition()
        self._waiting: float | None = None

    def connect(self, coordinator: Any, epoch: int) -> None:
        """Another coordinator answers from now on."""
        with self._changed:
            self._coordinator, self.epoch = coordinator, epoch
            self._changed.notify_all()

    def cut(self, epoch: int) -> None:
        """Answers of coordinators before `epoch` don't count any more, and calls wait for that one."""
        with self._changed:
            if epoch > self.epoch:
                self._coordinator, self.epoch = None, epoch

    @property
    def waiting(self) -> float:
        """For how many seconds calls have been waiting for a coordinator that can be reached; 0 if none is."""
        since = self._waiting
        return 0.0 if since is None else time.monotonic() - since

    def call(self, method: str, *args: Any) -> tuple[int, Any]:
        """What the coordinator answers, and which one it was. As often as it takes: it knows repeats.

        Raises:
            LTEError: it has failed for good.
        """
        while True:
            with self._changed:
                while self._coordinator is None:
                    self._waiting = self._waiting or time.monotonic()
                    self._changed.wait()
                coordinator, epoch = self._coordinator, self.epoch
            try:
                answer = ray.get(getattr(coordinator, method).remote(*args))
                self._waiting = None
                return epoch, answer
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, CoordinatorLost | Gone):  # one of its shards, or what it was to fetch, is gone
                    self._await_another(epoch)
                    continue
                raise (error.cause if isinstance(error.cause, LTEError) else error) from None
            except DEAD as error:
                if isinstance(error, ray.exceptions.ActorUnavailableError):
                    with self._changed:
                        self._waiting = self._waiting or time.monotonic()
                        self._changed.wait(AGAIN)
                else:
                    self._await_another(epoch)

    def _await_another(self, epoch: int) -> None:
        with self._changed:
            self._waiting = self._waiting or time.monotonic()
            if self.epoch == epoch:
                self._coordinator = None

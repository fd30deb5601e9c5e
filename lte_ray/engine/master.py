"""The main weights in the type of all merging, brought up to date beside the decisions about them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, TypeVar

from torch import Tensor

from lte_ray.merging.products import Share, add_contributions

T = TypeVar("T")

Use = Callable[[int, Tensor, Mapping[int, Tensor | None]], T]
"""What is made of a version's number, its base and the references that it holds, which nothing changes meanwhile."""

KEPT = 1000
"""Versions whose time is remembered."""


@dataclass(frozen=True)
class Operation:
    """How one version follows from the one before: base += sum of weight x change over `shares`, or base += `change`.

    `references` are the factors that the new version holds of the heads that were merged.
    """

    version: int
    shares: Sequence[Share]
    change: Tensor | None = None
    references: Mapping[int, Tensor | None] = field(default_factory=dict)

    def apply(self, base: Tensor) -> None:
        """Does it, in place, in the order of the shares."""
        if self.change is None:
            add_contributions(base, self.shares)
        else:
            base += self.change


class Master:
    """A base, and the operations that lead to the newest version, which may be carried out later and in another thread.

    The coordinator decides by numbers; the products are computed when somebody needs them, or beside. Heads that get factors
    do the same operations in the same order (`Mirror`): theirs are equal bit for bit on one kind of hardware.

    Args:
        base: flat, in the base layout; taken over and changed in place.
        version: of `base`.
        references: the factors that `base` holds of each head, flat; None where B' = 0.
    """

    def __init__(self, base: Tensor, version: int, references: Mapping[int, Tensor | None]) -> None:
        self._base, self._references = base, dict(references)
        self._done = self.version = version  # computed, and queued
        self._queue: deque[Operation | tuple[Use[Any], Future[Any]]] = deque()
        self._seconds: dict[int, float] = {}
        self._lock = Lock()

    def queue(self, operation: Operation) -> None:
        """Adds the operation that leads to the next version."""
        assert operation.version == self.version + 1, "versions follow each other"
        self._queue.append(operation)
        self.version = operation.version

    def forget(self, head: int) -> None:
        """From here on no version holds factors of this head: what the base has of them is weights like any other."""
        self.at(lambda version, base, references: self._references.pop(head, None))

    def catch_up(self) -> Tensor:
        """Carries out all that is queued and gives the base, which stays the master's own."""
        with self._lock:
            return self._catch_up()

    def at(self, use: Use[T]) -> Future[T]:
        """What `use` will make of the version that is the newest now, whatever is queued after it; once it is carried out."""
        result: Future[T] = Future()
        self._queue.append((use, result))
        return result

    def read(self, use: Use[T]) -> T:
        """As `at`, at once."""
        result = self.at(use)
        self.catch_up()
        return result.result()

    def seconds(self, version: int) -> float:
        """How long a version's operation took, which is forgotten here; 0 before it was carried out."""
        return self._seconds.pop(version, 0.0)

    def _catch_up(self) -> Tensor:
        while self._queue:
            step = self._queue.popleft()
            if isinstance(step, Operation):
                begun = time.perf_counter()
                step.apply(self._base)
                self._references.update(step.references)
                self._done = step.version
                self._seconds[self._done] = time.perf_counter() - begun
                self._seconds.pop(self._done - KEPT, None)  # which nobody asked for
            else:
                self._give(*step)
        return self._base

    def _give(self, use: Use[Any], result: Future[Any]) -> None:
        try:
            result.set_result(use(self._done, self._base, self._references))
        except Exception as error:  # it is the asker's, not that of whoever catches up
            result.set_exception(error)

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
        self._queue: deque[Operation] = deque()
        self._uses: dict[int, list[tuple[Callable[[Tensor], Any], Future[Any]]]] = {}
        self._seconds: dict[int, float] = {}
        self._lock = Lock()

    def queue(self, operation: Operation) -> None:
        """Adds the operation that leads to the next version."""
        assert operation.version == self.version + 1, "versions follow each other"
        self._queue.append(operation)
        self.version = operation.version

    def catch_up(self) -> Tensor:
        """Carries out all that is queued and gives the base, which stays the master's own."""
        with self._lock:
            return self._catch_up()

    def read(self, use: Callable[[int, Tensor, Mapping[int, Tensor | None]], T]) -> T:
        """What `use` makes of the newest version's number, base and references, which nothing changes meanwhile."""
        with self._lock:
            base = self._catch_up()
            return use(self._done, base, self._references)

    def at(self, version: int, use: Callable[[Tensor], T]) -> Future[T]:
        """What `use` will make of the base at a version whose operation was just queued; called when it is carried out."""
        result: Future[T] = Future()
        self._uses.setdefault(version, []).append((use, result))
        return result

    def seconds(self, version: int) -> float:
        """How long a version's operation took, which is forgotten here; 0 before it was carried out."""
        return self._seconds.pop(version, 0.0)

    def _catch_up(self) -> Tensor:
        while self._queue:
            operation, begun = self._queue.popleft(), time.perf_counter()
            operation.apply(self._base)
            self._references.update(operation.references)
            self._done = operation.version
            self._seconds[self._done] = time.perf_counter() - begun
            for use, result in self._uses.pop(self._done, ()):
                result.set_result(use(self._base))
        return self._base

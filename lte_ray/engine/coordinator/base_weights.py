"""One base, and the queue of merges that lead from it to the newest version."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Literal, TypeVar

from torch import Tensor

from lte_ray.engine.coordinator.rounding import Rounding
from lte_ray.engine.spans import span
from lte_ray.merging.low_rank import Share
from lte_ray.merging.outer_step import merge_shares
from lte_ray.messages import OuterStep

T = TypeVar("T")

MAX_TIMED_VERSIONS = 1000
"""Versions whose merge time is remembered until it is asked for."""


@dataclass(frozen=True)
class BaseVersion:
    """One version, for readers: nothing changes it while they read, and it is changed afterwards.

    Attributes:
        version: its number.
        base: flat, in the base layout.
        references: the factors that it holds of each head, flat; None where B' = 0.
        momentum: of the outer steps, as `base`; None while it is 0.
        residual: what rounded changes of the base have left out so far, as `base`; None if they aren't rounded.
        change: the rounded change that led to this version, as `ChangePacking` packs it; None if there is none.
        ema: the moving average of the bases up to this version, as `base`; None if there is none.
    """

    version: int
    base: Tensor
    references: Mapping[int, Tensor | None]
    momentum: Tensor | None = None
    residual: Tensor | None = None
    change: Tensor | None = None
    ema: Tensor | None = None


TensorName = Literal["change", "residual", "ema"]
"""Tensors of a `BaseVersion` that not every version has, and that are read by themselves."""

BaseReader = Callable[[BaseVersion], T]
"""Reads one version."""


@dataclass(frozen=True)
class MergeOp:
    """How a version follows from the one before: by the sum of weight x change over `shares`, or by `change`.

    Without a `step` the base moves by that sum. `references` are the factors that the new version holds of the merged heads. If
    there is a moving average E of the bases W, it becomes E := ema_keep E + (1 - ema_keep) W.
    """

    version: int
    shares: Sequence[Share]
    change: Tensor | None = None
    references: Mapping[int, Tensor | None] = field(default_factory=dict)
    step: OuterStep | None = None
    ema_keep: float | None = None

    def apply(self, base: Tensor, momentum: Tensor | None, rounding: Rounding | None = None) -> Tensor | None:
        """Changes `base` and `momentum` in place, in the order of the shares; returns the momentum, which may be new."""
        merged = base if rounding is None else rounding.residual
        if self.change is None:
            momentum = merge_shares(merged, momentum, self.shares, self.step)
        else:
            merged += self.change
        if rounding is not None:
            rounding.move(base)
        return momentum


class BaseWeights:
    """A base, and a queue of the operations that lead from it to the newest version.

    The operations are carried out by `catch_up`, possibly in another thread. Heads that receive factors carry out the same
    operations in the same order (`BaseReplica`), so on one kind of hardware their base is equal bit for bit.

    Args:
        base: flat, in the base layout; taken over and changed in place.
        version: of `base`.
        references: the factors that `base` holds of each head, flat; None where B' = 0.
        momentum: of the outer steps, as `base`; None if it is 0.
        rounding: of the changes of the base; None if they are exact.
        ema: the moving average of the bases up to this one, as `base`; taken over and changed in place. None if there is none.
    """

    def __init__(
        self,
        base: Tensor,
        version: int,
        references: Mapping[int, Tensor | None],
        momentum: Tensor | None = None,
        rounding: Rounding | None = None,
        ema: Tensor | None = None,
    ) -> None:
        self._base, self._references, self._momentum, self._rounding = base, dict(references), momentum, rounding
        self._ema = ema
        self._computed = self.version = version  # `version` counts what is queued, too
        self._queue: deque[MergeOp | tuple[BaseReader[Any], Future[Any]]] = deque()
        self._seconds: dict[int, float] = {}
        self._lock = Lock()

    def enqueue(self, operation: MergeOp) -> None:
        """Adds the operation that leads to the next version."""
        assert operation.version == self.version + 1, "versions follow each other"
        self._queue.append(operation)
        self.version = operation.version

    def forget_head(self, head: int) -> None:
        """Versions from here on hold no factors of this head: its part of the base counts as ordinary weights."""
        self.schedule_read(lambda _: self._references.pop(head, None))

    def catch_up(self) -> Tensor:
        """Carries out all queued operations. Returns the base, which this object keeps and changes later."""
        with self._lock:
            return self._catch_up()

    def schedule_read(self, read: BaseReader[T]) -> Future[T]:
        """Queues `read` for the version that is the newest now, whatever is queued after it. `catch_up` carries it out."""
        result: Future[T] = Future()
        self._queue.append((read, result))
        return result

    def read(self, read: BaseReader[T]) -> T:
        """Reads the newest version now."""
        result = self.schedule_read(read)
        self.catch_up()
        return result.result()

    def preview(self, operation: MergeOp) -> Tensor:
        """Returns the base that an operation on the newest version would make, as a new tensor."""
        with self._lock:
            base = self._catch_up().clone()
            momentum = None if self._momentum is None else self._momentum.clone()
            rounding = None if self._rounding is None else self._rounding.copy()
        operation.apply(base, momentum, rounding)
        return base

    def pop_seconds(self, version: int) -> float:
        """Seconds that computing a version took, which are forgotten here; 0 before it is computed."""
        return self._seconds.pop(version, 0.0)

    def _catch_up(self) -> Tensor:
        while self._queue:
            step = self._queue.popleft()
            if isinstance(step, MergeOp):
                start = time.perf_counter()
                with span("merge"):
                    self._momentum = step.apply(self._base, self._momentum, self._rounding)
                if self._ema is not None and step.ema_keep is not None:
                    self._ema.lerp_(self._base, 1 - step.ema_keep)
                self._references.update(step.references)
                self._computed = step.version
                self._seconds[self._computed] = time.perf_counter() - start
                self._seconds.pop(self._computed - MAX_TIMED_VERSIONS, None)  # it was never asked for
            else:
                with span("publish"):
                    self._read(*step)
        return self._base

    def _read(self, read: BaseReader[Any], result: Future[Any]) -> None:
        residual, change = (None, None) if self._rounding is None else (self._rounding.residual, self._rounding.change)
        newest = BaseVersion(self._computed, self._base, self._references, self._momentum, residual, change, self._ema)
        try:
            result.set_result(read(newest))
        except Exception as error:  # it concerns the reader, not the caller of `catch_up`
            result.set_exception(error)

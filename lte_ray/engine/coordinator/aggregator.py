"""The main weights in the type of all merging, brought up to date beside the decisions about them.

The tensors of merging for some groups of entries: the work of one of several coordinator shards.

The coordinator decides by numbers (`Measured`); each shard decodes, checks and merges its own groups' part of every
contribution: the same operations on each entry, in the same order, as one process for all would do.

What the coordinator knows of contributions whose tensors are in shards: numbers.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from lte_ray.merging.low_rank import Share, add_contributions, new_reference
from lte_ray.transfer.codec import Codec

T = TypeVar("T")

Use = Callable[[int, Tensor, Mapping[int, Tensor | None]], T]
"""What is made of a version's number, its base and the references that it holds, which nothing changes meanwhile."""

KEPT = 1000
"""Versions whose time is remembered."""


@dataclass(frozen=True)
class MergeOp:
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


class BaseWeights:
    """A base, and the operations that lead to the newest version, which may be carried out later and in another thread.

    The coordinator decides by numbers; the products are computed when somebody needs them, or beside. Heads that get factors
    do the same operations in the same order (`BaseReplica`): theirs are equal bit for bit on one kind of hardware.

    Args:
        base: flat, in the base layout; taken over and changed in place.
        version: of `base`.
        references: the factors that `base` holds of each head, flat; None where B' = 0.
    """

    def __init__(self, base: Tensor, version: int, references: Mapping[int, Tensor | None]) -> None:
        self._base, self._references = base, dict(references)
        self._done = self.version = version  # computed, and queued
        self._queue: deque[MergeOp | tuple[Use[Any], Future[Any]]] = deque()
        self._seconds: dict[int, float] = {}
        self._lock = Lock()

    def enqueue(self, operation: MergeOp) -> None:
        """Adds the operation that leads to the next version."""
        assert operation.version == self.version + 1, "versions follow each other"
        self._queue.append(operation)
        self.version = operation.version

    def forget_head(self, head: int) -> None:
        """From here on no version holds factors of this head: what the base has of them is weights like any other."""
        self.schedule_read(lambda version, base, references: self._references.pop(head, None))

    def catch_up(self) -> Tensor:
        """Carries out all that is queued and gives the base, which stays the master's own."""
        with self._lock:
            return self._catch_up()

    def schedule_read(self, use: Use[T]) -> Future[T]:
        """What `use` will make of the version that is the newest now, whatever is queued after it; once it is carried out."""
        result: Future[T] = Future()
        self._queue.append((use, result))
        return result

    def read(self, use: Use[T]) -> T:
        """As `at`, at once."""
        result = self.schedule_read(use)
        self.catch_up()
        return result.result()

    def pop_seconds(self, version: int) -> float:
        """How long a version's operation took, which is forgotten here; 0 before it was carried out."""
        return self._seconds.pop(version, 0.0)

    def _catch_up(self) -> Tensor:
        while self._queue:
            step = self._queue.popleft()
            if isinstance(step, MergeOp):
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


class BaseShard:
    """Some groups' part of the base, of every head's reference, and of the contributions that aren't decided.

    `receive`, `merge`, `forget` and `at` are called in one thread; `catch_up`, which computes, may be called in another.

    Args:
        codecs: each head's; all have the same groups.
        parts: each group's part of the base by its number, flat, in the layout `Codec.parts[number].base`. Taken over.
        reset: as `LTEConfig.reset`.
        version: of the base.
        references: the factors that it holds of each head, by group, flat (`Codec.take_factors`).
    """

    def __init__(
        self,
        codecs: Sequence[Codec],
        parts: Mapping[int, Tensor],
        reset: str,
        *,
        version: int = 0,
        references: Mapping[int, Mapping[int, Tensor]] | None = None,
    ) -> None:
        self._codecs, self._reset = codecs, reset
        self._held: dict[int, dict[int, Tensor | None]] = {index: dict((references or {}).get(index, {})) for index in parts}
        self._masters = {index: BaseWeights(part, version, self._held[index]) for index, part in parts.items()}
        self._received: dict[int, tuple[int, dict[int, Share]]] = {}  # by ticket: the head, and its share of each group

    @property
    def groups(self) -> tuple[int, ...]:
        """The numbers of its groups."""
        return tuple(self._masters)

    @property
    def factored_groups(self) -> tuple[int, ...]:
        """The numbers of those that heads redo from factors."""
        return tuple(index for index in self._masters if self._codecs[0].groups[index].by_factors)

    @property
    def undecided(self) -> int:
        """How many contributions it keeps."""
        return len(self._received)

    def receive(self, ticket: int, head: int, buffers: Mapping[int, Tensor]) -> float:
        """A contribution's buffers of this shard's groups. They are only read, and kept until it is merged or forgotten.

        Args:
            ticket: the contribution's own number; heads' sequence numbers are repeated by mistaken or restarted heads.

        Returns:
            The sum of squares of its elements here: NaN or infinity if it holds such.

        Raises:
            ValueError: a buffer is malformed; nothing is kept.
        """
        codec, shares = self._codecs[head], {}
        for index, held in self._held.items():
            old = held.get(head)
            flat = codec.decode_group(index, buffers[index], old)
            shares[index] = Share(1.0, codec.group_plans[index], flat, old)
        self._received[ticket] = (head, shares)
        return sum(float(torch.dot(share.contribution, share.contribution)) for share in shares.values())

    def discard(self, ticket: int) -> None:
        """A contribution was refused, here or elsewhere, or discarded: its head's reference stays as it is."""
        self._received.pop(ticket, None)

    def forget_head(self, head: int) -> None:
        """A head begins with B = 0: from here on no version holds factors of that number."""
        for index, master in self._masters.items():
            self._held[index].pop(head, None)
            master.forget_head(head)

    def merge(self, version: int, weights: Mapping[int, float]) -> None:
        """The next version: base += sum of weight x change over these tickets, in their order; computed by `catch_up`."""
        for index, master in self._masters.items():
            shares = {}
            for ticket, weight in weights.items():
                head, received = self._received[ticket]
                shares[head] = replace(received[index], weight=weight)
            references = {head: new_reference(share, self._reset) for head, share in shares.items()}
            master.enqueue(MergeOp(version, list(shares.values()), references=references))
            self._held[index].update(references)
        for ticket in weights:
            del self._received[ticket]

    def schedule_read(self, group: int, use: Use[T]) -> Future[T]:
        """What `use` will make of a group's part at the version that is the newest now; see `Master.at`."""
        return self._masters[group].schedule_read(use)

    def catch_up(self) -> None:
        """Carries out all that is queued."""
        for master in self._masters.values():
            master.catch_up()

    def pop_seconds(self, version: int) -> float:
        """How long a version's products took, which is forgotten here."""
        return sum(master.pop_seconds(version) for master in self._masters.values())


@dataclass(frozen=True)
class MeasuredContribution:
    """A contribution that every shard has decoded: the sum of squares of all its elements."""

    sum_of_squares: float


class NeedsTensors(Exception):
    """A policy looked at the tensors of a contribution, which aren't in the coordinator's process."""


class RemoteShare(Share):
    """Stands for the share of a contribution whose tensors are in shards: to look at it is a `NeedsTensors`."""

    def __init__(self) -> None:
        """It has nothing."""

    def _missing(self) -> NoReturn:
        raise NeedsTensors

    @property
    def weight(self) -> float:
        self._missing()

    @property
    def contribution(self) -> Tensor:
        self._missing()

    @property
    def reference(self) -> Tensor | None:
        self._missing()

    @property
    def plan(self) -> NoReturn:
        self._missing()

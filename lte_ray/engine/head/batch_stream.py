"""A head's batches: where it stands in the data, and the lanes of it that it owns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lte_ray.data.partition import advance, initial_partitions, split
from lte_ray.data.shard import Shard
from lte_ray.messages import Assignment, Partitions
from lte_ray.worker import Batch, Worker, endless_batches


class BatchStream:
    """Gives one head's batches, one after another, and can say and take over where that was.

    Args:
        worker: makes the batches.
        head: the head's number.
        num_heads: how many heads there are.
        seed: of the data order.
    """

    def __init__(self, worker: Worker, head: int, num_heads: int, seed: int) -> None:
        self._worker, self._head, self._num_heads, self._seed = worker, head, num_heads, seed
        self._batches: Iterator[Batch] | None = None
        self.batches_taken = 0
        self.partitions: Partitions = initial_partitions(head, num_heads) if head < num_heads else ()  # else it is given some
        self.assignment_id = 0
        """The newest grant of lanes that was taken over."""
        self.revoked: Assignment | None = None
        """What was given away at the newest request."""

    def next_batch(self) -> Batch:
        """The next batch, as the worker made it."""
        if self._batches is None:
            assert self.partitions, "a head needs data to train on"
            now = Shard(self._head, self._num_heads, self._seed, self.batches_taken, self.partitions)
            self._batches = endless_batches(self._worker, now)
        batch = next(self._batches)
        self.batches_taken += 1
        self.partitions = advance(self.partitions, 1)
        return batch

    def seek(self, taken: int, partitions: Partitions, assignment_id: int = 0) -> None:
        """Goes on from another position; what was given away and isn't merged stays this head's."""
        self.batches_taken, self.partitions, self.assignment_id, self._batches, self.revoked = (
            taken,
            partitions,
            assignment_id,
            None,
            None,
        )

    def partitions_after(self, taken: int) -> Partitions:
        """The lanes of a head that has taken so many batches, and had no others than at the start."""
        return advance(initial_partitions(self._head, self._num_heads), taken)

    def apply_assignments(self, assignments: Sequence[Assignment], revocation: int) -> None:
        """Takes over lanes, and gives half of what it has away if that is asked; repeats change nothing."""
        for grant in assignments:
            if grant.id > self.assignment_id:
                self.partitions, self.assignment_id = tuple(sorted((*self.partitions, *grant.partitions))), grant.id
                self._batches = None
        if revocation and (self.revoked is None or revocation > self.revoked.id):
            kept, given = split(self.partitions)
            self.partitions, self.revoked, self._batches = kept, Assignment(revocation, given), None

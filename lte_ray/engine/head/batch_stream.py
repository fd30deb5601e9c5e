"""A head's batches: its position in the data, and the partitions of it that the head owns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lte_ray.data.partition import advance, initial_partitions, split
from lte_ray.data.shard import Shard
from lte_ray.messages import Assignment, PartitionPairs
from lte_ray.worker import Batch, Worker, endless_batches


class BatchStream:
    """Yields one head's batches, and can continue from any position.

    Args:
        worker: makes the batches.
        head: the head's number.
        num_heads: of the run; a head with a number from `num_heads` on owns nothing until partitions are assigned to it.
        seed: of the data order.
        share: (rank, count) where `count` processes train this head: of each `count` batches in turn this one reads the one
            with number `rank`, and the positions count all of them. The head must own a single partition.

    Attributes:
        batches_taken: so far.
        partitions: that the head owns.
        assignment_id: of the newest assignment that was applied.
        revoked: what the newest revocation took away.
    """

    def __init__(self, worker: Worker, head: int, num_heads: int, seed: int, share: tuple[int, int] = (0, 1)) -> None:
        self._worker, self._head, self._num_heads, self._seed = worker, head, num_heads, seed
        self._share = share
        self._batches: Iterator[Batch] | None = None
        self.batches_taken = 0
        self.partitions: PartitionPairs = initial_partitions(head, num_heads) if head < num_heads else ()
        self.assignment_id = 0
        self.revoked: Assignment | None = None

    def next_batch(self) -> Batch:
        """The next batch, as the worker made it."""
        if self._batches is None:
            assert self.partitions, "a head needs data to train on"
            self._batches = endless_batches(self._worker, self._shard())
        batch, count = next(self._batches), self._share[1]
        self.batches_taken += count
        self.partitions = advance(self.partitions, count)
        return batch

    def _shard(self) -> Shard:
        rank, count = self._share
        if count == 1:
            return Shard(self._head, self._num_heads, self._seed, self.batches_taken, self.partitions)
        ((start, stride),) = self.partitions
        head, cursor = self._head * count + rank, self.batches_taken // count
        return Shard(head, self._num_heads * count, self._seed, cursor, ((start + rank * stride, count * stride),))

    def seek(self, batches_taken: int, partitions: PartitionPairs, assignment_id: int = 0) -> None:
        """Continues from another position. What was revoked and isn't merged stays this head's."""
        self.batches_taken, self.partitions, self.assignment_id = batches_taken, partitions, assignment_id
        self._batches, self.revoked = None, None

    def partitions_after(self, batches_taken: int) -> PartitionPairs:
        """The partitions after `batches_taken` batches of a head that owns only what it owned at the start."""
        return advance(initial_partitions(self._head, self._num_heads), batches_taken)

    def apply_assignments(self, assignments: Sequence[Assignment], revocation: int) -> None:
        """Takes over partitions, and gives half of what it has away if that is revoked; repeats change nothing.

        Args:
            assignments: with partitions to take over.
            revocation: its number; 0 if nothing is revoked.
        """
        for assignment in assignments:
            if assignment.id > self.assignment_id:
                self.partitions = tuple(sorted((*self.partitions, *assignment.partitions)))
                self.assignment_id, self._batches = assignment.id, None
        if revocation and (self.revoked is None or revocation > self.revoked.id):
            self.partitions, revoked = split(self.partitions)
            self.revoked, self._batches = Assignment(revocation, revoked), None

"""What heads receive of a merge, group by group: the factors of what was merged, the change of the base, or the new base."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence

from lte_ray.messages import MergeDelta
from lte_ray.transfer.groups import EntryGroup

MAX_DELTAS = 1000
"""Merges that are kept at most: those that changed nothing take no bytes."""


class BroadcastLog:
    """Keeps the last merges as heads redo them, as long as they take fewer bytes than the base and its momentum.

    Args:
        groups: of `transfer.groups`.
        base_sizes: bytes of each group's part of the base.
        sizes: bytes of each group's buffer, by head.
        version: the newest.
        momentum: whether that version has momentum of outer steps.
        change_sizes: bytes of the rounded change of each group that is sent so.
    """

    def __init__(
        self,
        groups: Sequence[EntryGroup],
        base_sizes: Sequence[int],
        sizes: Sequence[Sequence[int]],
        version: int,
        momentum: bool = False,
        change_sizes: Mapping[int, int] | None = None,
    ) -> None:
        self.factored_groups = factored = [i for i, group in enumerate(groups) if group.by_factors]
        """The numbers of the groups that are sent as factors."""
        self.redone_groups = [i for i, group in enumerate(groups) if group.redone]
        """The numbers of the groups that heads redo, from factors or by changes of the base."""
        self.dense_groups = [i for i, group in enumerate(groups) if not group.redone]
        """The numbers of the groups that are sent as the base."""
        self.by_changes = any(group.by_changes for group in groups)
        """Whether groups are sent as changes of the base."""
        self._change_bytes = sum((change_sizes or {}).values())
        self._redone_bytes = sum(base_sizes[i] for i in self.redone_groups)
        self._momentum = momentum
        self._factor_bytes = [sum(each[i] for i in factored) for each in sizes]  # by head
        self._dense_bytes = sum(base_sizes[i] for i in self.dense_groups)
        self._deltas: deque[MergeDelta] = deque()
        self._version = version

    def append(self, delta: MergeDelta | None) -> None:
        """Adds the next version; None if it can't be redone from factors, so that all groups are sent as the base."""
        self._version += 1
        self._momentum |= delta is not None and delta.outer_step is not None and delta.outer_step.uses_momentum
        if delta is None or not self.redone_groups:
            self._deltas.clear()
            return
        self._deltas.append(delta)
        while (len(self._deltas) > MAX_DELTAS or self._bytes(self._deltas) > self._base_bytes) and len(self._deltas) > 1:
            self._deltas.popleft()

    def deltas_since(self, have: int) -> tuple[MergeDelta, ...] | None:
        """The merges to redo for a process that has version `have`; None if it must receive the whole base."""
        if not self.redone_groups:
            return ()
        deltas = tuple(delta for delta in self._deltas if delta.version > have)
        return deltas if have >= 0 and have + len(deltas) == self._version else None

    @property
    def oldest(self) -> int:
        """The version of the oldest merge that is kept."""
        return self._deltas[0].version if self._deltas else self._version + 1

    def bytes_down(self, heads: Collection[int], live: int) -> int:
        """Bytes until all heads have the newest merge.

        The merged heads receive the dense parts, all others the merged heads' factors, and all heads changes of the base. If
        heads can't redo the merge, the merged heads receive the whole base, and its momentum where there is any.

        Args:
            heads: the merged ones.
            live: how many heads train.
        """
        if not self.redone_groups:
            return self._dense_bytes * len(heads)
        if not self._deltas:
            return (self._dense_bytes + self._base_bytes) * len(heads)
        factors = sum(self._factor_bytes[h] * max(0, live - 1) for h in heads if h in self._deltas[-1].weights)
        return self._dense_bytes * len(heads) + factors + self._change_bytes * live

    @property
    def _base_bytes(self) -> int:
        """Bytes that a process needs to start redoing merges: the redone groups' part of the base, and its momentum.

        Heads have no use for the momentum where they receive changes.
        """
        return self._redone_bytes * (2 if self._momentum and self.factored_groups else 1)

    def _bytes(self, deltas: Collection[MergeDelta]) -> int:
        factors = sum(self._factor_bytes[head] for delta in deltas for head in delta.weights)
        return factors + self._change_bytes * len(deltas)


def alternative_bytes(size: int, num_heads: int, merged: int, steps: int) -> dict[str, int]:
    """Bytes that other ways of training would have sent instead of one merge, all heads together, in fp32.

    dense: the whole base down to each merged head, and as much of a change up. ddp: a ring all-reduce of all gradients at every
    local step, 2 (N - 1) / N of them a head. diloco: the same at every merge.

    Args:
        size: elements of the base.
        num_heads: N.
        merged: heads whose contributions were merged.
        steps: that they took, together.
    """
    ring = 2 * (num_heads - 1) / num_heads * size * 4
    return {"dense": 2 * size * 4 * merged, "ddp": round(ring * steps), "diloco": round(ring * merged)}

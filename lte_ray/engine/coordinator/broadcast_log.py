"""What a head gets of a merge, group by group: the factors of what was merged, or the new base."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence

from lte_ray.messages import MergeDelta
from lte_ray.transfer.groups import EntryGroup


class BroadcastLog:
    """Remembers the last merges as heads redo them, as long as their factors are fewer bytes than the base.

    Args:
        groups: of `merging.transfer.groups`.
        base_sizes: bytes of each group's part of the base.
        sizes: bytes of each group's buffer, by head.
        version: the newest.
    """

    def __init__(
        self, groups: Sequence[EntryGroup], base_sizes: Sequence[int], sizes: Sequence[Sequence[int]], version: int
    ) -> None:
        self._factored = [i for i, group in enumerate(groups) if group.by_factors]
        self.dense_groups = [i for i, group in enumerate(groups) if not group.by_factors]
        self._base_size = sum(base_sizes[i] for i in self._factored)
        self._sizes = [sum(sizes[i] for i in self._factored) for sizes in sizes]
        self._dense_size = sum(base_sizes[i] for i in self.dense_groups)
        self._chain: deque[MergeDelta] = deque()
        self._version = version

    def append(self, merged: MergeDelta | None) -> None:
        """The next version; None if it can't be redone from factors, so that all groups go down as the base."""
        self._version += 1
        if merged is None or not self._factored:
            self._chain.clear()
            return
        self._chain.append(merged)
        while self._cost(self._chain) > self._base_size and len(self._chain) > 1:
            self._chain.popleft()

    @property
    def by_factors(self) -> bool:
        """Whether any group goes down by factors."""
        return bool(self._factored)

    def deltas_since(self, have: int) -> tuple[MergeDelta, ...] | None:
        """The merges to redo for a head whose process has version `have`; None if it must be sent the whole base."""
        if not self._factored:
            return ()
        chain = tuple(m for m in self._chain if m.version > have)
        return chain if have >= 0 and have + len(chain) == self._version else None

    def bytes_down(self, heads: Collection[int], live: int) -> int:
        """Bytes that the newest merge, of these heads, costs until all have it.

        Dense parts go to those that were merged, and their factors to all others; where heads can't redo it, those that were
        merged get the whole base.
        """
        if not self._factored:
            return self._dense_size * len(heads)
        if not self._chain:
            return (self._dense_size + self._base_size) * len(heads)
        return self._dense_size * len(heads) + sum(self._sizes[h] * max(0, live - 1) for h in heads)

    def _cost(self, chain: Collection[MergeDelta]) -> int:
        return sum(self._sizes[head] for merged in chain for head in merged.weights)


def alternative_bytes(size: int, num_heads: int, merged: int, steps: int) -> dict[str, int]:
    """Bytes that other ways of training would have sent in the place of one merge, all heads together, in fp32.

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

"""Which heads are too far behind, found without looking at all of them."""

from __future__ import annotations

import heapq


class Lagging:
    """Keeps each head's version while nothing is on its way to it.

    Args:
        most: versions that a head may be behind.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._heap: list[tuple[int, int]] = []
        self._at: dict[int, int] = {}

    def at(self, head: int, version: int) -> None:
        """The head has adopted this version, and nothing more is on its way."""
        self._at[head] = version
        heapq.heappush(self._heap, (version, head))

    def sent(self, head: int) -> None:
        """Something is on its way to the head."""
        self._at.pop(head, None)

    def behind(self, version: int) -> list[int]:
        """The heads that are more than `most` versions behind this one. They count as sent to from now on."""
        found = []
        while self._heap and version - self._heap[0][0] > self._most:
            known, head = heapq.heappop(self._heap)
            if self._at.get(head) == known:
                del self._at[head]
                found.append(head)
        return found

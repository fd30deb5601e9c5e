"""Ends the round of heads before it is full: because others need their contributions now, or because the heads must leave."""

from __future__ import annotations

from collections.abc import Iterable

from lte_ray.engine.head.head import Head


class EarlyEnd:
    """What other processes have asked of the heads of this one. The heads follow it between two steps.

    A head that is asked to end its round contributes what it has trained since its last contribution, after one step at least.
    A head that is asked to leave takes no further step. It contributes what it has trained, if anything; once the result has
    come, it has left. So nothing that it has trained is lost.

    Requests may come from any thread.

    Attributes:
        leaving: whether all heads here are to leave.
    """

    def __init__(self) -> None:
        self.leaving = False
        self._ending: set[int] = set()

    def request_leave(self) -> None:
        """Asks all heads to leave."""
        self.leaving = True

    def request_round_end(self, heads: Iterable[int]) -> None:
        """Asks these heads to end the round that they are in. Those whose contribution waits for its result have done so."""
        self._ending = set(heads)

    def interrupts(self, head: Head) -> bool:
        """Whether the head must take no further step in this round."""
        if head.outstanding:
            self._ending.discard(head.number)
        return self.leaving or (head.number in self._ending and head.steps_since_contribution > 0)

    def is_due(self, head: Head) -> bool:
        """Whether the head must contribute now, although its round isn't full."""
        return self.interrupts(head) and head.steps_since_contribution > 0 and not head.outstanding

    def record_contribution(self, head: Head) -> None:
        """The head has contributed."""
        self._ending.discard(head.number)

    def has_contributed(self, head: Head) -> bool:
        """Whether the head must leave, and all that it has trained is in a contribution."""
        return self.leaving and head.steps_since_contribution == 0

    def has_left(self, head: Head) -> bool:
        """Whether the head must leave, and its last contribution has a result."""
        return self.has_contributed(head) and not head.outstanding

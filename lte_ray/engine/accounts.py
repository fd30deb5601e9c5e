"""The numbers of the data ledger: who owns which lanes, what is on its way, and the same as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lte_ray.data.lanes import Lanes, density, disjoint, joined, ordered
from lte_ray.errors import StorageError
from lte_ray.messages import Grant


@dataclass
class Accounts:
    """What `engine.ledger.DataLedger` keeps.

    Attributes:
        merged: by head, its lanes behind the last step of its last merged contribution.
        grants: by head, those of which no merged contribution says that they are applied, the oldest first.
        waiting: heads without lanes that want some, in the order in which they came.
        asked: by head, the request to give lanes away that it has yet to answer in a merged contribution.
        honoured: by head, the newest request whose answer was carried out.
        free: lanes that nobody owns.
        latest: number of the newest grant or request; 0 if there was none.
    """

    merged: dict[int, Lanes]
    grants: dict[int, tuple[Grant, ...]] = field(default_factory=dict)
    waiting: list[int] = field(default_factory=list)
    asked: dict[int, int] = field(default_factory=dict)
    honoured: dict[int, int] = field(default_factory=dict)
    free: Lanes = ()
    latest: int = 0

    def owned(self, head: int) -> Lanes:
        """What is merged of a head, and all that it was granted since."""
        return self.reached(head, self.latest)

    def reached(self, head: int, grant: int) -> Lanes:
        """What is merged of a head, and its grants up to this number."""
        given = [lane for g in self.grants.get(head, ()) if g.id <= grant for lane in g.lanes]
        return ordered((*self.merged.get(head, ()), *given))

    def owners(self) -> dict[int, Lanes]:
        """What each head would begin from, by its number; heads without lanes aren't in it."""
        found = {head: joined(self.owned(head)) for head in sorted({*self.merged, *self.grants})}
        return {head: lanes for head, lanes in found.items() if lanes}

    def number(self) -> int:
        """The next number for a grant or a request."""
        self.latest += 1
        return self.latest

    def check(self) -> None:
        """Raises ValueError unless each slot that isn't merged is in exactly one lane."""
        lanes = [*self.free, *(lane for head in {*self.merged, *self.grants} for lane in self.owned(head))]
        if not disjoint(lanes) or density(lanes) != 1:
            raise ValueError(f"the lanes hold a batch of the data twice, or leave one out: {text(ordered(lanes))}")

    def state(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "merged": {str(head): _pairs(lanes) for head, lanes in self.merged.items()},
            "grants": {str(h): [[g.id, _pairs(g.lanes)] for g in grants] for h, grants in self.grants.items() if grants},
            "waiting": list(self.waiting),
            "asked": {str(head): number for head, number in self.asked.items()},
            "honoured": {str(head): number for head, number in self.honoured.items()},
            "free": _pairs(self.free),
            "latest": self.latest,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Accounts:
        """The accounts whose `state` this is.

        Raises:
            StorageError: it is no such state, or its lanes hold a slot twice, or leave one out.
        """
        try:
            made = cls(
                {int(head): ordered(lanes) for head, lanes in state["merged"].items()},
                {int(h): tuple(Grant(_number(i), ordered(s)) for i, s in grants) for h, grants in state["grants"].items()},
                [_number(head) for head in state["waiting"]],
                {int(head): _number(number) for head, number in state["asked"].items()},
                {int(head): _number(number) for head, number in state["honoured"].items()},
                ordered(state["free"]),
                _number(state["latest"]),
            )
            made.check()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problem = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise StorageError(
                f"The ledger of the data can't be read: {problem}. Use the checkpoint before this one."
            ) from error
        return made


def text(lanes: Lanes) -> str:
    """Lanes in words, the first eight of them."""
    shown = ", ".join(f"every {stride} from {first}" for first, stride in lanes[:8])
    return (shown or "none") + (f" and {len(lanes) - 8} more" if len(lanes) > 8 else "")


def _pairs(lanes: Iterable[tuple[int, int]]) -> list[list[int]]:
    return [list(lane) for lane in lanes]


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r} is no whole number")
    return value

"""The coordinator's ledger of the data: which batches the merged contributions hold, and who takes those that are left.

Heads come and go while contributions are on their way, so lanes change hands only by what is merged:

- A head's account is the lanes that it had behind the last step of its last merged contribution. What it trained since then
  isn't merged: if the head dies, those batches are trained again, by its successor or by who gets its lanes.
- A grant gives lanes to a head. Orders carry it until a merged contribution says that the head has applied it.
- A request takes lanes from a head. It splits its own where it stands when it is asked (`partition.split`), and its
  next contributions say what it gave away. Once one of them is merged, the batches before the split are too, and others
  get the rest.

So no slot is in two accounts, and each is merged exactly once, if the caller sees to this: once
`lanes(head)` was called, no contribution of the head's earlier incarnations is merged. If the coordinator falls back to
an earlier `state`, heads contribute again what was merged since; those that started since start anew from `lanes`, and so
does one whose contribution `check` objects to, for it may have applied a grant that the state doesn't know.

The numbers of the data ledger: who owns which lanes, what is on its way, and the same as JSON.

Lanes dealt out anew, for a run that resumes with another number of heads.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lte_ray.data.partition import Partition, Partitions, advance, continues, density, disjoint, initial, joined, ordered, split
from lte_ray.errors import StorageError
from lte_ray.messages import Assignment


@dataclass
class AssignmentState:
    """What `PartitionAssignor` keeps.

    Attributes:
        merged: by head, its lanes behind the last step of its last merged contribution.
        grants: by head, those of which no merged contribution says that they are applied, the oldest first.
        waiting: heads without lanes that want some, in the order in which they came.
        asked: by head, the request to give lanes away that it has yet to answer in a merged contribution.
        honoured: by head, the newest request whose answer was carried out.
        free: lanes that nobody owns.
        latest: number of the newest grant or request; 0 if there was none.
    """

    merged: dict[int, Partitions]
    grants: dict[int, tuple[Assignment, ...]] = field(default_factory=dict)
    waiting: list[int] = field(default_factory=list)
    asked: dict[int, int] = field(default_factory=dict)
    honoured: dict[int, int] = field(default_factory=dict)
    free: Partitions = ()
    latest: int = 0

    def owned(self, head: int) -> Partitions:
        """What is merged of a head, and all that it was granted since."""
        return self.reached(head, self.latest)

    def reached(self, head: int, grant: int) -> Partitions:
        """What is merged of a head, and its grants up to this number."""
        given = [lane for g in self.grants.get(head, ()) if g.id <= grant for lane in g.partitions]
        return ordered((*self.merged.get(head, ()), *given))

    def owners(self) -> dict[int, Partitions]:
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
            "grants": {str(h): [[g.id, _pairs(g.partitions)] for g in grants] for h, grants in self.grants.items() if grants},
            "waiting": list(self.waiting),
            "asked": {str(head): number for head, number in self.asked.items()},
            "honoured": {str(head): number for head, number in self.honoured.items()},
            "free": _pairs(self.free),
            "latest": self.latest,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> AssignmentState:
        """The accounts whose `state` this is.

        Raises:
            StorageError: it is no such state, or its lanes hold a slot twice, or leave one out.
        """
        try:
            made = cls(
                {int(head): ordered(lanes) for head, lanes in state["merged"].items()},
                {int(h): tuple(Assignment(_number(i), ordered(s)) for i, s in grants) for h, grants in state["grants"].items()},
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


def text(lanes: Partitions) -> str:
    """Lanes in words, the first eight of them."""
    shown = ", ".join(f"every {stride} from {first}" for first, stride in lanes[:8])
    return (shown or "none") + (f" and {len(lanes) - 8} more" if len(lanes) > 8 else "")


def _pairs(lanes: Iterable[tuple[int, int]]) -> list[list[int]]:
    return [list(lane) for lane in lanes]


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r} is no whole number")
    return value


def dealt(owners: Mapping[int, Partitions], free: Iterable[Partition], num_heads: int) -> dict[int, Partitions]:
    """The same slots, owned by the heads 0 to num_heads - 1; the same for the same arguments.

    - If these heads own them all, nothing changes.
    - If all slots before some K are merged and none after it, as in a run that merges at barriers, slot K + i goes to head
      (K + i) mod num_heads, as if there had never been other heads.
    - Else the lanes of heads that are left out, and free ones, are dealt out, the densest first: one to each head that has
      none, then each to the head that holds the smallest share of the slots. For a head that still has none, the
      one with the largest share gives half of its lanes (ties: the lowest number).

    Raises:
        ValueError: num_heads is below 1.
    """
    if num_heads < 1:
        raise ValueError(f"the data can't be shared out among {num_heads} heads")
    heads, left = range(num_heads), [*free]
    if not left and set(owners) == set(heads):
        return dict(owners)
    every = [*left, *(lane for lanes in owners.values() for lane in lanes)]
    if (fresh := _fresh(every, num_heads)) is not None:
        return fresh
    found = {head: owners.get(head, ()) for head in heads}
    left += [lane for head, lanes in owners.items() if head not in found for lane in lanes]
    poorest = [(bool(lanes), density(lanes), head) for head, lanes in found.items()]
    heapq.heapify(poorest)
    for lane in sorted(joined(left), key=lambda lane: (lane.stride, lane.next)):
        _, share, head = poorest[0]
        found[head] = (*found[head], lane)
        heapq.heapreplace(poorest, (True, share + density([lane]), head))
    richest = [(-share, head) for _, share, head in poorest]
    heapq.heapify(richest)
    for head in heads:
        if not found[head]:
            giver = richest[0][1]
            found[giver], found[head] = split(found[giver])
            heapq.heapreplace(richest, (-density(found[giver]), giver))
            heapq.heappush(richest, (-density(found[head]), head))
    return {head: joined(lanes) for head, lanes in found.items()}


def _fresh(lanes: list[Partition], num_heads: int) -> dict[int, Partitions] | None:
    """The lanes of `num_heads` heads from the first slot that isn't merged on; None if one after it is."""
    first = min(lane.next for lane in lanes)
    if any(lane.next - lane.stride >= first for lane in lanes):
        return None
    taken = {head: len(range(head, first, num_heads)) for head in range(num_heads)}
    return {head: advance(initial(head, num_heads), batches) for head, batches in taken.items()}


class PartitionAssignor:
    """Who has which lanes. Heads are numbers; those of grants and requests grow over the whole run.

    Args:
        heads: what each head owns; of a new run `lanes.initial`, together all slots that aren't merged yet.

    Raises:
        ValueError: the lanes hold a slot twice, or leave one out.
    """

    def __init__(self, heads: Mapping[int, Iterable[tuple[int, int]]]) -> None:
        self._accounts = AssignmentState({head: ordered(lanes) for head, lanes in heads.items()})
        self._accounts.check()

    def check(self, head: int, lanes: Iterable[tuple[int, int]], grant: int = 0, released: Assignment | None = None) -> str:
        """Why a contribution with these lanes can't be merged; empty if it can. The arguments are those of `merged`."""
        a = self._accounts
        now, before = ordered((*lanes, *self._given(head, released))), a.reached(head, grant)
        if now and continues(now, before):
            return ""
        return (
            f"head {head} trained on data that aren't its own: it has {text(now)} left, but what is merged says {text(before)}"
        )

    def merged(self, head: int, lanes: Iterable[tuple[int, int]], grant: int = 0, released: Assignment | None = None) -> None:
        """A contribution was merged.

        Args:
            head: whose it is.
            lanes: what the head had after the contributed steps, without what it has given away.
            grant: the newest grant that these lanes hold; 0 if none.
            released: the newest request that the head has answered, and the lanes that it gave away, as they were then.

        Raises:
            ValueError: the lanes don't follow from what was merged before (`check`); nothing is changed.
        """
        lanes = ordered(lanes)
        if reason := self.check(head, lanes, grant, released):
            raise ValueError(reason)
        a, given = self._accounts, self._given(head, released)
        a.merged[head] = lanes
        a.grants[head] = tuple(g for g in a.grants.get(head, ()) if g.id > grant)
        if released and given:
            a.honoured[head], a.latest = released.id, max(a.latest, released.id)
            a.asked.pop(head, None)
            a.free = joined((*a.free, *given))
            self._serve()

    def lanes(self, head: int) -> Partitions:
        """What a head that starts, or starts again, begins from; nothing if it owns nothing (yet).

        Its grants count as applied from now on, and what it gave away but wasn't merged as never given.
        """
        a = self._accounts
        if found := joined(a.owned(head)):
            a.merged[head] = found
            if applied := a.grants.pop(head, ()):  # its next contributions say so, for whoever falls back to an earlier state
                a.grants[head] = (Assignment(applied[-1].id, ()),)
        return found

    def ready(self, head: int) -> bool:
        """Whether the head owns lanes."""
        return bool(self._accounts.owned(head))

    def drop(self, head: int) -> None:
        """The head is gone for good: its lanes are free, from its last merged contribution on."""
        a = self._accounts
        a.free = joined((*a.free, *a.owned(head)))
        for record in (a.merged, a.grants, a.asked, a.honoured):
            record.pop(head, None)
        a.waiting = [other for other in a.waiting if other != head]
        self._serve()

    def admit(self, head: int, live: Collection[int]) -> None:
        """A new head wants lanes. It gets free ones, else it waits until a live head has given half of its own away.

        Which one is asked: the one with the most lanes, of these the one with the smallest sum of strides, then the lowest
        number. A head that owns lanes, or waits already, stays as it is.
        """
        if not self.ready(head) and head not in self._accounts.waiting:
            self._accounts.waiting.append(head)
        self._serve()
        self._ask(live)

    def orders(self, head: int, live: Collection[int]) -> tuple[tuple[Assignment, ...], int]:
        """What an order to this head carries.

        Free lanes that no new head waits for go to the live head with the fewest lanes (then the lowest number) in its turn.

        Args:
            head: its number.
            live: the heads that train now: only they are given free lanes and asked for lanes.

        Returns:
            The grants that it may not have applied yet, and the request to give half of its lanes away: 0 for none. A head
            applies a grant, and answers a request, once for each number.
        """
        a = self._accounts
        self._serve()
        self._ask(live)
        if a.free and head in live:
            fewest = min(((len(a.owned(other)), other) for other in live if other != head), default=(math.inf, 0))
            mine, taken = len(a.owned(head)), 0
            while taken < len(a.free) and (mine + taken, head) < fewest:
                taken += 1
            if taken:
                self._grant(head, a.free[:taken])
                a.free = a.free[taken:]
        return a.grants.get(head, ()), a.asked.get(head, 0)

    @property
    def heads(self) -> set[int]:
        """The heads that own lanes, or wait for some."""
        a = self._accounts
        return {*a.merged, *a.grants, *a.waiting}

    @property
    def free(self) -> Partitions:
        """The lanes that nobody owns."""
        return self._accounts.free

    def state(self) -> dict[str, Any]:
        """All of it, for JSON; `from_state` reads it."""
        return self._accounts.state()

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> PartitionAssignor:
        """The ledger whose `state` this is.

        Raises:
            StorageError: it is no such state, or its lanes hold a slot twice, or leave one out.
        """
        made = cls.__new__(cls)
        made._accounts = AssignmentState.from_state(state)
        return made

    def _given(self, head: int, released: Assignment | None) -> Partitions:
        """What a contribution gives away; nothing if it tells of an answer that was carried out before."""
        return ordered(released.partitions) if released and released.id > self._accounts.honoured.get(head, 0) else ()

    def _grant(self, head: int, lanes: Partitions) -> None:
        a = self._accounts
        a.grants[head] = (*a.grants.get(head, ()), Assignment(a.number(), lanes))

    def _serve(self) -> None:
        """Shares the free lanes out among the heads that wait; where they aren't enough, the first get one each."""
        if served := (a := self._accounts).waiting[: len(a.free)]:
            for index, head in enumerate(served):
                self._grant(head, a.free[index :: len(served)])
            a.waiting, a.free = a.waiting[len(served) :], ()

    def _ask(self, live: Collection[int]) -> None:
        """As many live heads are asked for lanes as heads wait. Requests stand until they are answered, for the head may have
        split its lanes already; what isn't needed any more becomes free."""
        a = self._accounts
        able: dict[int, Partitions] | None = None
        while sum(head in live for head in a.asked) < len(a.waiting):
            able = able or {head: a.owned(head) for head in live}
            ranks = [(-len(s), sum(lane.stride for lane in s), head) for head, s in able.items() if s and head not in a.asked]
            if not ranks:
                break
            a.asked[min(ranks)[2]] = a.number()


def reshard(state: Mapping[str, Any], num_heads: int) -> PartitionAssignor:
    """The ledger of a run that resumes with the heads 0 to num_heads - 1: all of them start anew from `lanes`.

    The same heads keep their lanes, so that such a run goes on exactly as it was; else see `dealing.dealt`.

    Raises:
        StorageError: it is no state of a ledger.
        ValueError: num_heads is below 1.
    """
    accounts = AssignmentState.from_state(state)
    made = PartitionAssignor(dealt(accounts.owners(), accounts.free, num_heads))
    made._accounts.latest = accounts.latest
    return made

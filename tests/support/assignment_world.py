"""Heads that obey the data ledger's orders, and a world in which anything may happen to them; with numbers only."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from lte_ray.data.assignment import PartitionAssignor
from lte_ray.data.partition import Partitions, advance, initial_partitions, slots, split, to_partitions
from lte_ray.messages import Assignment

EVENTS = ["step", "contribute", "merge", "refuse", "order", "kill", "restart", "drop", "admit", "reshard", "commit", "crash"]


@dataclass
class Sent:
    """A contribution: the slots that it holds end at `until` of all that its head has trained."""

    until: int
    lanes: Partitions
    grant: int
    released: Assignment | None


@dataclass
class Head:
    """One incarnation of a head: what it owns, has trained, and how much of that was merged."""

    lanes: Partitions
    grant: int = 0
    released: Assignment | None = None
    trained: list[int] = field(default_factory=list)
    merged: int = 0
    sent: Sent | None = None

    def step(self, batches: int) -> None:
        if self.lanes:
            self.trained += itertools.islice(slots(self.lanes), batches)
            self.lanes = advance(self.lanes, batches)

    def contribute(self) -> None:
        if self.sent is None and self.lanes:
            self.sent = Sent(len(self.trained), self.lanes, self.grant, self.released)

    def obey(self, grants: tuple[Assignment, ...], request: int) -> None:
        for grant in grants:
            if grant.id > self.grant:
                self.grant, self.lanes = grant.id, to_partitions((*self.lanes, *grant.partitions))
        if request > (self.released.id if self.released else 0) and self.lanes:
            self.lanes, given = split(self.lanes)
            self.released = Assignment(request, given)


def ledger(num_heads: int) -> PartitionAssignor:
    """A new run's."""
    return PartitionAssignor({head: initial_partitions(head, num_heads) for head in range(num_heads)})


class World:
    """A coordinator's ledger, the heads that run, and every slot that was merged."""

    def __init__(self, num_heads: int) -> None:
        self.ledger = ledger(num_heads)
        self.heads = {head: Head(self.ledger.start_head(head)) for head in range(num_heads)}
        self.down: set[int] = set()
        self.merged: list[int] = []
        self.numbers = itertools.count(num_heads)
        self.commit()

    @property
    def live(self) -> set[int]:
        return set(self.heads)

    def do(self, event: str, pick: int, amount: int) -> None:
        """One event; where it needs a head, the `pick`-th of those that there are."""
        known = sorted(self.heads if event in EVENTS[:6] else self.down if event == "restart" else self.live | self.down)
        if event in ("admit", "reshard", "commit", "crash"):
            getattr(self, event)(*([1 + amount % 6] if event == "reshard" else []))
        elif known:
            head = known[pick % len(known)]
            getattr(self, event)(*([head, amount] if event == "step" else [head]))
        self.check()

    def step(self, head: int, batches: int) -> None:
        self.heads[head].step(batches)

    def contribute(self, head: int) -> None:
        self.heads[head].contribute()

    def merge(self, head: int) -> None:
        """What the head has sent is merged; where it doesn't fit the ledger, the head starts anew."""
        it = self.heads[head]
        sent, it.sent = it.sent, None
        if sent is None:
            return
        if self.ledger.mismatch(head, sent.lanes, sent.grant, sent.released):
            self.kill(head)
            self.restart(head)
            return
        self.ledger.commit(head, sent.lanes, sent.grant, sent.released)
        self.merged += it.trained[it.merged : sent.until]
        it.merged = sent.until

    def refuse(self, head: int) -> None:
        self.heads[head].sent = None

    def order(self, head: int) -> None:
        self.heads[head].obey(*self.ledger.pending_changes(head, self.live))

    def kill(self, head: int) -> None:
        del self.heads[head]
        self.down.add(head)

    def restart(self, head: int) -> None:
        self.down.discard(head)
        self.ledger.add_head(head, self.live)
        self.heads[head] = Head(self.ledger.start_head(head))

    def drop(self, head: int) -> None:
        self.heads.pop(head, None)
        self.down.discard(head)
        self.ledger.remove_head(head)

    def admit(self) -> None:
        self.restart(next(self.numbers))

    def reshard(self, num_heads: int) -> None:
        self.ledger = PartitionAssignor.repartitioned(json.loads(json.dumps(self.ledger.state())), num_heads)
        self.heads, self.down = {head: Head(self.ledger.start_head(head)) for head in range(num_heads)}, set()
        self.commit()  # what a resumed run begins with

    def commit(self) -> None:
        state = json.loads(json.dumps(self.ledger.state()))
        self.committed: Any = state, len(self.merged), {n: (head, head.merged) for n, head in self.heads.items()}

    def crash(self) -> None:
        """The coordinator is lost, with all merges since its last commit. Heads that were there then contribute again."""
        state, merged, heads = self.committed
        self.ledger = PartitionAssignor.from_state(state)
        del self.merged[merged:]
        for number, head in list(self.heads.items()):
            head.sent = None
            if number in heads and heads[number][0] is head:
                head.merged = heads[number][1]
            else:
                self.kill(number)
        known = {*map(int, state["merged"]), *map(int, state["grants"]), *state["waiting"]}
        for number in known - self.live - self.down:
            self.ledger.remove_head(number)

    def check(self) -> None:
        """No slot was merged twice, none is lost, and the accounts are whole."""
        assert not [slot for slot, count in Counter(self.merged).items() if count > 1]
        self.ledger.validate()
        left = [*self.ledger.unassigned, *(lane for lanes in self.ledger.owners().values() for lane in lanes)]
        end = 1 + max([lane.start for lane in left] + self.merged)
        open_ = {slot for lane in left for slot in range(lane.start, end, lane.stride)}
        assert open_ | set(self.merged) == set(range(end))
        assert open_.isdisjoint(self.merged)

    def settle(self) -> None:
        """All heads are up, and merge all that they train, until nobody waits for lanes."""
        for head in sorted(self.down):
            self.restart(head)
        if not self.heads:
            self.admit()
        for _ in range(4 * len(self.heads) + 8):
            for head in sorted(self.heads):
                self.order(head)
                self.step(head, 3)
                self.contribute(head)
                self.merge(head)
                self.check()

"""A model of heads that apply assignments and revocations, to which anything may happen; with numbers only."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from lte_ray.data.assignment import PartitionAssignor
from lte_ray.data.partition import Partitions, advance, initial_partitions, slots, split, to_partitions
from lte_ray.messages import Assignment

EVENTS = [
    "step",
    "contribute",
    "merge",
    "refuse",
    "direct",
    "kill",
    "restart",
    "remove",
    "add",
    "repartition",
    "commit",
    "crash",
]


@dataclass
class SentContribution:
    """A contribution: of all slots that its head has trained, it includes those up to index `until`."""

    until: int
    partitions: Partitions
    assignment_id: int
    revoked: Assignment | None


@dataclass
class WorldHead:
    """One incarnation of a head: its partitions, the slots that it has trained, and how many of these are merged."""

    partitions: Partitions
    assignment_id: int = 0
    revoked: Assignment | None = None
    trained: list[int] = field(default_factory=list)
    merged: int = 0
    sent: SentContribution | None = None

    def step(self, batches: int) -> None:
        if self.partitions:
            self.trained += itertools.islice(slots(self.partitions), batches)
            self.partitions = advance(self.partitions, batches)

    def contribute(self) -> None:
        if self.sent is None and self.partitions:
            self.sent = SentContribution(len(self.trained), self.partitions, self.assignment_id, self.revoked)

    def apply_changes(self, assignments: tuple[Assignment, ...], revocation: int) -> None:
        for assignment in assignments:
            if assignment.id > self.assignment_id:
                self.assignment_id = assignment.id
                self.partitions = to_partitions((*self.partitions, *assignment.partitions))
        if revocation > (self.revoked.id if self.revoked else 0) and self.partitions:
            self.partitions, given_up = split(self.partitions)
            self.revoked = Assignment(revocation, given_up)


def new_assignor(num_heads: int) -> PartitionAssignor:
    """Returns the assignor of a new run."""
    return PartitionAssignor({head: initial_partitions(head, num_heads) for head in range(num_heads)})


class AssignmentWorld:
    """A coordinator's assignor, the running heads, and all merged slots."""

    def __init__(self, num_heads: int) -> None:
        self.assignor = new_assignor(num_heads)
        self.heads = {head: WorldHead(self.assignor.start_head(head)) for head in range(num_heads)}
        self.down: set[int] = set()
        self.merged: list[int] = []
        self.numbers = itertools.count(num_heads)
        self.commit()

    @property
    def live(self) -> set[int]:
        return set(self.heads)

    def play(self, event: str, pick: int, amount: int) -> None:
        """Plays one event; if it needs a head, for the `pick`-th of those available."""
        known = sorted(self.heads if event in EVENTS[:6] else self.down if event == "restart" else self.live | self.down)
        if event in ("add", "repartition", "commit", "crash"):
            getattr(self, event)(*([1 + amount % 6] if event == "repartition" else []))
        elif known:
            head = known[pick % len(known)]
            getattr(self, event)(*([head, amount] if event == "step" else [head]))
        self.check()

    def step(self, head: int, batches: int) -> None:
        self.heads[head].step(batches)

    def contribute(self, head: int) -> None:
        self.heads[head].contribute()

    def merge(self, head: int) -> None:
        """Merges what the head has sent; if that doesn't match the assignor's state, restarts the head."""
        incarnation = self.heads[head]
        sent, incarnation.sent = incarnation.sent, None
        if sent is None:
            return
        if self.assignor.mismatch(head, sent.partitions, sent.assignment_id, sent.revoked):
            self.kill(head)
            self.restart(head)
            return
        self.assignor.commit(head, sent.partitions, sent.assignment_id, sent.revoked)
        self.merged += incarnation.trained[incarnation.merged : sent.until]
        incarnation.merged = sent.until

    def refuse(self, head: int) -> None:
        self.heads[head].sent = None

    def direct(self, head: int) -> None:
        self.heads[head].apply_changes(*self.assignor.pending_changes(head, self.live))

    def kill(self, head: int) -> None:
        del self.heads[head]
        self.down.add(head)

    def restart(self, head: int) -> None:
        self.down.discard(head)
        self.assignor.add_head(head, self.live)
        self.heads[head] = WorldHead(self.assignor.start_head(head))

    def remove(self, head: int) -> None:
        self.heads.pop(head, None)
        self.down.discard(head)
        self.assignor.remove_head(head)

    def add(self) -> None:
        self.restart(next(self.numbers))

    def repartition(self, num_heads: int) -> None:
        self.assignor = PartitionAssignor.repartitioned(json.loads(json.dumps(self.assignor.state())), num_heads)
        self.heads, self.down = {head: WorldHead(self.assignor.start_head(head)) for head in range(num_heads)}, set()
        self.commit()  # what a resumed run begins with

    def commit(self) -> None:
        state = json.loads(json.dumps(self.assignor.state()))
        self.committed: Any = state, len(self.merged), {n: (head, head.merged) for n, head in self.heads.items()}

    def crash(self) -> None:
        """Loses the coordinator with all merges since its last commit. Heads from before it contribute again."""
        state, merged, heads = self.committed
        self.assignor = PartitionAssignor.from_state(state)
        del self.merged[merged:]
        for number, head in list(self.heads.items()):
            head.sent = None
            if number in heads and heads[number][0] is head:
                head.merged = heads[number][1]
            else:
                self.kill(number)
        known = {*map(int, state["merged"]), *map(int, state["grants"]), *state["waiting"]}
        for number in known - self.live - self.down:
            self.assignor.remove_head(number)

    def check(self) -> None:
        """Asserts that no slot was merged twice, none is lost, and the state is consistent."""
        assert not [slot for slot, count in Counter(self.merged).items() if count > 1]
        self.assignor.validate()
        left = [*self.assignor.unassigned, *(p for partitions in self.assignor.owners().values() for p in partitions)]
        end = 1 + max([p.start for p in left] + self.merged)
        unmerged = {slot for p in left for slot in range(p.start, end, p.stride)}
        assert unmerged | set(self.merged) == set(range(end))
        assert unmerged.isdisjoint(self.merged)

    def settle(self) -> None:
        """Starts all heads and merges all that they train, until no head waits for partitions."""
        for head in sorted(self.down):
            self.restart(head)
        if not self.heads:
            self.add()
        for _ in range(4 * len(self.heads) + 8):
            for head in sorted(self.heads):
                self.direct(head)
                self.step(head, 3)
                self.contribute(head)
                self.merge(head)
                self.check()

"""The assignment of the data order's partitions to heads: which batches are merged, and which head trains the others.

Heads come and go while contributions are in flight, so ownership changes only through merged contributions:

- A head's committed partitions are those that it had after the last step of its last merged contribution. What it has trained
  since then isn't merged: if the head dies, those batches are trained again, by its successor or by the partitions' new owner.
- An assignment gives partitions to a head. Directives repeat it until a merged contribution shows that the head applied it.
- A revocation asks a head to give up half of its partitions. The head splits them at its current position
  (`partition.split`), and its next contributions carry what it gave up. Once one of them is merged, so are the batches before
  the split, and the rest becomes available to other heads.

So no slot is owned twice and each is merged exactly once, provided that the caller merges no contribution of an earlier
incarnation of a head after calling `start_head(head)`. If the coordinator falls back to an earlier `state`, heads contribute
again what was merged since then. Heads that started since then restart from `start_head`, and so does a head whose
contribution `mismatch` rejects, since it may have applied an assignment that the state doesn't contain.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lte_ray.data.partition import (
    Partition,
    Partitions,
    advance,
    are_disjoint,
    coalesce,
    density,
    initial_partitions,
    is_continuation,
    split,
    to_partitions,
)
from lte_ray.errors import StorageError
from lte_ray.messages import Assignment


@dataclass
class AssignmentState:
    """The state of a `PartitionAssignor`, and its form as JSON.

    Attributes:
        committed: by head, its partitions after the last step of its last merged contribution.
        assignments: by head, those that no merged contribution shows as applied yet, oldest first.
        waiting: heads that want partitions and have none, in the order in which they came.
        revocations: by head, the revocation that no merged contribution has answered yet.
        answered: by head, the newest revocation whose answer was carried out.
        unassigned: partitions that no head owns.
        last_id: the newest number of an assignment or revocation; 0 before the first.
    """

    committed: dict[int, Partitions]
    assignments: dict[int, tuple[Assignment, ...]] = field(default_factory=dict)
    waiting: list[int] = field(default_factory=list)
    revocations: dict[int, int] = field(default_factory=dict)
    answered: dict[int, int] = field(default_factory=dict)
    unassigned: Partitions = ()
    last_id: int = 0

    def partitions_of(self, head: int) -> Partitions:
        """Returns a head's committed partitions and all that it was assigned since."""
        return self.partitions_up_to(head, self.last_id)

    def partitions_up_to(self, head: int, assignment_id: int) -> Partitions:
        """Returns a head's committed partitions and its assignments up to this number."""
        assigned = [p for a in self.assignments.get(head, ()) if a.id <= assignment_id for p in a.partitions]
        return to_partitions((*self.committed.get(head, ()), *assigned))

    def owners(self) -> dict[int, Partitions]:
        """Returns what each head would start with, by its number; omits heads without partitions."""
        by_head = {head: coalesce(self.partitions_of(head)) for head in sorted({*self.committed, *self.assignments})}
        return {head: partitions for head, partitions in by_head.items() if partitions}

    def next_id(self) -> int:
        """Returns a new number for an assignment or a revocation."""
        self.last_id += 1
        return self.last_id

    def validate(self) -> None:
        """Raises ValueError unless each slot that isn't merged is in exactly one partition."""
        heads = {*self.committed, *self.assignments}
        partitions = [*self.unassigned, *(p for head in heads for p in self.partitions_of(head))]
        if not are_disjoint(partitions) or density(partitions) != 1:
            described = describe_partitions(to_partitions(partitions))
            raise ValueError(f"the partitions contain a batch of the data twice, or omit one: {described}")

    def to_json(self) -> dict[str, Any]:
        """Returns the state as JSON data."""
        return {
            "merged": {str(head): _pairs(partitions) for head, partitions in self.committed.items()},
            "grants": {
                str(head): [[a.id, _pairs(a.partitions)] for a in every] for head, every in self.assignments.items() if every
            },
            "waiting": list(self.waiting),
            "asked": {str(head): number for head, number in self.revocations.items()},
            "honoured": {str(head): number for head, number in self.answered.items()},
            "free": _pairs(self.unassigned),
            "latest": self.last_id,
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> AssignmentState:
        """Reads what `to_json` returned.

        Raises:
            StorageError: the data isn't such a state, or its partitions contain a slot twice or omit one.
        """
        try:
            restored = cls(
                {int(head): to_partitions(pairs) for head, pairs in state["merged"].items()},
                {
                    int(head): tuple(Assignment(_integer(number), to_partitions(pairs)) for number, pairs in every)
                    for head, every in state["grants"].items()
                },
                [_integer(head) for head in state["waiting"]],
                {int(head): _integer(number) for head, number in state["asked"].items()},
                {int(head): _integer(number) for head, number in state["honoured"].items()},
                to_partitions(state["free"]),
                _integer(state["latest"]),
            )
            restored.validate()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problem = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise StorageError(
                f"The assignment of the data to heads can't be read: {problem}. Use the checkpoint before this one."
            ) from error
        return restored


class PartitionAssignor:
    """Decides which head owns which partitions. The numbers of assignments and revocations increase over the entire run.

    Args:
        heads: the partitions of each head, together all slots that aren't merged yet; in a new run, `initial_partitions`.

    Raises:
        ValueError: the partitions contain a slot twice, or omit one.
    """

    def __init__(self, heads: Mapping[int, Iterable[tuple[int, int]]]) -> None:
        self._state = AssignmentState({head: to_partitions(pairs) for head, pairs in heads.items()})
        self._state.validate()

    @property
    def heads(self) -> set[int]:
        """The heads that own partitions or wait for some."""
        state = self._state
        return {*state.committed, *state.assignments, *state.waiting}

    @property
    def unassigned(self) -> Partitions:
        """The partitions that no head owns."""
        return self._state.unassigned

    def owners(self) -> dict[int, Partitions]:
        """Returns what each head would start with, by its number; omits heads without partitions."""
        return self._state.owners()

    def has_partitions(self, head: int) -> bool:
        """Returns whether the head owns partitions."""
        return bool(self._state.partitions_of(head))

    def validate(self) -> None:
        """Raises ValueError unless each slot that isn't merged is in exactly one partition."""
        self._state.validate()

    def start_head(self, head: int) -> Partitions:
        """Returns the partitions with which a head starts or restarts; none if it owns none (yet).

        From now on, its assignments count as applied, and what it gave up in contributions that weren't merged as still owned.
        """
        state = self._state
        if partitions := coalesce(state.partitions_of(head)):
            state.committed[head] = partitions
            if applied := state.assignments.pop(head, ()):
                # The head's next contributions name this number, so a coordinator that falls back to an earlier state sees it.
                state.assignments[head] = (Assignment(applied[-1].id, ()),)
        return partitions

    def add_head(self, head: int, live: Collection[int]) -> None:
        """Gives a new head unassigned partitions; without any, it waits until a live head has given up half of its own.

        The revocation goes to the live head with the most partitions; of those, to the one with the smallest sum of strides,
        then to the lowest number. Nothing changes for a head that owns partitions or waits already.
        """
        if not self.has_partitions(head) and head not in self._state.waiting:
            self._state.waiting.append(head)
        self._serve_waiting()
        self._revoke(live)

    def remove_head(self, head: int) -> None:
        """Frees the partitions of a head that won't return, from its last merged contribution on."""
        state = self._state
        state.unassigned = coalesce((*state.unassigned, *state.partitions_of(head)))
        for by_head in (state.committed, state.assignments, state.revocations, state.answered):
            by_head.pop(head, None)
        state.waiting = [other for other in state.waiting if other != head]
        self._serve_waiting()

    def pending_changes(self, head: int, live: Collection[int]) -> tuple[tuple[Assignment, ...], int]:
        """Returns the changes for the head's next directive.

        Unassigned partitions that no new head waits for go to the live head with the fewest partitions, then to the lowest
        number, when it asks.

        Args:
            head: its number.
            live: the heads that train now: only they get unassigned partitions and revocations.

        Returns:
            The assignments that the head may not have applied yet, and the number of a revocation, 0 for none. A head applies
            an assignment, and answers a revocation, once for each number.
        """
        state = self._state
        self._serve_waiting()
        self._revoke(live)
        if state.unassigned and head in live:
            fewest = min(((len(state.partitions_of(other)), other) for other in live if other != head), default=(math.inf, 0))
            owned, taken = len(state.partitions_of(head)), 0
            while taken < len(state.unassigned) and (owned + taken, head) < fewest:
                taken += 1
            if taken:
                self._assign(head, state.unassigned[:taken])
                state.unassigned = state.unassigned[taken:]
        return state.assignments.get(head, ()), state.revocations.get(head, 0)

    def mismatch(
        self, head: int, partitions: Iterable[tuple[int, int]], assignment_id: int = 0, revoked: Assignment | None = None
    ) -> str:
        """Returns why a contribution with these partitions can't be merged; empty if it can. Takes `commit`'s arguments."""
        after = to_partitions((*partitions, *self._given_up(head, revoked)))
        before = self._state.partitions_up_to(head, assignment_id)
        if after and is_continuation(after, before):
            return ""
        return (
            f"head {head} trained on data that aren't its own: it has {describe_partitions(after)} left, but what is merged "
            f"says {describe_partitions(before)}"
        )

    def commit(
        self, head: int, partitions: Iterable[tuple[int, int]], assignment_id: int = 0, revoked: Assignment | None = None
    ) -> None:
        """Records that a contribution was merged.

        Args:
            head: the head that made it.
            partitions: the head's partitions after the contributed steps, without those that it gave up.
            assignment_id: the newest assignment that these partitions include; 0 if none.
            revoked: the newest revocation that the head has answered, and the partitions that it gave up, as they were then.

        Raises:
            ValueError: the partitions don't follow from what was merged before (`mismatch`); nothing is changed.
        """
        after = to_partitions(partitions)
        if reason := self.mismatch(head, after, assignment_id, revoked):
            raise ValueError(reason)
        state, given_up = self._state, self._given_up(head, revoked)
        state.committed[head] = after
        state.assignments[head] = tuple(a for a in state.assignments.get(head, ()) if a.id > assignment_id)
        if revoked and given_up:
            state.answered[head], state.last_id = revoked.id, max(state.last_id, revoked.id)
            state.revocations.pop(head, None)
            state.unassigned = coalesce((*state.unassigned, *given_up))
            self._serve_waiting()

    def state(self) -> dict[str, Any]:
        """Returns the state as JSON data, for `from_state`."""
        return self._state.to_json()

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> PartitionAssignor:
        """Restores what `state` returned.

        Raises:
            StorageError: the data isn't such a state, or its partitions contain a slot twice or omit one.
        """
        restored = cls.__new__(cls)
        restored._state = AssignmentState.from_json(state)
        return restored

    @classmethod
    def repartitioned(cls, state: Mapping[str, Any], num_heads: int) -> PartitionAssignor:
        """Restores `state` for the heads 0 to num_heads - 1, each of which restarts with `start_head`.

        The same heads keep their partitions, so that their run continues exactly as it was; else see `repartition`.

        Raises:
            StorageError: as `from_state`.
            ValueError: num_heads is below 1.
        """
        before = AssignmentState.from_json(state)
        restored = cls(repartition(before.owners(), before.unassigned, num_heads))
        restored._state.last_id = before.last_id
        return restored

    def _given_up(self, head: int, revoked: Assignment | None) -> Partitions:
        """Returns what a contribution gives up; nothing if the answer to that revocation was carried out before."""
        return to_partitions(revoked.partitions) if revoked and revoked.id > self._state.answered.get(head, 0) else ()

    def _assign(self, head: int, partitions: Partitions) -> None:
        state = self._state
        state.assignments[head] = (*state.assignments.get(head, ()), Assignment(state.next_id(), partitions))

    def _serve_waiting(self) -> None:
        """Distributes the unassigned partitions over the waiting heads; if there are too few, the first heads get one each."""
        state = self._state
        if served := state.waiting[: len(state.unassigned)]:
            for index, head in enumerate(served):
                self._assign(head, state.unassigned[index :: len(served)])
            state.waiting, state.unassigned = state.waiting[len(served) :], ()

    def _revoke(self, live: Collection[int]) -> None:
        """Revokes partitions of as many live heads as wait for some.

        Revocations stand until they are answered, since the head may have split its partitions already. What turns out not to
        be needed becomes unassigned.
        """
        state = self._state
        candidates: dict[int, Partitions] | None = None
        while sum(head in live for head in state.revocations) < len(state.waiting):
            candidates = candidates or {head: state.partitions_of(head) for head in live}
            ranked = [
                (-len(partitions), sum(p.stride for p in partitions), head)
                for head, partitions in candidates.items()
                if partitions and head not in state.revocations
            ]
            if not ranked:
                break
            state.revocations[min(ranked)[2]] = state.next_id()


def repartition(owners: Mapping[int, Partitions], unassigned: Iterable[Partition], num_heads: int) -> dict[int, Partitions]:
    """Redistributes partitions over the heads 0 to num_heads - 1, deterministically.

    - If these heads own all of them, nothing changes.
    - If all slots before some K are merged and none after it, as in a run that merges at barriers, slot K + i goes to head
      (K + i) mod num_heads, as if there had never been other heads.
    - Else the unassigned partitions and those of removed heads are distributed, the densest first: one to each head without
      any, then each to the head that owns the smallest fraction of the slots. To a head that is still without any, the head
      with the largest fraction gives half of its partitions (ties: the lowest number).

    Raises:
        ValueError: num_heads is below 1.
    """
    if num_heads < 1:
        raise ValueError(f"the data can't be distributed over {num_heads} heads")
    heads, available = range(num_heads), [*unassigned]
    if not available and set(owners) == set(heads):
        return dict(owners)
    every = [*available, *(p for partitions in owners.values() for p in partitions)]
    if (restarted := _restart_at_barrier(every, num_heads)) is not None:
        return restarted
    by_head = {head: owners.get(head, ()) for head in heads}
    available += [p for head, partitions in owners.items() if head not in by_head for p in partitions]
    poorest = [(bool(partitions), density(partitions), head) for head, partitions in by_head.items()]
    heapq.heapify(poorest)
    for partition in sorted(coalesce(available), key=lambda p: (p.stride, p.start)):
        _, fraction, head = poorest[0]
        by_head[head] = (*by_head[head], partition)
        heapq.heapreplace(poorest, (True, fraction + density([partition]), head))
    richest = [(-fraction, head) for _, fraction, head in poorest]
    heapq.heapify(richest)
    for head in heads:
        if not by_head[head]:
            giver = richest[0][1]
            by_head[giver], by_head[head] = split(by_head[giver])
            heapq.heapreplace(richest, (-density(by_head[giver]), giver))
            heapq.heappush(richest, (-density(by_head[head]), head))
    return {head: coalesce(partitions) for head, partitions in by_head.items()}


def _restart_at_barrier(partitions: list[Partition], num_heads: int) -> dict[int, Partitions] | None:
    """Returns the partitions of `num_heads` heads from the first unmerged slot on; None if a later slot is merged."""
    first = min(p.start for p in partitions)
    if any(p.start - p.stride >= first for p in partitions):
        return None
    taken = {head: len(range(head, first, num_heads)) for head in range(num_heads)}
    return {head: advance(initial_partitions(head, num_heads), batches) for head, batches in taken.items()}


def describe_partitions(partitions: Partitions) -> str:
    """Describes partitions in words, up to eight of them."""
    shown = ", ".join(f"every {stride} from {start}" for start, stride in partitions[:8])
    return (shown or "none") + (f" and {len(partitions) - 8} more" if len(partitions) > 8 else "")


def _pairs(partitions: Iterable[tuple[int, int]]) -> list[list[int]]:
    return [list(partition) for partition in partitions]


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r} isn't an integer")
    return value

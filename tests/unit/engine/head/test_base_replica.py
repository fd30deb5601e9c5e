"""Heads that redo merges, from factors or by changes, have the coordinator's base bit for bit, or detect that they don't."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from lte_ray.config import MergeConfig
from lte_ray.engine.coordinator.broadcast_log import BroadcastLog
from lte_ray.engine.coordinator.coordinator import Coordinator
from lte_ray.engine.head.base_replica import BaseReplica, CannotRedoMerges
from lte_ray.layout import Plan
from lte_ray.merging import Decision, Merge, MergeChange, Pending, Roster, Wait
from lte_ray.merging.flat_buffer import gather, views
from lte_ray.messages import CHECKSUM_INTERVAL, Contribution, CoordinatorReply, MergeDelta
from lte_ray.transfer.checksum import base_checksum
from lte_ray.transfer.codec import Codec
from lte_ray.transfer.groups import make_groups
from tests.support.base_shards import outer_step
from tests.support.plans import plan_from_shapes, random_flat
from tests.support.tiny_worker import make_settings

HEADS = 3


class Whims:
    """Merges pending contributions as the test says, with a step or without, or adds a change of its own."""

    action = "merge"

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        if not pending or self.action == "wait":
            return Wait("for the test", until=roster.now + 1e9)
        if self.action == "change":
            return MergeChange(random_flat(roster.layout.size, roster.version).float(), [p.head for p in pending])
        return Merge(
            {p.head: 0.3 + 0.1 * p.head for p in pending}, outer_step(roster.version) if self.action == "step" else None
        )


class CoordinatorSide:
    """The coordinator's side without processes: handles are the tensors themselves."""

    def __init__(self, merge: MergeConfig, plans: Sequence[Plan], reset: str = "none") -> None:
        settings = make_settings(heads=len(plans), reset=reset)
        self.settings = dataclasses.replace(settings, merge=merge)
        self.policy, self.groups = Whims(), make_groups(plans, merge)
        base = random_flat(plans[0].base.size, 1).float()
        self.coordinator = Coordinator(self.settings, plans[0], base, self.policy, plans=plans)
        self.codecs = [Codec(plan, self.groups, merge) for plan in plans]
        sizes = [part.base.size * 4 for part in self.codecs[0].group_plans]
        buffers, changes = [codec.buffer_sizes for codec in self.codecs], self.codecs[0].change_sizes
        self.broadcast_log = BroadcastLog(self.groups, sizes, buffers, 0, change_sizes=changes)
        self.buffers: dict[int, tuple[Tensor, ...]] = {}
        self.sequence = 0
        self.incarnations = [0] * len(plans)

    def start_fresh(self, head: int) -> None:
        """A new process of this head starts with B = 0: the reference that others keep of the one before is void."""
        self.incarnations[head] += 1
        assert self.coordinator.join(head, self.incarnations[head], fresh=True)

    def contribute(self, head: int, action: str = "merge") -> None:
        plan, self.sequence = self.coordinator.plans[head], self.sequence + 1
        self.policy.action = action
        flat, reference = random_flat(plan.contribution.size, self.sequence).float(), self.coordinator.reference(head)
        self.buffers[head], decoded = self.codecs[head].encode(flat, reference)
        contribution = Contribution(
            "test", head, self.incarnations[head], self.sequence, self.coordinator.version, 1, 1, 1, 0.5
        )
        for record in self.coordinator.receive(contribution, decoded).merges:
            buffers = {h: self.buffers[h] for h in record.heads}
            changes = self.changes() if self.broadcast_log.by_changes else {}
            merged = MergeDelta(record.version, record.weights, buffers, record.fresh, record.outer_step, changes)
            self.broadcast_log.append(merged if record.weights or changes else None)

    def changes(self) -> dict[int, Tensor]:
        """The newest version's change, as it is sent; the coordinator here has one group."""
        change = self.coordinator.base_weights.read(lambda newest: newest.change)
        return {} if change is None else {0: change}

    def make_reply(self, redo_from: int, checked: bool = True) -> CoordinatorReply:
        base, version, momentum = self.coordinator.base.clone(), self.coordinator.version, self.momentum()
        chain = self.broadcast_log.deltas_since(redo_from)
        parts = {
            i: self.part(i, base) for i in (self.broadcast_log.dense_groups if chain is not None else range(len(self.groups)))
        }
        held = {h: r for h in range(HEADS) if (r := self.coordinator.reference(h)) is not None} if chain is None else {}
        momenta = {}
        if chain is None and momentum is not None:
            momenta = {i: self.part(i, momentum) for i in self.broadcast_log.factored_groups}
        flats = [base] if momentum is None else [base, momentum]
        redone = [self.part(i, flat) for i in self.broadcast_log.redone_groups for flat in flats]
        sums = (version, sum(map(base_checksum, redone)) % 2**64) if checked else None
        return CoordinatorReply(None, version, parts, chain or (), held, momenta, checksum=sums)

    def momentum(self) -> Tensor | None:
        return self.coordinator.base_weights.read(lambda newest: None if newest.momentum is None else newest.momentum.clone())

    def part(self, index: int, base: Tensor) -> Tensor:
        return gather(self.codecs[0].group_plans[index].base, views(self.codecs[0].plan.base, base))

    def replica(self, reset: str = "none") -> BaseReplica:
        return BaseReplica(self.codecs, reset, lambda handle: handle)


def follow(replica: BaseReplica, reply: CoordinatorReply) -> Tensor | None:
    base = replica.acquire(reply)
    if base is not None:
        replica.release()
    return base


def assert_same_momentum(replica: BaseReplica, side: CoordinatorSide) -> None:
    """In the groups that are redone from factors; the replica knows no other."""
    momentum, expected = replica.read(lambda base, momentum: momentum), side.momentum()
    if expected is None:
        assert momentum is None
        return
    for index, group in enumerate(side.groups):
        if momentum is None:
            assert not group.by_factors
        else:
            part = side.part(index, momentum)
            assert torch.equal(part, side.part(index, expected)) if group.by_factors else not part.any()


def plans_of(ranks: Sequence[int]) -> list[Plan]:
    return [plan_from_shapes([(24, 20, r), (6, 40, r), (16, 16, r)], [(5,), (3, 2)]) for r in ranks]


events = st.lists(
    st.tuples(st.integers(0, HEADS - 1), st.sampled_from(["merge", "step", "step", "wait", "change", "fresh"])), max_size=30
)


@given(
    events,
    st.sampled_from(["auto", "factors", "dense", "bf16", "int8"]),
    st.sampled_from(["fp32", "bf16", "int8"]),
    st.sampled_from(["none", "B"]),
    st.lists(st.booleans(), min_size=30, max_size=30),
    st.integers(1, 3),
)
def test_a_replica_has_the_coordinators_bits(
    events: list, down: str, transfer: str, reset: str, looks: list[bool], shards: int
) -> None:
    """Whatever was merged, in whichever groups, and however many versions the replica missed."""
    shards = 1 if down in ("bf16", "int8") else shards
    side = CoordinatorSide(MergeConfig(send_down=down, transfer=transfer, shards=shards), plans_of([2, 3, 1]), reset)  # type: ignore[arg-type]
    replica = side.replica(reset)
    follow(replica, side.make_reply(-1))
    waiting: set[int] = set()
    for (head, what), look in zip(events, looks, strict=False):
        if head in waiting:
            continue
        if what == "fresh":
            side.start_fresh(head)
            continue
        waiting.add(head)
        side.contribute(head, what)
        waiting = set(side.coordinator.pending_heads)
        if look and side.coordinator.version > replica.version:
            base = follow(replica, side.make_reply(replica.redo_from))
            assert base is not None
            assert torch.equal(base, side.coordinator.base)
            assert_same_momentum(replica, side)
    assert replica.resyncs == 0


@pytest.mark.parametrize("transfer", ["fp32", "int8"])
def test_a_fresh_head_is_redone_without_its_predecessors_reference(transfer: str) -> None:
    """Others drop the factors of the head that had its number."""
    side = CoordinatorSide(MergeConfig(send_down="factors", transfer=transfer), plans_of([2, 3, 1]))  # type: ignore[arg-type]
    replica = side.replica()
    follow(replica, side.make_reply(-1))
    for afresh in (False, True, False):
        if afresh:
            side.start_fresh(0)
        side.contribute(0)
        base = follow(replica, side.make_reply(replica.redo_from))
        assert base is not None
        assert torch.equal(base, side.coordinator.base)
    assert replica.resyncs == 0


def test_a_replica_that_outlives_its_coordinator_redoes_the_next_ones_merges() -> None:
    """If the next one has lost a head's factors, that head starts with B = 0, and the replica's factors of it are void."""
    side = CoordinatorSide(MergeConfig(send_down="factors"), plans_of([2, 3, 1]))
    replica = side.replica()
    follow(replica, side.make_reply(-1))
    side.contribute(0)
    side.contribute(1)
    follow(replica, side.make_reply(replica.redo_from))
    kept = {1: side.coordinator.reference(1)}
    side.coordinator = Coordinator(
        side.settings,
        side.coordinator.plans[0],
        side.coordinator.base.clone(),
        side.policy,
        plans=side.coordinator.plans,
        version=2,
        references={head: factors.clone() for head, factors in kept.items() if factors is not None},
        fresh={0, 2},
    )
    side.broadcast_log = BroadcastLog(
        side.groups, [c.base.size * 4 for c in side.codecs[0].group_plans], [c.buffer_sizes for c in side.codecs], 2
    )
    for head in (0, 1, 0, 2):
        side.contribute(head)
        base = follow(replica, side.make_reply(replica.redo_from))
        assert base is not None
        assert torch.equal(base, side.coordinator.base)
    assert replica.resyncs == 0


@pytest.mark.parametrize("drifts", ["base", "momentum"])
def test_drift_is_detected_by_a_checksum_and_corrected_by_the_complete_base(drifts: str) -> None:
    """A flipped bit is detected when the checksum comes, and corrected by the next reply."""
    side = CoordinatorSide(MergeConfig(send_down="factors"), plans_of([2, 2, 2]))
    replica = side.replica()
    side.contribute(0, "step")
    follow(replica, side.make_reply(-1))
    part = getattr(next(iter(replica._parts.values())), drifts)
    part.view(torch.int32)[7] ^= 1 << 16  # a high bit, so that no sum before the check rounds it away
    for version in range(2, CHECKSUM_INTERVAL + 1):
        side.contribute(version % HEADS)
        reply = side.make_reply(replica.redo_from, checked=version == CHECKSUM_INTERVAL)
        follow(replica, reply)
        assert replica.resyncs == (version == CHECKSUM_INTERVAL)
    assert replica.redo_from == -1
    side.contribute(0)
    base = follow(replica, side.make_reply(replica.redo_from))
    assert base is not None
    assert torch.equal(base, side.coordinator.base)
    side.contribute(1, "step")
    base = follow(replica, side.make_reply(replica.redo_from))  # from factors again
    assert base is not None
    assert torch.equal(base, side.coordinator.base)
    assert_same_momentum(replica, side)


def test_equal_copies_have_equal_checksums() -> None:
    """Fifty versions by factors, of which every tenth is checked."""
    side = CoordinatorSide(MergeConfig(send_down="factors", transfer="int8"), plans_of([2, 2, 2]))
    replica = side.replica()
    follow(replica, side.make_reply(-1))
    for version in range(1, 51):
        side.contribute(version % HEADS, "step" if version > 5 else "merge")
        follow(replica, side.make_reply(replica.redo_from, checked=version % CHECKSUM_INTERVAL == 0))
    assert replica.resyncs == 0
    assert torch.equal(replica._base, side.coordinator.base)


def test_only_new_contributions_are_fetched() -> None:
    """By factors a replica fetches each merged contribution once and nothing else."""
    side = CoordinatorSide(MergeConfig(send_down="factors"), plans_of([2, 2, 2]))
    replica = side.replica()
    follow(replica, side.make_reply(-1))
    before = replica.bytes_fetched
    for head in (0, 1, 2):
        side.contribute(head)
    follow(replica, side.make_reply(replica.redo_from))
    assert replica.bytes_fetched - before == 3 * side.codecs[0].buffer_sizes[0]


def test_a_reply_that_lacks_merges_is_rejected() -> None:
    """The process then requests the complete base; its own copy stays as it was."""
    side = CoordinatorSide(MergeConfig(send_down="factors"), plans_of([2, 2, 2]))
    replica = side.replica()
    follow(replica, side.make_reply(-1))
    side.contribute(0)
    side.contribute(1)
    reply = side.make_reply(1)  # only the second merge
    before = replica._base.clone()
    for _ in range(2):  # nothing stays locked
        with pytest.raises(CannotRedoMerges):
            replica.acquire(reply)
    assert torch.equal(replica._base, before)
    assert follow(replica, side.make_reply(-1)) is not None


@pytest.mark.parametrize("down", ["factors", "dense"])
def test_a_void_reply_changes_nothing(down: str) -> None:
    """Its coordinator is gone, or a buffer is: the process keeps its complete version, and follows the next reply."""
    side = CoordinatorSide(MergeConfig(send_down=down), plans_of([2, 2, 2]))  # type: ignore[arg-type]
    replica = side.replica()
    follow(replica, side.make_reply(-1))
    side.contribute(0)
    follow(replica, side.make_reply(replica.redo_from))
    before = replica.read(lambda base, momentum: base.clone())  # type: ignore[union-attr]
    side.contribute(1)
    reply = side.make_reply(replica.redo_from)

    def gone(*_: object) -> None:
        raise KeyError("gone")

    fetch, noted = replica._fetch, list[int]()
    for _ in range(2):  # nothing stays locked
        with pytest.raises(KeyError):
            replica.acquire(reply, gone)
        replica._fetch = gone  # type: ignore[assignment]
        with pytest.raises(KeyError):
            replica.acquire(reply, lambda: noted.append(0))
        replica._fetch = fetch
        assert (replica.version, replica.redo_from, noted) == (1, 1 if down == "factors" else -1, [])
        assert torch.equal(replica.read(lambda base, momentum: base.clone()), before)  # type: ignore[union-attr]
    assert torch.equal(follow(replica, reply), side.coordinator.base)  # type: ignore[arg-type]


def test_an_older_reply_changes_nothing() -> None:
    """Replies may arrive in another order than they were sent."""
    side = CoordinatorSide(MergeConfig(send_down="factors"), plans_of([2, 2, 2]))
    replica = side.replica()
    follow(replica, side.make_reply(-1))
    side.contribute(0)
    old = side.make_reply(0)
    side.contribute(1)
    follow(replica, side.make_reply(0))
    assert follow(replica, old) is None
    assert replica.version == 2


@pytest.mark.parametrize("action", ["merge", "step"])
def test_long_chains_are_dropped(action: str) -> None:
    """Once their factors are more bytes than the base, and its momentum if there is any, a process so far behind gets these."""
    plans = plans_of([2, 2, 2])
    side = CoordinatorSide(MergeConfig(send_down="factors"), plans)
    size, each = plans[0].base.size * 4 * (2 if action == "step" else 1), side.codecs[0].buffer_sizes[0]
    for version in range(20):
        side.contribute(version % HEADS, action)
    kept = [have for have in range(20) if side.broadcast_log.deltas_since(have) is not None]
    assert kept == list(range(20 - size // each, 20))
    assert side.broadcast_log.deltas_since(-1) is None

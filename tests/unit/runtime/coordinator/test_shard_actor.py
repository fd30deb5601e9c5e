"""Shard actors and the coordinator's side of them, without Ray: calls arrive late and in any order."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from lte_ray.config import MergeConfig
from lte_ray.engine.coordinator.coordinator import Coordinator
from lte_ray.merging import Arrival, ComposedPolicy, Merge, Nesterov
from lte_ray.merging.flat_buffer import gather, views
from lte_ray.messages import OuterStep, StepCoefficients
from lte_ray.runtime.context import RunContext
from lte_ray.runtime.coordinator.aggregators import ShardedAggregator
from lte_ray.runtime.coordinator.shard_actor import ShardActor
from lte_ray.runtime.coordinator_state import CoordinatorState
from lte_ray.runtime.object_store import AssembledRef
from lte_ray.transfer.checksum import base_checksum, buffers_checksum
from lte_ray.transfer.groups import make_groups
from tests.support.base_shards import momentum_of
from tests.support.plans import make_contribution, plan_from_shapes, random_flat
from tests.support.tiny_worker import make_settings

PLANS = tuple(plan_from_shapes([(24, 20, r), (6, 40, r), (16, 16, r)], [(5,), (3, 2)]) for r in (2, 3))
MERGE = MergeConfig(shards=3, send_down="factors", transfer="int8", merge_threads=1)


class CopyingTransport:
    """A transport whose handles are copies of the tensors."""

    def publish(self, buffer: Tensor) -> Tensor:
        return buffer.clone()

    def fetch(self, handle: Any) -> Tensor:
        return handle.assemble([piece for piece, _ in handle.pieces]) if isinstance(handle, AssembledRef) else handle

    async def fetch_async(self, handle: Tensor) -> Tensor:
        await asyncio.sleep(0)
        return handle


class LateActor:
    """An actor handle whose calls arrive after a random number of turns of the event loop."""

    def __init__(self, actor: Any, chance: random.Random) -> None:
        self.actor, self.chance = actor, chance

    def __getattr__(self, name: str) -> Any:
        async def deliver(delay: int, *args: Any) -> Any:
            for _ in range(delay):
                await asyncio.sleep(0)
            return await getattr(self.actor, name)(*args)

        return SimpleNamespace(remote=lambda *args: asyncio.ensure_future(deliver(self.chance.randrange(20), *args)))


def checksums(buffers: Sequence[Tensor]) -> list[int]:
    return [buffers_checksum([buffer]) for buffer in buffers]


def make_sharded(seed: int, start: CoordinatorState, merge: MergeConfig = MERGE) -> tuple[ShardedAggregator, RunContext]:
    settings = make_settings(heads=2)
    settings = dataclasses.replace(settings, merge=merge, train=dataclasses.replace(settings.train, ema=0.9))
    context = RunContext(None, settings, None, CopyingTransport(), make_groups(PLANS, merge))  # type: ignore[arg-type]
    chance = random.Random(seed)
    actors = [LateActor(ShardActor(context, PLANS, number, start), chance) for number in range(merge.shards)]
    return ShardedAggregator(actors, context.codecs(PLANS), start.version), context


@given(st.integers(0, 1 << 30))
def test_calls_that_overtake_each_other_give_the_same_results(seed: int) -> None:
    """Merges and reads are sent without waiting for answers: each answer is of the version at which it was requested."""
    base = random_flat(PLANS[0].base.size, 1).float()

    async def run() -> None:
        aggregator, context = make_sharded(seed, CoordinatorState(0, base))
        codecs = context.codecs(PLANS)
        settings = dataclasses.replace(context.settings, merge=dataclasses.replace(MERGE, shards=1))
        policy = ComposedPolicy(Nesterov(lr=0.7, momentum=0.5, replica_lr=0.9))
        local = Coordinator(settings, PLANS[0], base.clone(), policy, plans=PLANS)
        reads: list[Any] = []
        for version in range(1, 6):
            for head in (0, 1):
                flat = random_flat(PLANS[head].contribution.size, 2 * version + head).float()
                buffers, decoded = codecs[head].encode(flat, local.reference(head))
                measured = await aggregator.receive(2 * version + head, head, buffers, checksums(buffers))
                assert measured.sum_of_squares == pytest.approx(float(decoded.double().square().sum()), rel=1e-5)
                merges = local.receive(make_contribution(head, version, version=local.version), decoded).merges
            aggregator.discard(99)
            weights = {2 * version + head: 0.5 for head in (0, 1)}
            merge_seconds = asyncio.ensure_future(aggregator.merge(version, weights, merges[0].outer_step, merges[0].ema_keep))
            base_read, checksum = (
                asyncio.ensure_future(aggregator.publish_base(complete=True)),
                asyncio.ensure_future(aggregator.checksum()),
            )
            groups = range(len(context.groups))
            parts = asyncio.ensure_future(aggregator.publish_parts(groups, references=True, momentum=(1, 2)))
            references = {head: local.reference(head).clone() for head in (0, 1)}  # type: ignore[union-attr]
            momentum = local.base_weights.read(momentum_of)
            bases = (local.base.clone(), local.ema.clone())  # type: ignore[union-attr]
            reads.append((version, bases, momentum, references, merge_seconds, base_read, checksum, parts))
        for version, (expected, ema), momentum, references, merge_seconds, base_read, checksum, parts in reads:
            assert await merge_seconds >= 0
            whole = await base_read
            assert torch.equal(CopyingTransport().fetch(whole.parts[-1]), expected)
            assert torch.equal(CopyingTransport().fetch(whole.ema[-1]), ema)
            assert not torch.equal(expected, ema)
            assert torch.equal(CopyingTransport().fetch(whole.momentum[-1]), momentum)
            assert await checksum == (base_checksum(expected) + base_checksum(momentum)) % 2**64
            published = await parts
            assert published.version == version
            assert published.momentum.keys() == {1, 2}
            for flat, of_groups in ((expected, published.parts), (momentum, published.momentum)):
                for index, part in of_groups.items():
                    entries = views(codecs[0].group_plans[index].base, part)
                    assert all(torch.equal(entries[name], views(PLANS[0].base, flat)[name]) for name in entries)
            for head, reference in references.items():
                assert torch.equal(CopyingTransport().fetch(published.references[head]), reference)

    asyncio.run(run())


def test_no_shard_keeps_what_one_cannot_decode() -> None:
    """The reason is that of decoding all groups at once, also if a buffer is missing; the next contribution is accepted."""
    base = random_flat(PLANS[0].base.size, 1).float()

    async def run() -> None:
        aggregator, context = make_sharded(1, CoordinatorState(0, base))
        codec = context.codecs(PLANS)[0]
        buffers = list(codec.encode(random_flat(codec.plan.contribution.size, 1).float(), None)[0])
        for bad in (buffers[:2], [*buffers[:2], buffers[2][:-1]]):
            with pytest.raises(ValueError, match="expected") as local_error:
                codec.decode(dict(enumerate(bad)), None)
            with pytest.raises(ValueError, match="expected") as sharded_error:
                await aggregator.receive(1, 0, bad, checksums(bad))
            assert str(sharded_error.value) == str(local_error.value)
        await aggregator.receive(2, 0, buffers, checksums(buffers))
        await asyncio.gather(*(task for task in asyncio.all_tasks() if task is not asyncio.current_task()))
        assert [shard.actor.actor._shard.undecided for shard in aggregator._shards] == [1, 1, 1]

    asyncio.run(run())


def test_a_buffer_that_was_changed_on_its_way_is_refused() -> None:
    """One bit of one shard's buffer: the reason names the buffer, no shard keeps its part, and the next one is accepted."""
    base = random_flat(PLANS[0].base.size, 1).float()

    async def run() -> None:
        aggregator, context = make_sharded(1, CoordinatorState(0, base))
        codec = context.codecs(PLANS)[0]
        buffers = list(codec.encode(random_flat(codec.plan.contribution.size, 1).float(), None)[0])
        sent = checksums(buffers)
        changed = [buffer.clone() for buffer in buffers]
        changed[1].view(torch.uint8)[7] ^= 1
        with pytest.raises(ValueError, match=r"its buffer 0 didn't arrive as it was sent"):  # of this shard's
            await aggregator.receive(1, 0, changed, sent)
        await aggregator.receive(2, 0, buffers, sent)
        await asyncio.gather(*(task for task in asyncio.all_tasks() if task is not asyncio.current_task()))
        assert [shard.actor.actor._shard.undecided for shard in aggregator._shards] == [1, 1, 1]

    asyncio.run(run())


def test_shards_publish_changes_and_the_residual() -> None:
    """In int8, from a version with a residual: the base is that of local merging, and what the changes of all versions add."""
    base, residual = random_flat(PLANS[0].base.size, 1).float(), 1e-3 * random_flat(PLANS[0].base.size, 4).float()

    async def run() -> None:
        state = CoordinatorState(7, base, residual=residual)
        aggregator, context = make_sharded(3, state, dataclasses.replace(MERGE, send_down="int8"))
        codec, settings = context.codecs(PLANS)[1], context.settings
        settings = dataclasses.replace(settings, merge=dataclasses.replace(settings.merge, shards=1))
        policy = ComposedPolicy(lambda pending, roster: Merge({1: 0.5}), Arrival())
        local = Coordinator(settings, PLANS[0], base.clone(), policy, plans=PLANS, version=7, residual=residual.clone())
        moved = {index: gather(plan.base, views(PLANS[0].base, base)) for index, plan in enumerate(codec.group_plans)}
        reads = []
        for version in (8, 9):
            flat = random_flat(PLANS[1].contribution.size, version).float()
            buffers, decoded = codec.encode(flat, local.reference(1))
            await aggregator.receive(version, 1, buffers, checksums(buffers))
            merge = asyncio.ensure_future(aggregator.merge(version, {version: 0.5}, None, None))
            reads.append((merge, asyncio.ensure_future(aggregator.publish_changes())))
            local.receive(make_contribution(1, version, version=version - 1), decoded)
        for merge, changes in reads:
            await merge
            for index, change in (await changes).items():
                moved[index] += codec.change_packings[index].decode(change)
        published = await aggregator.publish_base(complete=True)
        assert torch.equal(CopyingTransport().fetch(published.parts[-1]), local.base)
        left = local.base_weights.read(lambda newest: newest.residual)
        assert torch.equal(CopyingTransport().fetch(published.residual[-1]), left)
        for index, part in moved.items():
            assert torch.equal(part, gather(codec.group_plans[index].base, views(PLANS[0].base, local.base)))

    asyncio.run(run())


def test_shards_start_from_a_version_with_its_references() -> None:
    """As after the coordinator has died: base, version, momentum, moving average, and every head's factors in their groups."""
    base, momentum, ema = (random_flat(PLANS[0].base.size, seed).float() for seed in (1, 4, 5))
    step = OuterStep(StepCoefficients(0.5, 1.0, 0.7, 0.35), StepCoefficients(0.5, 1.0, 0.7, 0.35))
    references = {1: random_flat(PLANS[1].factors_size, 2).float()}

    async def run() -> None:
        aggregator, context = make_sharded(3, CoordinatorState(7, base, references, momentum, ema=ema))
        published = await aggregator.publish_base(complete=True)
        assert published.version == 7
        assert torch.equal(CopyingTransport().fetch(published.parts[-1]), base)
        assert torch.equal(CopyingTransport().fetch(published.momentum[-1]), momentum)
        assert torch.equal(CopyingTransport().fetch(published.ema[-1]), ema)
        assert {
            head: torch.equal(CopyingTransport().fetch(handle), references[head])
            for head, handle in published.references.items()
        } == {1: True}
        codecs = context.codecs(PLANS)
        flat = random_flat(PLANS[1].contribution.size, 3).float()
        buffers, decoded = codecs[1].encode(flat, references[1])
        await aggregator.receive(1, 1, buffers, checksums(buffers))
        await aggregator.merge(8, {1: 0.5}, step, 0.25)
        settings = dataclasses.replace(context.settings, merge=dataclasses.replace(MERGE, shards=1))
        policy = ComposedPolicy(lambda pending, roster: Merge({1: 0.5}, step), Arrival())
        state: Any = {"version": 7, "references": dict(references), "momentum": momentum.clone()}
        local = Coordinator(settings, PLANS[0], base.clone(), policy, plans=PLANS, **state)
        local.receive(make_contribution(1, 1, version=7), decoded)
        assert local.version == 8
        published = await aggregator.publish_base()
        assert torch.equal(CopyingTransport().fetch(published.parts[-1]), local.base)
        assert torch.equal(CopyingTransport().fetch(published.ema[-1]), torch.lerp(ema, local.base, 0.75))

    asyncio.run(run())

"""The coordinator's process on its event loop, without Ray: who is told what, whatever becomes of the heads."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from helpers import make_plan_of, make_settings, offer, random_flat
from torch import Tensor

from lte_ray.engine.coordinator import Coordinator
from lte_ray.merging import Decision, Merge, Pending, Roster, Wait
from lte_ray.messages import MergeRecord, Save, Verdict
from lte_ray.runtime import cuts
from lte_ray.runtime.merging import Merging
from lte_ray.runtime.waiters import Waiters


class Patient:
    """Merges all heads together."""

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        if len(pending) < roster.num_heads:
            return Wait("for the others", until=roster.now + 1e9)
        return Merge({p.head: 1 / len(pending) for p in pending})


class Here:
    """The tensors in this process, and what was said of each contribution."""

    def __init__(self) -> None:
        self.forgotten: list[int] = []
        self.refusals: list[Verdict] = []

    async def receive(self, ticket: int, head: int, handles: Sequence[Tensor], seals: Sequence[int]) -> Tensor:
        return handles[0]

    def forget(self, ticket: int) -> None:
        self.forgotten.append(ticket)

    def note(self, merges: Sequence[MergeRecord], buffers: Mapping[int, Any], tickets: Mapping[int, int]) -> None:
        """What follows a merge isn't asked for here."""

    def refused(self, verdict: Verdict) -> None:
        self.refusals.append(verdict)


def test_what_a_dropped_head_had_contributed_is_settled_and_forgotten() -> None:
    """Its verdict comes, nothing of it stays behind, and the others' contributions are merged without it."""

    async def run() -> None:
        plan = make_plan_of([(6, 5, 2)], [(4,)])
        engine = Coordinator(make_settings(heads=3), plan, random_flat(plan.base.size, 1).float(), Patient())
        here, waiters = Here(), Waiters(lambda: None)
        merging = Merging(engine, here, here, waiters, None, 1)  # type: ignore[arg-type]
        buffers = [random_flat(plan.contribution.size, seed).float() for seed in range(3)]
        told = [asyncio.ensure_future(merging.contribute(offer(head, 1, buffer=(buffers[head],)))) for head in (0, 1)]
        await asyncio.sleep(0.01)
        assert merging._undecided.keys() == {0, 1}
        merging.handle(lambda: engine.drop(1))
        verdict = await told[1]
        assert not verdict.accepted
        assert "head 1 has left the run" in verdict.reason
        assert here.forgotten == [2]
        assert merging._undecided.keys() == {0}
        assert (await merging.contribute(offer(2, 1, buffer=(buffers[2],)))).accepted
        assert (await told[0]).accepted
        assert not merging._undecided

    asyncio.run(run())


def test_a_part_that_is_missing_for_long_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer that asked may be lost: three such checkpoints would keep all others from being begun."""
    cut = cuts._Cut({}, Save(4, {0: 2, 1: 3}), set(), {0, 1}, {})
    writer = cuts.Cuts.__new__(cuts.Cuts)
    writer._open = {4: cut}
    assert writer.lacking({0}, {0, 1}) == (Save(4, {0: 2}),)
    assert writer.lacking((), {0, 1}) == ()
    now = cut.begun + cuts.LATE + 1
    monkeypatch.setattr(cuts.time, "monotonic", lambda: now)
    assert writer.lacking((), {0, 1}) == (Save(4, {0: 2, 1: 3}),)

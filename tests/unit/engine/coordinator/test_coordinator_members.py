"""Heads that leave a run for good, and heads that are added to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from lte_ray.engine.coordinator.coordinator import Coordinator
from lte_ray.engine.settings import Settings
from lte_ray.merging import Decision, Merge, Pending, Roster, Try, Wait
from tests.support.plans import make_contribution, plan_from_shapes, random_flat
from tests.support.tiny_worker import make_settings

PLAN = plan_from_shapes([(6, 5, 2), (3, 4, 1)], [(4,), ()], scaling=2.0)


class TryAll:
    """Tries to merge all that is pending, once every member has contributed."""

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        if len(pending) < roster.num_heads:
            return Wait("for the others")
        merge = Merge({p.head: 1 / len(pending) for p in pending})
        return Try(merge, lambda values: merge)


class MergeAll:
    """Merges all that is pending."""

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        return Merge({p.head: 1.0 for p in pending}) if pending else Wait("for any head")


def make(policy: object, settings: Settings) -> Coordinator:
    return Coordinator(settings, PLAN, random_flat(PLAN.base.size, 9), policy)  # type: ignore[arg-type]


def test_dropping_a_head_voids_the_trial_of_its_contribution() -> None:
    """The evaluated base isn't merged; the policy is asked again, about the remaining heads."""
    coordinator = make(TryAll(), make_settings(heads=3))
    for head in range(3):
        coordinator.receive(make_contribution(head), random_flat(PLAN.contribution.size, head))
    assert coordinator.candidate is not None
    (result,) = coordinator.drop(1).results
    assert not result.accepted
    assert coordinator.receive_evaluation({"loss": 1.0}).merges == ()
    assert coordinator.candidate is not None  # of heads 0 and 2
    (record,) = coordinator.receive_evaluation({"loss": 1.0}).merges
    assert record.heads == (0, 2)


@pytest.mark.parametrize("budget", ["shared", "each"])
def test_a_new_head_uses_no_budget_before_it_trains(budget: str) -> None:
    """It ends with the others: if each head has its own steps, it counts as if it had trained so far, else from 0."""
    settings = make_settings(heads=2, steps=30)
    settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, budget=budget))  # type: ignore[arg-type]
    coordinator = make(MergeAll(), settings)
    for sequence in (1, 2, 3):
        for head in (0, 1):
            partitions = coordinator.positions[head].lanes
            contribution = dataclasses.replace(
                make_contribution(head, sequence, version=coordinator.version), partitions=partitions
            )
            assert coordinator.receive(contribution, random_flat(PLAN.contribution.size, head)).merges
    before = coordinator.step_budget.steps_taken
    coordinator.join(2, 0)
    assert coordinator.positions[2].step == (0 if budget == "shared" else 9)
    assert coordinator.step_budget.steps_taken == before + coordinator.positions[2].step
    coordinator.live.add(2)
    assert coordinator.next_directive(2).limit > coordinator.positions[2].step  # so that its first contribution isn't empty


def test_a_head_that_no_version_knows_is_new_to_the_next_coordinator() -> None:
    """It was dropped and added again, and the coordinator died before a merge of it: it waits for data, and isn't forgotten."""
    settings = make_settings(heads=2)
    before = make(MergeAll(), settings)
    before.receive(make_contribution(1), random_flat(PLAN.contribution.size, 1))
    before.drop(1)
    after = Coordinator(
        settings,
        PLAN,
        before.base.clone(),
        MergeAll(),  # type: ignore[arg-type]
        version=before.version,
        positions=before.positions,
        members={0, 1},  # the driver has added head 1 again
        assignor=type(before.assignor).from_state(before.assignor.state()),
    )
    assert after.join(1, 1)
    assert 1 in after.assignor.heads
    has_or_gets_data = after.next_directive(0).revocation or after.assignor.has_partitions(1)
    assert has_or_gets_data  # head 0 must give half of its data, or it has free data


@pytest.mark.parametrize(("steps", "limit"), [(10_000, 600), (100, 10), (12, 6)])
def test_heads_that_share_steps_are_granted_enough_to_bridge_a_lost_coordinator(steps: int, limit: int) -> None:
    """A minute of the head's steps, at most a tenth of its share of the rest, at least two rounds."""
    settings = make_settings(heads=2, steps=steps, merge_iter=3)
    settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, budget="shared"))
    coordinator = make(MergeAll(), settings)
    for head in (0, 1):
        coordinator.step_rates.record_steps(head, 10, 1.0)
    assert coordinator.next_directive(0).limit == limit


class RecordsProgress(MergeAll):
    """Merges all that is pending, and records the roster's progress then."""

    def __init__(self) -> None:
        self.progress: list[float] = []

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        if pending:
            self.progress.append(roster.progress)
        return super().decide(pending, roster)


@pytest.mark.parametrize(("budget", "expected"), [("each", [0.1, 0.3, 0.6, 1.0]), ("shared", [0.1, 0.3, 0.5, 0.7])])
def test_policies_see_the_share_of_the_steps_that_is_done(budget: str, expected: list[float]) -> None:
    """Pending contributions included. A head that has left for good counts no more, unless heads share their steps."""
    settings = make_settings(heads=2, steps=10)
    settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, budget=budget))  # type: ignore[arg-type]
    policy = RecordsProgress()
    coordinator = make(policy, settings)
    for sequence, (head, step) in enumerate([(0, 2), (1, 4), (0, 6), (0, 10)], start=1):
        if sequence == 3:
            coordinator.drop(1)
        record = dataclasses.replace(make_contribution(head, sequence, version=coordinator.version), step=step)
        assert coordinator.receive(record, random_flat(PLAN.contribution.size, head)).merges
    assert policy.progress == pytest.approx(expected)

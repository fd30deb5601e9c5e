"""Heads that leave a run for good, and heads that come to it, as the coordinator sees them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from lte_ray.engine.coordinator.coordinator import Coordinator
from lte_ray.engine.settings import Settings
from lte_ray.merging import Decision, Merge, Pending, Roster, Try, Wait
from tests.support.helpers import make_plan_of, make_settings, offer, random_flat

PLAN = make_plan_of([(6, 5, 2), (3, 4, 1)], [(4,), ()], scaling=2.0)


class Trying:
    """Tries the merge of all that is pending, once every member has contributed."""

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        if len(pending) < roster.num_heads:
            return Wait("for the others")
        merge = Merge({p.head: 1 / len(pending) for p in pending})
        return Try(merge, lambda values: merge)


class Each:
    """Merges what comes."""

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        return Merge({p.head: 1.0 for p in pending}) if pending else Wait("for anybody")


def make(policy: object, settings: Settings) -> Coordinator:
    return Coordinator(settings, PLAN, random_flat(PLAN.base.size, 9), policy)  # type: ignore[arg-type]


def test_a_head_that_is_dropped_while_its_contribution_is_tried_voids_the_trial() -> None:
    """What is judged then isn't merged; the policy is asked again, about those that are left."""
    coordinator = make(Trying(), make_settings(heads=3))
    for head in range(3):
        coordinator.receive(offer(head), random_flat(PLAN.contribution.size, head))
    assert coordinator.candidate is not None
    (verdict,) = coordinator.drop(1).results
    assert not verdict.accepted
    assert coordinator.receive_evaluation({"loss": 1.0}).merges == ()
    assert coordinator.candidate is not None  # of heads 0 and 2
    (record,) = coordinator.receive_evaluation({"loss": 1.0}).merges
    assert record.heads == (0, 2)


@pytest.mark.parametrize("budget", ["shared", "each"])
def test_a_new_head_takes_no_step_of_the_budget_that_it_has_not_trained(budget: str) -> None:
    """It ends with the others: where each has its own steps it counts as if it had trained so far, else from 0."""
    settings = make_settings(heads=2, steps=30)
    settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, budget=budget))  # type: ignore[arg-type]
    coordinator = make(Each(), settings)
    for sequence in (1, 2, 3):
        for head in (0, 1):
            lanes = coordinator.positions[head].lanes
            contribution = dataclasses.replace(offer(head, sequence, version=coordinator.version), partitions=lanes)
            assert coordinator.receive(contribution, random_flat(PLAN.contribution.size, head)).merges
    before = coordinator.step_budget.taken
    coordinator.join(2, 0)
    assert coordinator.positions[2].step == (0 if budget == "shared" else 9)
    assert coordinator.step_budget.taken == before + coordinator.positions[2].step
    coordinator.live.add(2)
    assert coordinator.next_directive(2).limit > coordinator.positions[2].step  # so that its first contribution isn't empty


def test_a_head_that_no_version_knows_of_is_new_to_the_next_coordinator() -> None:
    """Dropped, added again, and the coordinator died before it was merged: it waits for data, and isn't forgotten."""
    settings = make_settings(heads=2)
    before = make(Each(), settings)
    before.receive(offer(1), random_flat(PLAN.contribution.size, 1))
    before.drop(1)
    after = Coordinator(
        settings,
        PLAN,
        before.base.clone(),
        Each(),  # type: ignore[arg-type]
        version=before.version,
        positions=before.positions,
        members={0, 1},  # as the driver has it, which has added head 1 again
        assignor=type(before.assignor).from_state(before.assignor.state()),
    )
    assert after.join(1, 1)
    assert 1 in after.assignor.heads
    grants = after.next_directive(0).revocation or after.assignor.has_partitions(1)
    assert grants  # head 0 is asked for half of its data, or it has been given what was free


@pytest.mark.parametrize(("steps", "limit"), [(10_000, 600), (100, 10), (12, 6)])
def test_heads_that_share_steps_are_granted_what_they_take_while_a_coordinator_is_away(steps: int, limit: int) -> None:
    """A minute of a head's own steps, a tenth of what is left for it, and two rounds: the first if it isn't more than the
    second, the last at least."""
    settings = make_settings(heads=2, steps=steps, merge_iter=3)
    settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, budget="shared"))
    coordinator = make(Each(), settings)
    for head in (0, 1):
        coordinator.step_rates.record_steps(head, 10, 1.0)
    assert coordinator.next_directive(0).limit == limit

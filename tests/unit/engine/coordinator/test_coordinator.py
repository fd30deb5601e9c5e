"""The coordinator's merges, in float64, compared with dense sums."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lte_ray.engine.coordinator.coordinator import Coordinator
from lte_ray.layout import Plan
from lte_ray.merging import Average, ComposedPolicy, Decision, Discard, Merge, MergeChange, Pending, Roster, Wait
from tests.support.dense_reference import dense_change_by_formula
from tests.support.numerics import assert_near
from tests.support.plans import make_contribution, plan_from_shapes, random_flat
from tests.support.tiny_worker import make_settings

PLAN = plan_from_shapes([(6, 5, 2), (3, 4, 1)], [(4,), ()], scaling=2.0)


def make(policy: object, heads: int = 2, reset: str = "none", plan: Plan = PLAN) -> tuple[Coordinator, Tensor]:
    """A coordinator, and a copy of its first base."""
    base = random_flat(plan.base.size, 99)
    settings = make_settings(heads=heads, reset=reset)
    return Coordinator(settings, plan, base.clone(), policy), base  # type: ignore[arg-type]


def buffer(seed: int, plan: Plan = PLAN) -> Tensor:
    return random_flat(plan.contribution.size, seed)


def factors(contribution: Tensor, plan: Plan = PLAN) -> Tensor:
    return contribution[: plan.factors_size]


def test_average_waits_for_all_heads_and_merges_their_mean_change() -> None:
    """W_{v+1} = W_v + 1/N sum_n s (B_n A_n - B'_n A'_n), for two rounds: the second has references."""
    coordinator, base = make(ComposedPolicy(Average()), heads=3)
    before: dict[int, Tensor] = {}
    for sequence in (1, 2):
        sent = {head: buffer(10 * sequence + head) for head in range(3)}
        for head in (0, 1):
            event_result = coordinator.receive(make_contribution(head, sequence), sent[head])
            assert (event_result.results, event_result.merges) == ((), ())
        assert coordinator.pending_heads == [0, 1]
        assert coordinator.waiting_for == "for heads [2]"
        event_result = coordinator.receive(make_contribution(2, sequence), sent[2])
        base = base + sum(dense_change_by_formula(PLAN, sent[h], before.get(h)) for h in range(3)) / 3
        before = {h: factors(sent[h]) for h in sent}
        assert_near(coordinator.base, base, 1e-14)  # 3 x 2 products of inner size 2, in float64
        assert [(v.head, v.sequence, v.accepted, v.version) for v in event_result.results] == [
            (h, sequence, True, sequence) for h in range(3)
        ]
        (record,) = event_result.merges
        assert (record.version, record.heads, record.step, record.steps, record.samples) == (
            sequence, (0, 1, 2), 3 * sequence, 9, 36,
        )  # fmt: skip
        assert record.losses == {0: 1.0, 1: 1.0, 2: 1.0}
        assert record.bytes_up == 3 * PLAN.contribution.size * 8
        assert coordinator.pending_heads == []


@pytest.mark.parametrize("errors", [(0.25, 0.5, 0.125), (0.5, 0.25, 0.125), (0.25, 0.125, 0.5), (0.0, 0.0, 0.0)])
def test_a_merge_records_the_largest_quantization_error_of_its_contributions(errors: tuple[float, ...]) -> None:
    """From whichever head, and of this merge only."""
    coordinator, _ = make(ComposedPolicy(Average()), heads=3)
    for head, error in enumerate(errors):
        event_result = coordinator.receive(make_contribution(head, base_error=error), buffer(head))
    assert [m.base_error for m in event_result.merges] == [max(errors)]
    for head in range(3):
        event_result = coordinator.receive(make_contribution(head, 2, base_error=0.01 * head), buffer(head))
    assert [m.base_error for m in event_result.merges] == [0.02]


def test_a_merge_records_the_norms_that_heads_have_told() -> None:
    """Of some heads, or of none."""
    coordinator, _ = make(ComposedPolicy(Average()), heads=2)
    coordinator.receive(make_contribution(0, norm=0.5), buffer(0))
    assert [m.norms for m in coordinator.receive(make_contribution(1), buffer(1)).merges] == [{0: 0.5}]
    coordinator.receive(make_contribution(0, 2), buffer(0))
    assert [m.norms for m in coordinator.receive(make_contribution(1, 2), buffer(1)).merges] == [{}]


def test_every_second_merge_measures_its_changes_and_merges_the_same() -> None:
    """By head, and of their mean."""
    settings = make_settings(heads=2)
    measuring = dataclasses.replace(settings, merge=dataclasses.replace(settings.merge, measure_every=2))
    base = random_flat(PLAN.base.size, 99)
    plain, measured = (Coordinator(each, PLAN, base.clone(), ComposedPolicy(Average())) for each in (settings, measuring))
    records = []
    for sequence in (1, 2, 3, 4):
        for head in (0, 1):
            plain.receive(make_contribution(head, sequence), buffer(4 * sequence + head))
            records += measured.receive(make_contribution(head, sequence), buffer(4 * sequence + head)).merges
    assert [list(record.alignment) for record in records] == [[], [0, 1], [], [0, 1]]
    assert [record.effective_rank is not None for record in records] == [False, True, False, True]
    assert torch.equal(plain.base, measured.base)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_order_of_arrival_does_not_matter(order: tuple[int, ...]) -> None:
    """The merged base is bitwise the same for every order of arrival."""
    coordinator, expected = make(ComposedPolicy(Average()), heads=3), make(ComposedPolicy(Average()), heads=3)[0]
    for head in range(3):
        expected.receive(make_contribution(head), buffer(head))
    for head in order:
        coordinator[0].receive(make_contribution(head), buffer(head))
    assert torch.equal(coordinator[0].base, expected.base)


def test_a_reset_run_has_no_references() -> None:
    """reset="B": the second merge adds each product s B A, and subtracts nothing."""
    coordinator, base = make(ComposedPolicy(Average()), reset="B")
    for sequence in (1, 2):
        for head in (0, 1):
            sent = buffer(10 * sequence + head)
            base = base + dense_change_by_formula(PLAN, sent, None) / 2
            coordinator.receive(make_contribution(head, sequence), sent)
    assert_near(coordinator.base, base, 1e-14)  # as above


class Chance:
    """Decides at random what to merge, discard or wait for, and records the weights."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.weights: dict[int, float] = {}

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        heads = [p.head for p in pending if self.random.random() < 0.6]
        if not heads and roster.live <= {p.head for p in pending}:
            heads = [p.head for p in pending][:1]
        if not heads:
            return Wait("by chance")
        if self.random.random() < 0.3:
            return Discard(heads, "by chance")
        weights = {head: self.random.uniform(-1, 1) for head in self.random.sample(heads, len(heads))}
        self.weights |= weights
        if self.random.random() < 0.3:
            changes = {p.head: p.change() for p in pending if p.head in heads}
            return MergeChange(sum(w * changes[h] for h, w in weights.items()), heads)
        return Merge(weights)


@given(
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(0, 999),
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3)), min_size=1, max_size=2),
)
def test_the_base_is_the_weighted_sum_of_accepted_changes_for_every_policy(
    heads: int, rounds: int, seed: int, shapes: list[tuple[int, int, int]]
) -> None:
    """At every version, base_v - base_0 = sum of w D over the accepted contributions, where D is relative to the head's last
    accepted one. It holds for weights and replicas, and for merges of any subset."""
    plan = plan_from_shapes(shapes, [(3,)], scaling=1.5)
    policy, chance = Chance(seed), random.Random(seed + 1)
    coordinator, start = make(policy, heads, plan=plan)
    total, version = torch.zeros_like(start), 0
    accepted: dict[int, Tensor] = {}
    sequences = dict.fromkeys(range(heads), 0)
    sent: dict[int, Tensor] = {}
    for turn in range(rounds):
        for head in chance.sample(range(heads), heads):
            if head in coordinator.pending_heads:
                continue
            sequences[head] += 1
            sent[head] = buffer(1000 * turn + head, plan)
            event_result = coordinator.receive(make_contribution(head, sequences[head]), sent[head])
            version += len(event_result.merges)
            for result in event_result.results:
                assert result.sequence == sequences[result.head]
                if result.accepted:
                    change = dense_change_by_formula(plan, sent[result.head], accepted.get(result.head))
                    total += policy.weights[result.head] * change
                    accepted[result.head] = factors(sent[result.head], plan)
            assert coordinator.version == version
            assert_near(coordinator.base - start, total, 1e-12)  # up to 24 changes, each of a few float64 products


class Script:
    """Returns these decisions, one a call (each is followed by another call), then waits. Keeps its arguments."""

    def __init__(self, *decisions: Decision) -> None:
        self.decisions = list(decisions)
        self.seen: list[tuple[Sequence[Pending], Roster]] = []

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        self.seen.append((pending, roster))
        return self.decisions.pop(0) if self.decisions else Wait()


def test_merge_change_adds_exactly_what_the_policy_computed() -> None:
    """base += change; the contributions that it replaces become their heads' references."""
    change = random_flat(PLAN.base.size, 5)
    coordinator, base = make(Script(Wait(), MergeChange(change, (1, 0)), Wait(), Wait(), Merge({0: 1.0, 1: 1.0})))
    coordinator.receive(make_contribution(0), first := buffer(0))
    event_result = coordinator.receive(make_contribution(1), buffer(1))
    assert torch.equal(coordinator.base, base + change)
    assert event_result.merges[0].heads == (0, 1)
    coordinator.receive(make_contribution(0, 2), first)  # the same factors again: only the replica change is new
    coordinator.receive(make_contribution(1, 2), torch.zeros_like(first))
    expected = base + change + dense_change_by_formula(PLAN, first, factors(first))
    expected = expected + dense_change_by_formula(PLAN, torch.zeros_like(first), factors(buffer(1)))
    assert_near(coordinator.base, expected, 1e-14)  # a few float64 products


def test_a_discard_keeps_base_and_reference() -> None:
    """The result has the policy's reason; the head's next contribution is relative to the old reference."""
    coordinator, base = make(Script(Discard([0], "too old"), Wait(), Merge({0: 0.5})))
    event_result = coordinator.receive(make_contribution(0), buffer(0))
    (result,) = event_result.results
    assert (result.accepted, result.version, result.reason) == (False, 0, "the policy discarded it: too old")
    assert torch.equal(coordinator.base, base)
    assert (coordinator.version, coordinator.pending_heads, event_result.merges) == (0, [], ())
    coordinator.receive(make_contribution(0, 2), second := buffer(1))
    assert_near(coordinator.base, base + 0.5 * dense_change_by_formula(PLAN, second, None), 1e-14)  # one float64 product


def test_policies_see_pending_heads_in_order_and_the_live_heads() -> None:
    """Pending is sorted by head, with lag, counts and dense change; the roster follows heads that leave."""
    policy = Script(Wait(), Wait(), Merge({2: 1.0}), Wait(), Wait())
    coordinator, _ = make(policy, heads=3)
    coordinator.receive(make_contribution(2), buffer(2))
    coordinator.receive(make_contribution(0), buffer(0))
    coordinator.leave(1)
    pending, roster = policy.seen[1]
    assert [(p.head, p.version, p.lag, p.steps, p.samples, p.loss) for p in pending] == [
        (0, 0, 0, 3, 12, 1.0),
        (2, 0, 0, 3, 12, 1.0),
    ]
    assert_near(pending[0].change(), dense_change_by_formula(PLAN, buffer(0), None), 1e-14)  # one float64 product
    assert (roster.num_heads, roster.live, roster.version) == (3, frozenset({0, 1, 2}), 0)
    pending, roster = policy.seen[3]
    assert [(p.head, p.lag) for p in pending] == [(0, 1)]
    assert (roster.live, roster.version) == (frozenset({0, 2}), 1)


def test_a_barrier_does_not_wait_for_a_head_that_leaves() -> None:
    """The others merge without it, each with weight 1/N of the configured heads."""
    coordinator, base = make(ComposedPolicy(Average()), heads=3)
    coordinator.receive(make_contribution(0), buffer(0))
    coordinator.receive(make_contribution(2), buffer(2))
    event_result = coordinator.leave(1)
    assert [(v.head, v.accepted) for v in event_result.results] == [(0, True), (2, True)]
    expected = base + (dense_change_by_formula(PLAN, buffer(0), None) + dense_change_by_formula(PLAN, buffer(2), None)) / 3
    assert_near(coordinator.base, expected, 1e-14)  # two float64 products


def test_a_run_continues_from_its_version_and_references() -> None:
    """A coordinator with the first one's version and references merges the same."""
    first, _ = make(ComposedPolicy(Average()))
    for head in (0, 1):
        first.receive(make_contribution(head), buffer(head))
    references = {h: factors(buffer(h)).clone() for h in (0, 1)}
    second = Coordinator(first.settings, PLAN, first.base.clone(), ComposedPolicy(Average()), version=1, references=references)
    for coordinator in (first, second):
        for head in (0, 1):
            coordinator.receive(make_contribution(head, 2, version=1), buffer(5 + head))
    assert torch.equal(second.base, first.base)
    assert (second.version, first.version) == (2, 2)

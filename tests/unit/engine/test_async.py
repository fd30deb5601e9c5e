"""Heads that never wait: nothing that they learn is lost or counted twice, in any order of arrivals."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from hypothesis import settings as profile
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from lte_ray.config import MergeConfig
from lte_ray.engine.coordinator.coordinator import Coordinator, EventResult
from lte_ray.engine.coordinator.step_budget import StepBudget, StepRateEstimator
from lte_ray.engine.head.head import Head
from lte_ray.engine.prepare import prepare
from lte_ray.engine.settings import Settings
from lte_ray.errors import ConfigError, PolicyError
from lte_ray.layout import Plan, Replica
from lte_ray.merging import Decision, Discard, Merge, Pending, Roster, Wait
from lte_ray.merging.flat_buffer import as_matrix, base_replicas, factor_views, replica_views, views
from lte_ray.merging.low_rank import Share, dense_change
from lte_ray.merging.registry import make_policy
from lte_ray.messages import Contribution, ContributionResult, HeadDirective
from lte_ray.transfer.codec import Codec
from lte_ray.transfer.groups import make_groups
from tests.support import LONG_RUN
from tests.support.numerics import assert_near
from tests.support.tiny_worker import Tiny, make_settings

HEADS = 3


class Whims:
    """Merges, discards or waits as the test says."""

    def __init__(self) -> None:
        self.next: list[tuple[str, float]] = []

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        if not pending or not self.next:
            return Wait("for the test", until=roster.now + 1e9)
        what, weight = self.next.pop()
        if what == "discard":
            return Discard([pending[0].head], "the test says so")
        chosen = pending if what == "all" else pending[-1:]
        return Merge({p.head: weight for p in chosen})


class Schedules(RuleBasedStateMachine):
    """Heads train, contribute, leave and receive replies at any time; replies are late, refused or overtaken by others."""

    @initialize(transfer=st.sampled_from(["fp32", "int8"]), topk=st.sampled_from([1.0, 0.5]))
    def start(self, transfer: str, topk: float) -> None:
        plain = make_settings(heads=HEADS, steps=10_000)
        merge = MergeConfig(merge_iter=2, transfer=transfer, replica_topk=topk, wait=False)  # type: ignore[arg-type]
        self.settings: Settings = dataclasses.replace(plain, merge=merge)
        initial = prepare(Tiny(), self.settings, torch.float64)
        self.first, self.plan = initial.base, initial.plan
        self.policy = Whims()
        self.coordinator = Coordinator(self.settings, self.plan, initial.base.clone(), self.policy)
        self.codec = Codec(self.plan, make_groups(initial.plans, merge), merge, torch.float64)
        self.heads = [Head(Tiny(), self.settings, n, dtype=torch.float64) for n in range(HEADS)]
        for head in self.heads:
            head.start(0, initial.base)
        self.sent: list[tuple[Contribution, tuple[Tensor, ...]]] = []  # on their way to the coordinator
        self.answers: dict[int, tuple[ContributionResult, int, Tensor]] = {}  # on their way to a head
        self.pending: dict[int, Tensor] = {}  # decoded, at the coordinator
        self.references: dict[int, Tensor] = {}
        self.sum_of_changes = torch.zeros_like(self.first)
        self.bases = {0: initial.base.clone()}
        self.known: dict[int, dict[int, Tensor]] = {0: {}}  # references that a version holds

    def settle(self, event_result: EventResult) -> None:
        records = iter(event_result.merges)
        for result in event_result.results:
            if result.accepted and result.version not in self.bases:
                record = next(records)
                for head, weight in record.weights.items():
                    share = Share(weight, self.plan, self.pending[head], self.references.get(head))
                    self.sum_of_changes += dense_change(share)
                    self.references[head] = self.pending[head][: self.plan.factors_size].clone()
                self.bases[record.version] = self.coordinator.base.clone()
                self.known[record.version] = dict(self.references)
        for result in event_result.results:
            self.pending.pop(result.head)
            newest = self.coordinator.version
            self.answers[result.head] = (result, newest, self.bases[newest])

    @rule(head=st.integers(0, HEADS - 1), steps=st.integers(1, 3))
    def train(self, head: int, steps: int) -> None:
        self.heads[head].train(steps)

    @rule(head=st.integers(0, HEADS - 1))
    def contribute(self, head: int) -> None:
        one = self.heads[head]
        if not one.outstanding:
            contribution = one.encode(one.contribute(), self.codec)
            self.sent.append((contribution, contribution.buffer))

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), what=st.sampled_from(["one", "all", "discard", "wait"]), weight=st.sampled_from([1 / HEADS, 0.7]))
    def arrive(self, data: st.DataObject, what: str, weight: float) -> None:
        contribution, buffers = self.sent.pop(data.draw(st.integers(0, len(self.sent) - 1)))
        flat = self.codec.decode(dict(enumerate(buffers)), self.coordinator.reference(contribution.head))
        self.policy.next = [] if what == "wait" else [(what, weight)]
        self.pending[contribution.head] = flat
        self.settle(self.coordinator.receive(contribution, flat))

    @rule(what=st.sampled_from(["one", "all", "discard"]))
    def decide(self, what: str) -> None:
        self.policy.next = [(what, 1 / HEADS)]
        self.settle(self.coordinator.tick())

    @precondition(lambda self: self.answers)
    @rule(data=st.data(), ahead=st.booleans(), steps=st.integers(0, 2))
    def answer(self, data: st.DataObject, ahead: bool, steps: int) -> None:
        """Staged in advance or not, while the head takes further steps."""
        head = self.heads[data.draw(st.sampled_from(sorted(self.answers)))]
        result, version, base = self.answers.pop(head.number)
        if version <= head.version:
            head.adopt(result, version, None)
            return
        staged = head.stage(base, result.accepted) if ahead else {}
        head.train(steps)
        head.adopt(result, version, base, staged)

    @rule(head=st.integers(0, HEADS - 1))
    def receive_newer_version(self, head: int) -> None:
        """In mid-round: the reply that is on its way is then settled too, since the newer one says what its version holds."""
        one, newest = self.heads[head], self.coordinator.version
        if newest > one.version:
            result = self.answers.pop(head)[0] if head in self.answers else None
            one.adopt(result, newest, self.bases[newest])

    @invariant()
    def the_base_is_the_sum_of_what_was_accepted(self) -> None:
        if hasattr(self, "coordinator"):
            assert_near(self.coordinator.base - self.first, self.sum_of_changes, 1e-12)

    @invariant()
    def a_head_computes_with_its_base_and_what_that_lacks_of_it(self) -> None:
        """W~ + s B A = W_v + s (B A - B' A'), and p - P_v is what it trained and the base lacks."""
        for head in getattr(self, "heads", []):
            base = views(self.plan.base, self.bases[head.version])
            reference = self.known[head.version].get(head.number)
            for spec in self.plan.adapted:
                expected = as_matrix(spec, base[spec.name].clone())
                if reference is not None:
                    old = factor_views(self.plan, reference)
                    expected = expected - spec.scaling * old[spec.b_name] @ old[spec.a_name]
                actual = as_matrix(spec, head.converted.main_weights[spec.name].stored.detach())
                assert_near(actual, expected, 1e-12)


TestSchedules = Schedules.TestCase
TestSchedules.settings = profile(max_examples=60 if LONG_RUN else 12, stateful_step_count=40, deadline=None)


def started(count: int) -> tuple[Settings, list[Head], Coordinator]:
    settings = make_settings(heads=count, steps=12)
    initial = prepare(Tiny(), settings, torch.float64)
    heads = [Head(Tiny(), settings, n, dtype=torch.float64) for n in range(count)]
    for head in heads:
        head.start(0, initial.base)
    return settings, heads, Coordinator(settings, initial.plan, initial.base.clone(), make_policy(settings.merge))


class Arrivals:
    """Merges each contribution at once, with its weight in the average of all."""

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        return Merge({pending[0].head: 1 / roster.num_heads}) if pending else Wait("for any")


def test_n_arrivals_equal_one_barrier_merge_without_steps_in_between() -> None:
    """Each has its own weight, 1/N, as in the average of the paper."""
    settings, heads, barrier = started(3)
    arrivals = Coordinator(settings, barrier.plan, barrier.base.clone(), Arrivals())
    for _ in range(3):
        contributions = [head.train_round() for head in heads]
        for contribution in contributions:
            barrier.receive(contribution, contribution.buffer)
            arrivals.receive(contribution, contribution.buffer)
        assert_near(arrivals.base, barrier.base, 1e-13)
        for head, contribution in zip(heads, contributions, strict=True):
            result = ContributionResult(head.number, contribution.sequence, True, barrier.version)
            head.adopt(result, barrier.version, barrier.base.clone())
    assert (arrivals.version, barrier.version) == (9, 3)


def test_steps_in_flight_are_part_of_the_next_contribution() -> None:
    """A head that trains while its contribution is merged ends where a head ends that stops for the merge."""
    _, (head,), coordinator = started(1)
    first = head.train_round()
    head.train(2)
    (result,) = coordinator.receive(first, first.buffer).results
    head.adopt(result, 1, coordinator.base.clone())
    head.train(1)
    second = head.contribute()
    assert (second.steps, second.version, second.step) == (3, 1, 6)
    coordinator.receive(second, second.buffer)
    factors = factor_views(coordinator.plan, second.buffer[: coordinator.plan.factors_size])
    start = views(coordinator.plan.base, prepare(Tiny(), make_settings(heads=1), torch.float64).base)
    for spec in coordinator.plan.adapted:  # one head, weight 1: the base is what the head computes with
        expected = as_matrix(spec, start[spec.name].clone()) + spec.scaling * factors[spec.b_name] @ factors[spec.a_name]
        assert_near(as_matrix(spec, views(coordinator.plan.base, coordinator.base)[spec.name]), expected, 1e-13)
    own = replica_views(coordinator.plan, base_replicas(coordinator.plan, coordinator.base))
    for name, value in own.items():
        assert_near(value, dict(head.model.named_parameters())[name].detach(), 1e-13)


def test_settings_that_contradict_each_other_are_errors() -> None:
    """Before anything starts: the reset variant can't train on, and a quorum is at most the number of heads."""
    plain = make_settings(reset="B")
    with pytest.raises(ConfigError, match="--reset B and --no-wait contradict each other"):
        dataclasses.replace(plain, merge=MergeConfig(wait=False))
    with pytest.raises(ConfigError, match="--quorum is 3, but there are 2 heads: choose at most as many"):
        dataclasses.replace(make_settings(), merge=MergeConfig(when="quorum", quorum=3))


@pytest.mark.parametrize(("text", "expected"), [("", 0.0), ("30s", 30.0), ("1.5m", 90.0), ("2h", 7200.0)])
def test_times_are_read_with_their_unit(text: str, expected: float) -> None:
    """`merge_every`: without a unit, or if not positive, it is an error that says how to write it."""
    assert MergeConfig(merge_every=text).every_seconds == expected
    for wrong in ("30", "0s", "s", "-1s", "1 day"):
        with pytest.raises(ConfigError, match=r"--merge-every is .* must be a time such as 30s, 5m or 1h"):
            MergeConfig(merge_every=wrong)


def test_round_steps_follow_the_slowest_head_or_the_clock() -> None:
    """The same steps for all until speeds are known, then those that fit the slowest head's time, or the given time."""
    matched, timed, plain = (
        StepRateEstimator(m) for m in (MergeConfig(match_speed=True), MergeConfig(merge_every="2s"), MergeConfig())
    )
    for pace in (matched, timed, plain):
        assert pace.round_steps(0, {0, 1}, 0) == 10
        pace.record_steps(0, 10, 1.0)
        pace.record_steps(1, 10, 4.0)
    assert [matched.round_steps(n, {0, 1}, 0) for n in (0, 1)] == [40, 10]
    assert matched.round_steps(0, {0}, 0) == 10  # the slow one has left
    assert [timed.round_steps(n, {0, 1}, 0) for n in (0, 1)] == [20, 5]
    assert [plain.round_steps(n, {0, 1}, 0) for n in (0, 1)] == [10, 10]
    assert [plain.relative_rate(n, {0, 1}) for n in (0, 1)] == pytest.approx([0.625, 2.5])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 12), st.floats(0.01, 4)), max_size=80), st.booleans())
def test_a_shared_budget_is_used_up_exactly(rounds: list[tuple[int, int, float]], match: bool) -> None:
    """No more is granted than there is, in any order, and heads that continue to the last grant take all of it."""
    plain = make_settings(heads=4, steps=17)
    settings = dataclasses.replace(plain, merge=MergeConfig(merge_iter=5, wait=False, match_speed=match))
    pace = StepRateEstimator(settings.merge)
    budget = StepBudget(settings, pace, {})
    orders = {head: budget.next_directive(head, range(4), 0) for head in range(4)}
    taken = dict.fromkeys(range(4), 0)
    for head, steps, seconds in [*rounds, *((head, 99, 1.0) for _ in range(40) for head in range(4))]:
        now = min(steps, orders[head].limit - taken[head])
        taken[head] += now
        pace.record_steps(head, now, seconds)
        budget.record_steps(head, taken[head])
        orders[head] = budget.next_directive(head, range(4), 0)
        assert sum(order.limit for order in orders.values()) <= 4 * 17
    assert all(order.final for order in orders.values())
    assert sum(taken.values()) == 4 * 17
    assert budget.progress == 1.0


def test_a_schedule_follows_the_complete_run_if_steps_are_shared() -> None:
    """A head that takes half the steps advances twice as fast, and never goes back; at rate 1, a step each."""

    class Scheduled(Tiny):
        def build_schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> object:
            return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total_steps)

    (head,) = [Head(Scheduled(), make_settings(heads=1, steps=20), 0, dtype=torch.float64)]
    head.start(0, prepare(Scheduled(), make_settings(heads=1, steps=20), torch.float64).base)
    rates = []
    for order in (
        HeadDirective(5, 20),
        HeadDirective(5, 20, rate=2.5),
        HeadDirective(5, 20, rate=0.5, progress=0.7),
        HeadDirective(5, 20, progress=0.1),
    ):
        head.apply_directive(order)
        head.train(2)
        rates.append(head.optimizer.param_groups[0]["lr"] / 0.01)
    assert rates == pytest.approx([0.9, 0.65, 0.25, 0.15])


def test_a_head_contributes_again_what_was_discarded_unless_it_is_done() -> None:
    """A contribution that the policy discards after the head's last steps: new steps are still contributed."""
    _, (head,), _ = started(1)
    head.train(5)
    first = head.contribute()
    head.train(99)
    assert head.done
    discarded = ContributionResult(0, first.sequence, False, 0, "", discarded=True)
    head.adopt(discarded, 0, None)
    assert not head.finished
    second = head.contribute()
    assert (second.steps, second.step) == (12, 12)
    head.adopt(dataclasses.replace(discarded, sequence=second.sequence), 0, None)
    assert head.finished  # the policy discarded it


@pytest.mark.parametrize(("heads", "steps", "merge_iter"), [(8, 1, 10), (4, 30, 40), (3, 700, 10)])
def test_a_shared_budget_leaves_steps_for_every_head(heads: int, steps: int, merge_iter: int) -> None:
    """The first heads don't take everything, however few steps there are."""
    plain = make_settings(heads=heads, steps=steps)
    settings = dataclasses.replace(plain, merge=MergeConfig(merge_iter=merge_iter, wait=False))
    budget = StepBudget(settings, StepRateEstimator(settings.merge), {})
    limits = [budget.next_directive(head, range(heads), 0).limit for head in range(heads)]
    assert limits[0] <= max(2 * merge_iter, 1, heads * steps / 3)
    assert sum(limit > 0 for limit in limits) >= heads / 2


def test_running_statistics_are_averaged_under_any_policy() -> None:
    """An outer optimizer extrapolates; a variance must not become negative."""
    plan = Plan((), (Replica("weight", (2,)), Replica("running_var", (2,), buffer=True)))
    settings = dataclasses.replace(make_settings(heads=2), merge=MergeConfig(policy="nesterov"))
    coordinator = Coordinator(settings, plan, torch.ones(4, dtype=torch.float64), make_policy(settings.merge))
    for sequence in (1, 2, 3):
        for head in (0, 1):
            contribution = Contribution("test", head, 0, sequence, sequence - 1, 1, 1, 1, 0.5)
            coordinator.receive(contribution, torch.full((4,), -0.25 - 0.1 * head, dtype=torch.float64))
        mean = -(0.25 + 0.35) / 2
        assert coordinator.base[2:].tolist() == pytest.approx([1 + sequence * mean] * 2)
    assert float(coordinator.base[0]) < 1 + 3 * mean  # while the weights are extrapolated


def test_a_policy_that_asks_to_be_woken_forever_is_named() -> None:
    """Every live head waits for it, and each time it asks for more time: an error instead of a silent stall."""

    class Sleepy:
        def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
            return Wait("for better times", until=roster.now + 1)

    settings, (head,), _ = started(1)
    coordinator = Coordinator(settings, head.plan, prepare(Tiny(), settings, torch.float64).base, Sleepy())
    contribution = head.train_round()
    coordinator.receive(contribution, contribution.buffer)
    woken = (coordinator.tick() for _ in range(100))
    with pytest.raises(PolicyError, match="Sleepy waits for better times, but every live head"):
        list(woken)


def test_an_older_directive_takes_nothing_back() -> None:
    """Replies may arrive in another order than they were sent: what was granted stays granted."""
    _, (head,), _ = started(1)
    head.apply_directive(HeadDirective(5, 9, final=False))
    head.apply_directive(HeadDirective(5, 4, final=False))
    assert head.steps_left == 9
    head.apply_directive(HeadDirective(5, 9, final=True))
    head.train(99)
    assert head.done
    assert head.step == 9

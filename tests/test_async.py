"""Heads that never wait: nothing that they learn is lost or counted twice, whatever arrives when."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import hypothesis.strategies as st
import torch
from helpers import Tiny, assert_near, make_settings
from hypothesis import settings as profile
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from lte_ray.config import MergeConfig
from lte_ray.engine.coordinator import Coordinator, Outcome
from lte_ray.engine.head import Head
from lte_ray.engine.initial import prepare
from lte_ray.engine.settings import Settings
from lte_ray.merging import Decision, Discard, Merge, Pending, Roster, Wait
from lte_ray.merging.flat import as_matrix, base_replicas, factor_views, replica_views, views
from lte_ray.merging.groups import groups
from lte_ray.merging.products import Share, dense_change
from lte_ray.merging.registry import make_policy
from lte_ray.merging.transfer import Codec
from lte_ray.messages import Contribution, Verdict

HEADS = 3


class Whims:
    """Merges, discards or waits as the test says next."""

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
    """Heads train, contribute, leave and hear of merges at any time; answers are late, refused or overtaken by others."""

    @initialize(transfer=st.sampled_from(["fp32", "int8"]), topk=st.sampled_from([1.0, 0.5]))
    def start(self, transfer: str, topk: float) -> None:
        plain = make_settings(heads=HEADS, steps=10_000)
        merge = MergeConfig(merge_iter=2, transfer=transfer, replica_topk=topk, wait=False)  # type: ignore[arg-type]
        self.settings: Settings = dataclasses.replace(plain, merge=merge)
        initial = prepare(Tiny(), self.settings, torch.float64)
        self.first, self.plan = initial.base, initial.plan
        self.policy = Whims()
        self.coordinator = Coordinator(self.settings, self.plan, initial.base.clone(), self.policy)
        self.codec = Codec(self.plan, groups(initial.plans, merge), merge, torch.float64)
        self.heads = [Head(Tiny(), self.settings, n, dtype=torch.float64) for n in range(HEADS)]
        for head in self.heads:
            head.start(0, initial.base)
        self.sent: list[tuple[Contribution, tuple[Tensor, ...]]] = []  # on their way to the coordinator
        self.answers: dict[int, tuple[Verdict, int, Tensor]] = {}  # on their way to a head
        self.pending: dict[int, Tensor] = {}  # decoded, at the coordinator
        self.references: dict[int, Tensor] = {}
        self.ledger = torch.zeros_like(self.first)
        self.bases = {0: initial.base.clone()}
        self.known: dict[int, dict[int, Tensor]] = {0: {}}  # references that a version holds

    def settle(self, outcome: Outcome) -> None:
        records = iter(outcome.merges)
        for verdict in outcome.verdicts:
            if verdict.accepted and verdict.version not in self.bases:
                record = next(records)
                for head, weight in record.weights.items():
                    share = Share(weight, self.plan, self.pending[head], self.references.get(head))
                    self.ledger += dense_change(share)
                    self.references[head] = self.pending[head][: self.plan.factors_size].clone()
                self.bases[record.version] = self.coordinator.base.clone()
                self.known[record.version] = dict(self.references)
        for verdict in outcome.verdicts:
            self.pending.pop(verdict.head)
            newest = self.coordinator.version
            self.answers[verdict.head] = (verdict, newest, self.bases[newest])

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
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        head = data.draw(st.sampled_from(sorted(self.answers)))
        verdict, version, base = self.answers.pop(head)
        self.heads[head].adopt(verdict, version, base if version > self.heads[head].version else None)

    @rule(head=st.integers(0, HEADS - 1))
    def hear_of_a_newer_version(self, head: int) -> None:
        """Mid-round: an answer that is on its way is then settled with it, as the update says what the version holds."""
        one, newest = self.heads[head], self.coordinator.version
        if newest > one.version:
            verdict = self.answers.pop(head)[0] if head in self.answers else None
            one.adopt(verdict, newest, self.bases[newest])

    @invariant()
    def the_base_is_the_sum_of_what_was_accepted(self) -> None:
        if hasattr(self, "coordinator"):
            assert_near(self.coordinator.base - self.first, self.ledger, 1e-12)

    @invariant()
    def a_head_computes_with_its_base_and_what_that_lacks_of_it(self) -> None:
        """W~ + s B A = W_v + s (B A - B' A'), and p - P_v is what it trained and the base lacks."""
        for head in getattr(self, "heads", []):
            base = views(self.plan.base, self.bases[head.version])
            reference = self.known[head.version].get(head.head)
            for spec in self.plan.adapted:
                expected = as_matrix(spec, base[spec.name].clone())
                if reference is not None:
                    old = factor_views(self.plan, reference)
                    expected = expected - spec.scaling * old[spec.b] @ old[spec.a]
                found = as_matrix(spec, head.converted.mains[spec.name].stored.detach())
                assert_near(found, expected, 1e-12)


TestSchedules = Schedules.TestCase
TestSchedules.settings = profile(max_examples=60, stateful_step_count=40, deadline=None)


def started(count: int) -> tuple[Settings, list[Head], Coordinator]:
    settings = make_settings(heads=count, steps=12)
    initial = prepare(Tiny(), settings, torch.float64)
    heads = [Head(Tiny(), settings, n, dtype=torch.float64) for n in range(count)]
    for head in heads:
        head.start(0, initial.base)
    return settings, heads, Coordinator(settings, initial.plan, initial.base.clone(), make_policy(settings.merge))


class Arrivals:
    """Merges each contribution at once, with the weight that it has in the average of all."""

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        return Merge({pending[0].head: 1 / roster.num_heads}) if pending else Wait("for any")


def test_n_arrivals_are_one_barrier_merge_if_nobody_trains_in_between() -> None:
    """Each carries its own weight, 1/N (DESIGN 3.3)."""
    settings, heads, barrier = started(3)
    arrivals = Coordinator(settings, barrier.plan, barrier.base.clone(), Arrivals())
    for _ in range(3):
        contributions = [head.train_round() for head in heads]
        for contribution in contributions:
            barrier.receive(contribution, contribution.buffer)
            arrivals.receive(contribution, contribution.buffer)
        assert_near(arrivals.base, barrier.base, 1e-13)
        for head, contribution in zip(heads, contributions, strict=True):
            verdict = Verdict(head.head, contribution.sequence, True, barrier.version)
            head.adopt(verdict, barrier.version, barrier.base.clone())
    assert (arrivals.version, barrier.version) == (9, 3)


def test_steps_in_flight_ride_in_the_next_contribution() -> None:
    """A head that trained on while its contribution was merged ends where one ends that is merged without a stop."""
    _, (head,), coordinator = started(1)
    first = head.train_round()
    head.train(2)
    (verdict,) = coordinator.receive(first, first.buffer).verdicts
    head.adopt(verdict, 1, coordinator.base.clone())
    head.train(1)
    second = head.contribute()
    assert (second.steps, second.version, second.step) == (3, 1, 6)
    coordinator.receive(second, second.buffer)
    factors = factor_views(coordinator.plan, second.buffer[: coordinator.plan.factors_size])
    start = views(coordinator.plan.base, prepare(Tiny(), make_settings(heads=1), torch.float64).base)
    for spec in coordinator.plan.adapted:  # one head, weight 1: the base is what the head computes with
        expected = as_matrix(spec, start[spec.name].clone()) + spec.scaling * factors[spec.b] @ factors[spec.a]
        assert_near(as_matrix(spec, views(coordinator.plan.base, coordinator.base)[spec.name]), expected, 1e-13)
    own = replica_views(coordinator.plan, base_replicas(coordinator.plan, coordinator.base))
    for name, value in own.items():
        assert_near(value, dict(head.model.named_parameters())[name].detach(), 1e-13)

"""A head that died continues from what the base holds of it: it contributes only what it trains, and no batch is lost."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import lr_scheduler

from lte_ray.data import Shard
from lte_ray.data.partition import Partition, slots
from lte_ray.engine.coordinator.coordinator import Coordinator, EventResult
from lte_ray.engine.head.head import Head
from lte_ray.engine.head.snapshot import SavedState, rejoin
from lte_ray.engine.prepare import prepare
from lte_ray.engine.settings import Settings
from lte_ray.merging import Average, ComposedPolicy
from lte_ray.merging.flat_buffer import views
from lte_ray.merging.policy import Decision, Merge, Pending, Roster, Wait
from lte_ray.messages import CommittedPosition, Contribution, ContributionResult
from tests.support.dense_reference import dense_change_by_formula
from tests.support.head_states import head_state, through_file
from tests.support.numerics import assert_near
from tests.support.tiny_worker import Tiny, make_settings


@dataclass
class Falling(Tiny):
    """With a learning rate that falls after every step, in any floating-point type."""

    dtype: str = "float64"

    def build_model(self) -> nn.Module:
        return super().build_model().to(getattr(torch, self.dtype))

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        words, following = batch
        return nn.functional.cross_entropy(model(words).float(), following)

    def build_schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> lr_scheduler.LRScheduler:
        return lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total_steps)


class EachAtOnce:
    """Merges every contribution as it arrives."""

    def decide(self, pending: list[Pending], roster: Roster) -> Decision:
        return Merge({pending[0].head: 1 / roster.num_heads}) if pending else Wait()


MERGING = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.float32}


def trained(dtype: str, reset: str = "none") -> tuple[Head, Settings, list[Tensor], SavedState]:
    """A head merged into version 1 that has trained since; the bases of versions 1 and 2; and its state at version 1."""
    worker, settings = Falling(dtype=dtype, optimizer="sgd"), make_settings(steps=90, reset=reset)
    first = prepare(worker, settings, MERGING[dtype]).base
    noise = torch.randn(2, len(first), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    bases = [first + (0.05 * each).to(first.dtype) for each in noise]
    head = Head(worker, settings, 1, dtype=MERGING[dtype])
    head.start(0, first)
    head.train_round()
    head.adopt(ContributionResult(1, 1, True, 1), 1, bases[0])
    state = head_state(head)
    head.train(2)
    return head, settings, bases, through_file(state)


def merged(head: Head) -> CommittedPosition:
    """The coordinator's position of the head in versions 1 and 2: three batches of three steps."""
    return CommittedPosition(0, 1, 1, 3, 12, 3, (Partition(7, 2),))


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("reset", ["none", "B"])
@pytest.mark.parametrize("dtype", MERGING)
def test_a_rejoined_head_contributes_nothing_that_it_has_not_trained(dtype: str, reset: str, saved: bool) -> None:
    """Its first contribution, without a step, is D = 0 to the last bit, and it computes with W_v alone."""
    dead, settings, bases, state = trained(dtype, reset)
    head = Head(Falling(dtype=dtype), settings, 1, dtype=MERGING[dtype], incarnation=1)
    reference = None if dead.state.reference is None else dead.state.reference.clone()
    assert rejoin(head, merged(dead), reference, 2, bases[1], state if saved else None) == ""
    contribution = head.contribute()
    assert not dense_change_by_formula(head.plan, contribution.buffer, reference).any()
    numbers = (contribution.incarnation, contribution.sequence, contribution.version, contribution.steps, contribution.samples)
    assert numbers == (1, 2, 2, 0, 0)
    parameters, base = dict(head.model.named_parameters()), views(head.plan.base, bases[1])
    for name, replica in head.converted.replicas().items():
        assert torch.equal(replica, base[name].to(replica.dtype))
    for spec in head.plan.adapted if dtype == "float64" else ():
        b, a = head.converted.factors[spec.b_name], head.converted.factors[spec.a_name]
        assert_near(parameters[spec.name] + spec.scaling * b @ a, base[spec.name], 1e-15)


def test_a_rejoined_head_trains_what_was_not_merged() -> None:
    """Its data, step, samples and learning rate continue after the last merged batch."""
    dead, settings, bases, _ = trained("float64")
    head = Head(Falling(), settings, 1, dtype=torch.float64, incarnation=1)
    rejoin(head, merged(dead), dead.state.reference, 2, bases[1], None)
    assert (head.step, head.samples, head.batch_stream.batches_taken, head.batch_stream.partitions) == (3, 12, 3, ((7, 2),))
    assert {group["lr"] for group in head.optimizer.param_groups} == {0.01 * (1 - 3 / 90)}
    assert not head.optimizer.state
    words = torch.arange(96) * 5 % 7
    fourth = next(Shard(1, 2, settings.train.seed).at(3).indices(96, 4))
    assert torch.equal(head.next_batch()[0], words[fourth])
    assert head.batch_stream.partitions == ((9, 2),)


def test_a_rejoined_head_has_the_optimizer_of_its_last_checkpoint() -> None:
    """Momentum as saved, the learning rate at least that of the merged steps; A too, where B is reset."""
    dead, settings, bases, state = trained("float64", "B")
    head = Head(Falling(), settings, 1, dtype=torch.float64, incarnation=1)
    drawn = {name: p.detach().clone() for name, p in head.converted.factors.items()}
    assert rejoin(head, replace(merged(dead), step=30), None, 2, bases[1], state) == ""
    actual = [entry["momentum_buffer"] for entry in head.optimizer.state.values()]
    assert len(actual) == sum(name.endswith("momentum_buffer") for name in state[0]) > 0
    for index, entry in head.optimizer.state_dict()["state"].items():
        assert torch.equal(entry["momentum_buffer"], state[0][f"optimizer.{index}.momentum_buffer"])
    assert {group["lr"] for group in head.optimizer.param_groups} == {0.01 * (1 - 30 / 90)}
    for spec in head.plan.adapted:
        assert torch.equal(head.converted.factors[spec.a_name], state[0][f"factor.{spec.a_name}"])
        assert not torch.equal(head.converted.factors[spec.a_name], drawn[spec.a_name])
        assert not head.converted.factors[spec.b_name].any()


@pytest.mark.parametrize("missing", ["optimizer", "groups", "factor", "shape"])
def test_a_head_rejoins_without_a_saved_state_that_cannot_be_used(missing: str) -> None:
    """It names what is missing, starts with a new optimizer, and contributes nothing that it hasn't trained."""
    dead, settings, bases, (tensors, meta) = trained("float64", "B")
    if missing == "optimizer":
        meta = {name: value for name, value in meta.items() if name != missing}
    elif missing == "factor":
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("factor.")}
    elif missing == "shape":
        tensors = tensors | {"optimizer.1.momentum_buffer": torch.zeros(3, dtype=torch.float64)}
    else:
        meta = meta | {"optimizer": meta["optimizer"] | {"param_groups": []}}
    head = Head(Falling(), settings, 1, dtype=torch.float64, incarnation=1)
    lacks = rejoin(head, merged(dead), None, 2, bases[1], (tensors, meta))
    error = "ValueError" if missing in ("groups", "shape") else "KeyError"
    assert lacks.startswith(f"its saved optimizer state can't be used ({error}: ")
    assert ("momentum_buffer of up.weight" in lacks and "the shape (3,), expected (8, 2)" in lacks) == (missing == "shape")
    assert not head.optimizer.state
    head.train(1)
    assert head.contribute().steps == 1


def test_a_fresh_head_starts_with_b_zero() -> None:
    """Its predecessor's factors stay in the base as plain weights; it draws its own A, and contributes what it trains."""
    dead, settings, bases, _ = trained("float64")
    head = Head(Falling(), settings, 1, dtype=torch.float64, incarnation=1)
    rejoin(head, merged(dead), None, 2, bases[1], None)
    assert head.state.reference is None
    assert all(not head.converted.factors[spec.b_name].any() for spec in head.plan.adapted)
    parameters = dict(head.model.named_parameters())
    for spec in head.plan.adapted:
        assert torch.equal(parameters[spec.name], views(head.plan.base, bases[1])[spec.name])
    assert not dense_change_by_formula(head.plan, head.contribute().buffer, None).any()


class World:
    """Heads that die at any time and a coordinator, with a dense account of what was merged, and of which batches."""

    def __init__(self, policy: str, heads: int = 3) -> None:
        self.worker, self.settings = Tiny(), make_settings(heads=heads, steps=1000)
        initial = prepare(self.worker, self.settings, torch.float64)
        self.plan, self.first = initial.plan, initial.base
        rule = EachAtOnce() if policy == "arrival" else ComposedPolicy(Average())
        self.coordinator = Coordinator(self.settings, self.plan, initial.base.clone(), rule)  # type: ignore[arg-type]
        self.sum_of_changes, self.references = torch.zeros_like(self.first), dict[int, Tensor | None]()
        self.heads = {n: Head(self.worker, self.settings, n, dtype=torch.float64) for n in range(heads)}
        self.since: dict[int, list[int]] = {n: [] for n in range(heads)}  # batches since the last contribution
        self.offered: dict[int, tuple[Contribution, list[int]]] = {}
        self.merged: list[int] = []
        self.deaths = dict.fromkeys(range(heads), 0)
        for head in self.heads.values():
            head.start(0, self.first)

    def train(self, n: int, steps: int) -> None:
        """Also while its contribution is pending."""
        self.since[n] += itertools.islice(slots(self.heads[n].batch_stream.partitions), steps)
        self.heads[n].train(steps)

    def contribute(self, n: int) -> None:
        if self.heads[n].outstanding:
            return
        contribution = self.heads[n].contribute()
        self.offered[n] = (replace(contribution, buffer=contribution.buffer.clone()), self.since[n])
        self.since[n] = []
        self.settle(self.coordinator.receive(contribution, contribution.buffer))

    def settle(self, event_result: EventResult) -> None:
        for record in event_result.merges:
            for n, weight in record.weights.items():
                contribution, batches = self.offered.pop(n)
                self.sum_of_changes += weight * dense_change_by_formula(self.plan, contribution.buffer, self.references.get(n))
                self.references[n] = contribution.buffer[: self.plan.factors_size]
                self.merged += batches
        base = self.coordinator.base.clone()
        for result in event_result.results:
            assert result.accepted, result
            head = self.heads[result.head]
            if head.outstanding and head.sequence == result.sequence:
                head.adopt(result, self.coordinator.version, base)

    def kill(self, n: int, fresh: bool) -> None:
        """What it trained and didn't contribute is lost; what it contributed is merged, before or after it is back."""
        self.deaths[n] += 1
        self.settle(self.coordinator.lose(n))
        if n in self.coordinator.pending_heads:  # without it the barrier merges once all others have contributed
            for other in sorted(self.coordinator.live):
                self.contribute(other)
        self.coordinator.join(n, self.deaths[n], fresh=fresh)
        self.since[n] = []
        standing, reference = self.coordinator.start_head(n), self.coordinator.reference(n)
        if fresh:
            self.references.pop(n, None)
        assert (reference is None) == (self.references.get(n) is None)
        head = self.heads[n] = Head(self.worker, self.settings, n, dtype=torch.float64, incarnation=self.deaths[n])
        rejoin(head, standing, reference, self.coordinator.version, self.coordinator.base.clone(), None)

    def check(self) -> None:
        # Some thirty merges of values of size 1.
        assert_near(self.coordinator.base - self.first, self.sum_of_changes, 1e-13)
        assert len(set(self.merged)) == len(self.merged)
        remaining = [partition for n in self.heads for partition in self.coordinator.assignor.start_head(n)]
        until = max(self.merged, default=0) + 10
        assert sorted([*self.merged, *itertools.takewhile(lambda slot: slot < until, slots(remaining))]) == list(range(until))


@given(
    st.sampled_from(["arrival", "barrier"]),
    st.lists(
        st.tuples(st.sampled_from(["train", "train", "contribute", "contribute", "kill", "fresh"]), st.integers(0, 2)),
        max_size=40,
    ),
)
def test_after_deaths_nothing_is_lost_or_counted_twice(policy: str, events: list[tuple[str, int]]) -> None:
    """W_v - W_0 = sum of w D of what was merged, replicas too; each batch is merged once, or was lost in a death."""
    world = World(policy)
    for what, n in events:
        if what == "train":
            world.train(n, 1 + n)
        elif what == "contribute":
            world.contribute(n)
        else:
            world.kill(n, what == "fresh")
    world.check()
    for n in world.heads:  # all can continue
        world.train(n, 2)
        world.contribute(n)
    world.check()
    assert world.coordinator.version > 0

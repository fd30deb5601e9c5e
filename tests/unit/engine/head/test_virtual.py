"""Virtual heads: several heads in one process compute what they would compute separately, in turns or as one batch."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.data import Shard
from lte_ray.engine.coordinator.coordinator import Coordinator
from lte_ray.engine.head.head import Head
from lte_ray.engine.head.snapshot import restore
from lte_ray.engine.head.virtual import HeadGroup, Unstackable
from lte_ray.engine.in_process import InProcessRun, run_in_process
from lte_ray.engine.prepare import prepare
from lte_ray.engine.settings import Settings
from lte_ray.errors import WorkerFailed
from lte_ray.merging import Average, ComposedPolicy, Decision, Merge, Pending, Roster, Wait
from lte_ray.merging.flat_buffer import views
from lte_ray.worker import seed_everything
from tests.support.head_states import head_state
from tests.support.numerics import assert_near
from tests.support.tiny_worker import Tiny, make_settings

STACKED = 1e-12
"""Relative error that batching may cause in a complete run in float64: other orders of sums of at most a few hundred terms."""


class Images(nn.Module):
    """Convolution, batch normalization, attention and a lone parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 6, 3, groups=2, padding=1), nn.BatchNorm2d(6)
        self.mix = nn.MultiheadAttention(6, 2, batch_first=True)
        self.shift = nn.Parameter(torch.zeros(16, 6))
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x))).flatten(2).transpose(1, 2) + self.shift
        return self.out((x + self.mix(x, x, x, need_weights=False)[0]).mean(1))


class Pictures:
    """Learns to tell three classes of random pictures apart."""

    def __init__(self, ragged: bool = False) -> None:
        self.ragged = ragged

    def build_model(self) -> nn.Module:
        return Images().double()

    def train_batches(self, shard: Shard) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(96, 2, 4, 4, generator=generator, dtype=torch.float64), torch.arange(96) % 3
        for rows in shard.indices(96, 6):
            kept = rows[: 6 - shard.head] if self.ragged else rows
            yield {"x": x[kept], "y": y[kept]}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["x"]), batch["y"])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {}


def pictures(**train: object) -> Settings:
    lte = LTEConfig(num_heads=4, lora_r=2, lora_alpha=4.0, lora_bias="lora", adapt=("linear", "attention", "conv", "norm"))
    return dataclasses.replace(make_settings(), lte=lte, train=TrainConfig(steps=9, seed=1, optimizer="adamw", **train))  # type: ignore[arg-type]


def assert_same_run(together: InProcessRun, apart: InProcessRun, tolerance: float) -> None:
    """The bases and every head's factors, replicas and losses agree."""
    assert_near(together.base, apart.base, tolerance)
    for one, other in zip(together.heads, apart.heads, strict=True):
        (tensors, _), (others, _) = head_state(one), head_state(other)
        assert tensors.keys() == others.keys()
        for name in tensors:
            if not name.startswith("rng."):
                assert_near(tensors[name], others[name], tolerance)
    for merge, other_merge in zip(together.merges, apart.merges, strict=True):
        assert merge.losses == pytest.approx(other_merge.losses, rel=max(tolerance, 1e-15))


@pytest.mark.sweep
@pytest.mark.parametrize("reset", ["none", "B"])
@pytest.mark.parametrize("heads_per_actor", [2, 3, 5])
def test_heads_that_take_turns_equal_separate_ones_bitwise(reset: str, heads_per_actor: int) -> None:
    """With dropout: each head has its own generators, and folds its own reference into the shared main weights."""
    settings, worker = make_settings(heads=5, steps=11, reset=reset), Tiny(dropout=0.3, optimizer="adamw")
    apart = run_in_process(worker, settings, torch.float64)
    together = run_in_process(worker, settings, torch.float64, heads_per_actor=heads_per_actor)
    assert torch.equal(together.base, apart.base)
    assert [m.losses for m in together.merges] == [m.losses for m in apart.merges]


@pytest.mark.sweep
@pytest.mark.parametrize("reset", ["none", "B"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lora-muon"])
def test_stacked_heads_equal_separate_ones(reset: str, optimizer: str) -> None:
    """One batched computation gives every head its own gradients, for any optimizer; tied weights are one."""
    settings, worker = make_settings(heads=5, steps=11, reset=reset), Tiny(optimizer=optimizer)
    together = run_in_process(worker, settings, torch.float64, heads_per_actor=5, stack_heads="always")
    assert_same_run(together, run_in_process(worker, settings, torch.float64), STACKED)


@pytest.mark.parametrize("train", [{}, {"accumulate": 2}, {"clip_norm": 0.1}])
def test_stacked_convolutions_norms_and_attention_equal_separate_ones(train: dict[str, object]) -> None:
    """Also running statistics, vector adapters, accumulated and clipped gradients."""
    settings = pictures(**train)
    together = run_in_process(Pictures(), settings, torch.float64, heads_per_actor=4, stack_heads="always")
    assert_same_run(
        together, run_in_process(Pictures(), settings, torch.float64), 1e-9
    )  # batch norms divide by small deviations


@dataclasses.dataclass
class Disturbing:
    """Averages, and draws from the global generators, as an evaluation between rounds may."""

    seed: int

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        seed_everything(self.seed)
        torch.rand(self.seed)
        self.seed += 1
        return ComposedPolicy(Average()).decide(pending, roster)


@pytest.mark.parametrize("heads_per_actor", [2, 4])
def test_stacked_heads_draw_from_their_own_generators(heads_per_actor: int) -> None:
    """Dropout is bitwise the same whatever draws from the global generators, which stacked heads don't change."""

    def run(policy: object, dropout: float = 0.3) -> InProcessRun:
        settings = make_settings(heads=4, steps=9, policy=policy)
        return run_in_process(
            Tiny(dropout=dropout), settings, torch.float64, heads_per_actor=heads_per_actor, stack_heads="always"
        )

    torch.manual_seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first = run("average")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    torch.manual_seed(2)
    for again in (run("average"), run(Disturbing(5)), run(Disturbing(50))):
        assert torch.equal(again.base, first.base)
        assert [m.losses for m in again.merges] == [m.losses for m in first.merges]
    assert not torch.allclose(run("average", dropout=0.0).base, first.base, atol=1e-3)


class Chance(Tiny):
    """Its loss is a random number."""

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return 0.0 * super().loss(model, batch) + torch.rand(())


def test_stacked_heads_draw_numbers_of_their_own_and_new_ones_each_step() -> None:
    """No two heads share a dropout mask, and no round repeats one."""
    run = run_in_process(
        Chance(), make_settings(heads=3, steps=4, merge_iter=1), torch.float64, heads_per_actor=3, stack_heads="always"
    )
    assert len({loss for merge in run.merges for loss in merge.losses.values()}) == 12


class Plenty(Tiny):
    """Tiny with data for 32 heads, each of which sees other words."""

    def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        words = torch.randint(7, (640,), generator=torch.Generator().manual_seed(0))
        for indices in shard.indices(640, 4):
            yield words[indices], (words[indices] * 3 + 1) % 7


@pytest.mark.slow
@pytest.mark.parametrize("stack", ["never", "always"])
def test_thirty_two_heads_train_in_one_process_or_two(stack: str) -> None:
    """In two merges: bitwise equal to separate heads in turns, and up to the order of sums when stacked."""
    settings = make_settings(heads=32, steps=6)
    apart = run_in_process(Plenty(), settings, torch.float64)
    assert not torch.allclose(apart.base, prepare(Plenty(), settings, torch.float64).base, atol=1e-3)
    factors = [torch.cat([p.flatten() for p in head.converted.factors.values()]) for head in apart.heads]
    assert len({tuple(f.tolist()) for f in factors}) == 32  # each trained on its own
    for heads_per_actor in (32, 16):
        together = run_in_process(Plenty(), settings, torch.float64, heads_per_actor=heads_per_actor, stack_heads=stack)
        assert [m.heads for m in together.merges] == [tuple(range(32))] * 2
        assert all(head.step == 6 for head in together.heads)
        assert_same_run(together, apart, 0.0 if stack == "never" else STACKED)


def test_one_process_holds_one_copy_of_the_main_weights() -> None:
    """All heads of a group compute with the same main weights; each has its own factors and replicas."""
    for stack in ("always", "never"):
        settings = make_settings(heads=32)
        first, *others = HeadGroup(Tiny(), settings, range(32), dtype=torch.float64, stack_heads=stack).heads
        for other in others:
            for name, main in first.converted.main_weights.items():
                assert other.converted.main_weights[name].stored is main.stored
            theirs = {p.data_ptr() for p in other.trained_parameters.values()}
            assert not theirs & {p.data_ptr() for p in first.trained_parameters.values()}
            assert len(theirs) == 2 * 3 + 7  # factors of three weights, and seven replicas


def test_heads_rebase_onto_versions_that_lack_their_contribution() -> None:
    """A policy that merges two heads at a time has heads of one group adopt different contributions; nothing is lost."""

    class Two:
        def decide(self, pending: list[Pending], roster: Roster) -> object:
            if len(pending) < min(2, len(roster.live)) or not pending:
                return Wait("for a second")
            return Merge({p.head: 1 / roster.num_heads for p in pending})

    settings = make_settings(heads=4, policy=Two())
    runs = [run_in_process(Tiny(), settings, torch.float64, heads_per_actor=4, stack_heads=s) for s in ("never", "always")]
    assert_near(runs[0].base, runs[1].base, STACKED)
    assert all(head.step == 12 for run in runs for head in run.heads)
    assert len(runs[0].merges) == 8


def test_what_cannot_be_stacked_is_an_error_or_done_in_turns() -> None:
    """Batches of different sizes, and different ranks: an error if heads must be stacked, else turns."""
    settings = pictures()
    with pytest.raises(Unstackable, match="stack expects each tensor to be equal size"):
        run_in_process(Pictures(ragged=True), settings, torch.float64, heads_per_actor=4, stack_heads="always")
    ranks = dataclasses.replace(settings, lte=dataclasses.replace(settings.lte, lora_r=(1, 2, 2, 2)))
    with pytest.raises(Unstackable, match="heads of equal rank"):
        run_in_process(Pictures(), ranks, torch.float64, heads_per_actor=4, stack_heads="always")

    group = HeadGroup(Pictures(ragged=True), settings, range(4), dtype=torch.float64, stack_heads="always")
    group._must_stack = False  # as "auto" on a GPU
    alone = Head(Pictures(ragged=True), settings, 3, dtype=torch.float64)
    base = prepare(Pictures(), settings, torch.float64).base
    for head in [*group.heads, alone]:
        head.start(0, base)
    last = group.train_round()[3]
    assert not group.vmapped
    assert "equal size" in group.sequential_reason
    assert_near(last.buffer, alone.train_round().buffer, 1e-9)
    assert last.samples == 9  # 3 steps of 3 samples: the batches that couldn't be stacked weren't dropped


def test_stacked_heads_continue_from_a_saved_state() -> None:
    """States of separate heads, restored into a stacked group, continue as the separate heads do."""
    settings = make_settings(heads=3, steps=12)
    whole = run_in_process(Tiny(), settings, torch.float64)
    half = run_in_process(
        Tiny(), dataclasses.replace(settings, train=dataclasses.replace(settings.train, steps=6)), torch.float64
    )
    group = HeadGroup(Tiny(), settings, range(3), dtype=torch.float64, stack_heads="always")
    base = half.base.clone()
    for head, saved in zip(group.heads, half.heads, strict=True):
        restore(head, head_state(saved), base)
    contributions = group.train_round()
    assert [c.sequence for c in contributions] == [3, 3, 3]
    assert contributions[1].loss == pytest.approx(whole.merges[2].losses[1], rel=1e-12)


def test_heads_of_one_actor_may_be_answered_in_any_order() -> None:
    """One is merged after its neighbor but adopts first: both end on the newest version, which holds their work once."""
    settings = make_settings(heads=2)
    for stack in ("never", "always"):
        group = HeadGroup(Tiny(), settings, range(2), dtype=torch.float64, stack_heads=stack)
        coordinator = Coordinator(settings, group.heads[0].plan, prepare(Tiny(), settings, torch.float64).base, OneByOne())
        for head in group.heads:
            head.start(0, coordinator.base.clone())
        for _ in range(2):
            first, second = group.train_round()
            answers = {}
            for contribution in (second, first):  # each is merged at once: the first head's is in the newer version
                (result,) = coordinator.receive(contribution, contribution.buffer).results
                answers[result.head] = (result, coordinator.version, coordinator.base.clone())
            for head in group.heads:
                head.adopt(*answers[head.number])
            for head in group.heads:
                head.catch_up()
        newest = views(group.heads[0].plan.base, coordinator.base)
        for head in group.heads:
            assert head.version == coordinator.version == 4
            head.prepare_to_train()
            with head.converted.user_parameters.track():
                for name in ("up", "mid", "down"):
                    in_use = getattr(head.model, name).weight + 0.0
                    assert_near(in_use.detach(), newest[f"{name}.weight"], 1e-14)


class OneByOne:
    """Merges every contribution at once."""

    def decide(self, pending: list[Pending], roster: Roster) -> object:
        return Merge({pending[0].head: 0.5}) if pending else Wait("for any")


class Averaging(Tiny):
    """Keeps a moving average of a layer in a parameter that doesn't train."""

    def build_model(self) -> nn.Module:
        model = super().build_model()
        model.slow = nn.Parameter(model.up.weight.detach().clone(), requires_grad=False)
        return model

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.no_grad():
            model.slow.mul_(0.9).add_(0.1)
        return super().loss(model, batch)


def test_a_model_that_writes_to_frozen_parameters_is_an_error() -> None:
    """Virtual heads would share them, and checkpoints would lose them: the first round raises an error."""
    for heads_per_actor in (1, 2):
        with pytest.raises(WorkerFailed, match=r"writes to slow, .* Make them buffers"):
            run_in_process(Averaging(), make_settings(), torch.float64, heads_per_actor=heads_per_actor)


def test_heads_of_one_actor_may_be_at_different_steps() -> None:
    """A head that is done leaves; the others continue, stacked or not."""
    settings = make_settings(heads=2, steps=12)
    for stack in ("never", "always"):
        group = HeadGroup(Tiny(), settings, range(2), dtype=torch.float64, stack_heads=stack)
        for head in group.heads:
            head.start(0, prepare(Tiny(), settings, torch.float64).base)
        group.heads[0].state.step = 9
        first, second = group.train_round()
        assert (first.step, second.step) == (12, 3)
        for head in group.heads:
            head.state.pending = None
        (alone,) = group.train_round()
        assert (alone.head, alone.step, alone.steps) == (1, 6, 6)


@pytest.mark.sweep
@pytest.mark.parametrize("stack", ["never", "always"])
@pytest.mark.parametrize("quorum", [1, 2])
def test_heads_of_one_actor_continue_when_their_own_contribution_is_merged(stack: str, quorum: int) -> None:
    """With a quorum some have an answer and others don't: none waits forever, and all steps are merged."""
    plain = make_settings(heads=3, steps=12)
    settings = dataclasses.replace(plain, merge=MergeConfig(merge_iter=3, when="quorum", quorum=quorum))
    together = run_in_process(Tiny(), settings, torch.float64, heads_per_actor=3, stack_heads=stack)
    assert sum(merge.steps for merge in together.merges) == 3 * 12
    assert all(head.finished for head in together.heads)

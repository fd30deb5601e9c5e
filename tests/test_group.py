"""Virtual heads: several heads in one process compute what they would compute apart, in turns or as one batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from helpers import Tiny, assert_near, make_settings
from torch import Tensor, nn

from lte_ray.config import LTEConfig, TrainConfig
from lte_ray.data import Shard
from lte_ray.engine.group import HeadGroup
from lte_ray.engine.head import Head
from lte_ray.engine.initial import prepare
from lte_ray.engine.settings import Settings
from lte_ray.engine.simulate import Simulated, simulate
from lte_ray.engine.stack import Unstackable
from lte_ray.merging import Merge, Pending, Roster, Wait

STACKED = 1e-12
"""Relative error that batching may cause over a whole run in float64: other orders of sums of at most a few hundred terms."""


class Images(nn.Module):
    """Convolution, batch normalisation, attention and a lone parameter."""

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
    return dataclasses.replace(make_settings(), lte=lte, train=TrainConfig(steps=9, seed=1, **train))  # type: ignore[arg-type]


def assert_same_run(together: Simulated, apart: Simulated, tolerance: float) -> None:
    """The bases and every head's factors, replicas and losses agree."""
    assert_near(together.base, apart.base, tolerance)
    for one, other in zip(together.heads, apart.heads, strict=True):
        (tensors, _), (others, _) = one.state(), other.state()
        assert tensors.keys() == others.keys()
        for name in tensors:
            if not name.startswith("rng."):
                assert_near(tensors[name], others[name], tolerance)
    for merge, other_merge in zip(together.merges, apart.merges, strict=True):
        assert merge.losses == pytest.approx(other_merge.losses, rel=max(tolerance, 1e-15))


@pytest.mark.parametrize("reset", ["none", "B"])
@pytest.mark.parametrize("heads_per_actor", [2, 3, 5])
def test_heads_that_take_turns_are_bitwise_those_apart(reset: str, heads_per_actor: int) -> None:
    """Dropout included: each head has its own generators, and folds its own reference into the shared main weights."""
    settings, worker = make_settings(heads=5, steps=11, reset=reset), Tiny(dropout=0.3, optimizer="adamw")
    apart = simulate(worker, settings, torch.float64)
    together = simulate(worker, settings, torch.float64, heads_per_actor=heads_per_actor)
    assert torch.equal(together.base, apart.base)
    assert [m.losses for m in together.merges] == [m.losses for m in apart.merges]


@pytest.mark.parametrize("reset", ["none", "B"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_stacked_heads_are_those_apart(reset: str, optimizer: str) -> None:
    """One batched computation gives every head its own gradients, whatever its optimizer; tied weights are one."""
    settings, worker = make_settings(heads=5, steps=11, reset=reset), Tiny(optimizer=optimizer)
    together = simulate(worker, settings, torch.float64, heads_per_actor=5, stack="always")
    assert_same_run(together, simulate(worker, settings, torch.float64), STACKED)


@pytest.mark.parametrize("train", [{}, {"accumulate": 2}, {"clip_norm": 0.1}])
def test_stacked_convolutions_norms_and_attention_are_those_apart(train: dict[str, object]) -> None:
    """Also their running statistics, vector adapters, accumulated and clipped gradients."""
    settings = pictures(**train)
    together = simulate(Pictures(), settings, torch.float64, heads_per_actor=4, stack="always")
    assert_same_run(together, simulate(Pictures(), settings, torch.float64), 1e-9)  # batch norms divide by small deviations


def test_one_process_holds_one_copy_of_the_main_weights() -> None:
    """All heads of a group compute with the same main weights; factors and replicas are their own."""
    for stack in ("always", "never"):
        settings = make_settings(heads=32)
        first, *others = HeadGroup(Tiny(), settings, range(32), dtype=torch.float64, stack=stack).heads
        for other in others:
            for name, main in first.converted.mains.items():
                assert other.converted.mains[name].stored is main.stored
            theirs = {p.data_ptr() for p in other.model.parameters() if p.requires_grad}
            assert not theirs & {p.data_ptr() for p in first.model.parameters()}
            assert len(theirs) == 2 * 3 + 7  # factors of three weights, and seven replicas


def test_heads_rebase_onto_versions_that_lack_their_contribution() -> None:
    """A policy that merges two heads at a time lets heads of one group adopt different contributions; nothing is lost."""

    class Two:
        def decide(self, pending: list[Pending], roster: Roster) -> object:
            if len(pending) < min(2, len(roster.live)) or not pending:
                return Wait("for a second")
            return Merge({p.head: 1 / roster.num_heads for p in pending})

    settings = make_settings(heads=4, policy=Two())
    runs = [simulate(Tiny(), settings, torch.float64, heads_per_actor=4, stack=s) for s in ("never", "always")]
    assert_near(runs[0].base, runs[1].base, STACKED)
    assert all(head.step == 12 for run in runs for head in run.heads)
    assert len(runs[0].merges) == 8


def test_what_cannot_be_stacked_is_said_or_done_in_turns() -> None:
    """Batches of different sizes, and other ranks: an error that says so if stacking was asked for, else turns."""
    settings = pictures()
    with pytest.raises(Unstackable, match="stack expects each tensor to be equal size"):
        simulate(Pictures(ragged=True), settings, torch.float64, heads_per_actor=4, stack="always")
    ranks = dataclasses.replace(settings, lte=dataclasses.replace(settings.lte, lora_r=(1, 2, 2, 2)))
    with pytest.raises(Unstackable, match="heads of equal rank"):
        simulate(Pictures(), ranks, torch.float64, heads_per_actor=4, stack="always")

    group = HeadGroup(Pictures(ragged=True), settings, range(4), dtype=torch.float64, stack="always")
    group._insist = False  # as "auto" on a GPU
    alone = Head(Pictures(ragged=True), settings, 3, dtype=torch.float64)
    base = prepare(Pictures(), settings, torch.float64).base
    for head in [*group.heads, alone]:
        head.start(0, base)
    last = group.train_round()[3]
    assert not group.stacked
    assert "equal size" in group.note
    assert_near(last.buffer, alone.train_round().buffer, 1e-9)
    assert last.samples == 9  # 3 steps of 3 samples: the batches that couldn't be stacked weren't dropped


def test_stacked_heads_go_on_from_a_saved_state() -> None:
    """States taken from heads apart, put into a stacked group, train on as the heads apart do."""
    settings = make_settings(heads=3, steps=12)
    whole = simulate(Tiny(), settings, torch.float64)
    half = simulate(Tiny(), dataclasses.replace(settings, train=dataclasses.replace(settings.train, steps=6)), torch.float64)
    group = HeadGroup(Tiny(), settings, range(3), dtype=torch.float64, stack="always")
    base = half.base.clone()
    for head, saved in zip(group.heads, half.heads, strict=True):
        head.load_state(*saved.state(), base)
    contributions = group.train_round()
    assert [c.sequence for c in contributions] == [3, 3, 3]
    assert contributions[1].loss == pytest.approx(whole.merges[2].losses[1], rel=1e-12)

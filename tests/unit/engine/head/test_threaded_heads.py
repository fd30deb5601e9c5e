"""Virtual heads in lanes that train at the same time compute what they would compute one by one."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lte_ray.data import Shard
from lte_ray.engine.head.virtual import HeadGroup
from lte_ray.engine.in_process import run_in_process
from lte_ray.engine.prepare import prepare
from lte_ray.engine.process_tuning import head_threads
from lte_ray.errors import WorkerFailed
from tests.support.helpers import LONG_RUN, Tiny, make_settings


class Shuffled(Tiny):
    """Its data, not its loss, draws from the global generators."""

    def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        for words, following in super().train_batches(shard):
            order = torch.randperm(len(words))
            yield words[order] + 0, following[order]


class Meeting(Tiny):
    """From its `alone`-th loss on, each waits until another thread computes one, too; some time later it gives up."""

    def __init__(self, alone: int) -> None:
        super().__init__()
        self.alone, self.met = alone, threading.Barrier(2)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.alone -= 1
        if self.alone < 0:
            self.met.wait(30)
        return super().loss(model, batch)


class Failing(Tiny):
    """Raises in the first step of head 2's second round."""

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if getattr(model, "steps", 0) == 3 and threading.current_thread().name.startswith("lane"):
            raise ValueError("no more")
        model.steps = getattr(model, "steps", 0) + 1
        return super().loss(model, batch)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("heads", "reset"), [(2, "none"), (3, "none"), (5, "none"), (3, "B"), *([(2, "B"), (5, "B")] if LONG_RUN else [])]
)
@pytest.mark.parametrize(
    "worker", [Tiny(optimizer="adamw"), Shuffled(), Tiny(dropout=0.3)], ids=["plain", "shuffled", "dropout"]
)
def test_heads_in_lanes_are_bitwise_those_apart(worker: Tiny, heads: int, reset: str) -> None:
    """Whatever is drawn for the data or by the model, and whichever of turns and lanes the trial finds faster."""
    settings = make_settings(heads=heads, steps=20, reset=reset)
    apart = run_in_process(worker, settings, torch.float64)
    for lanes in (2, 4):
        together = run_in_process(worker, settings, torch.float64, heads_per_actor=heads, concurrent_heads=lanes)
        assert torch.equal(together.base, apart.base)
        assert [m.losses for m in together.merges] == [m.losses for m in apart.merges]


def group_of(worker: Tiny, heads: int, lanes: int, **settings: int) -> HeadGroup:
    group = HeadGroup(worker, make_settings(heads=heads, **settings), range(heads), dtype=torch.float64, concurrent_heads=lanes)
    for head in group.heads:
        head.start(0, prepare(worker, make_settings(heads=heads), torch.float64).base)
    return group


def next_round(group: HeadGroup) -> None:
    group.train_round()
    for head in group.heads:
        head.state.pending = None


def test_heads_of_different_lanes_train_at_the_same_time() -> None:
    """Two losses are computed at once, or the test would wait for ever; and lanes have main weights of their own."""
    group = group_of(Meeting(alone=2 * 2 * 3), 2, 2)  # two rounds, one by one
    for _ in range(3):
        next_round(group)
    assert all(head.step == 9 for head in group.heads)
    for name, main in group.heads[0].converted.main_weights.items():
        assert group.heads[1].converted.main_weights[name].stored is not main.stored


def test_heads_of_one_lane_share_their_main_weights() -> None:
    """Seven heads in two lanes: two copies."""
    group = group_of(Tiny(), 7, 2)
    copies = {
        id(main.stored) for head in group.heads for name, main in head.converted.main_weights.items() if name.startswith("up")
    }
    assert len(copies) == 2


def test_models_that_draw_train_in_turns() -> None:
    """Lanes have the global generators in common: dropout keeps to turns, and the group says so."""
    for dropout, says in ((0.3, "draws random numbers"), (0.0, "")):
        group = group_of(Tiny(dropout=dropout), 4, 2)
        next_round(group)
        assert says in group.sequential_reason
        assert bool(group.sequential_reason) == bool(says)


def test_drawing_that_begins_late_ends_the_lanes() -> None:
    """A loss that draws from its tenth step on is noticed after that round."""

    class Late(Tiny):
        def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            model.steps = getattr(model, "steps", 0) + 1
            return super().loss(model, batch) + (0 * torch.rand(()) if model.steps > 9 else 0)

    group = group_of(Late(), 4, 2, steps=30)
    group._threaded._sequential_seconds = float("inf")  # lanes are faster
    for _ in range(3):
        group._threaded._rounds = 5  # past the trial
        next_round(group)
        assert not group.sequential_reason
    next_round(group)
    assert "draws random numbers" in group.sequential_reason


def test_an_error_in_a_lane_names_the_head_and_the_step() -> None:
    """The other lane ends its round first, and nothing hangs."""
    group = group_of(Failing(), 3, 3, steps=12)
    next_round(group)
    with pytest.raises(WorkerFailed, match=r"head [012].*step 4[\s\S]*no more"):
        next_round(group)


def test_a_trial_finds_what_is_faster() -> None:
    """After the third round: lanes that took longer than turns are left, and only those."""
    for alone, stays in ((1e9, True), (0.0, False)):
        group = group_of(Tiny(), 4, 2)
        for _ in range(2):
            next_round(group)
        group._threaded._train_sequentially = lambda heads, threads, kept=group._threaded._train_sequentially: kept(
            heads, threads
        )
        group._threaded._sequential_seconds = alone
        next_round(group)
        assert ("faster" not in group.sequential_reason) == stays


@pytest.mark.parametrize(
    ("configured", "cpus", "heads", "expected"),
    [(0, 2, 1, (1, 2)), (0, 2, 8, (2, 1)), (2, 2, 8, (1, 2)), (0, 8, 2, (2, 4)), (0, 0.5, 4, (1, 1)), (3, 8, 8, (2, 3))],
)
def test_the_cores_of_an_actor_are_shared_out(configured: int, cpus: float, heads: int, expected: tuple[int, int]) -> None:
    """Heads at once, times threads of each, are at most the actor's whole CPUs."""
    assert head_threads(configured, cpus, heads) == expected

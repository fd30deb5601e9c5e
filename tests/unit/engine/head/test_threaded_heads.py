"""Virtual heads that train concurrently compute what they would compute one by one."""

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
from tests.support import LONG_RUN
from tests.support.tiny_worker import Tiny, make_settings


class Shuffled(Tiny):
    """Its data, not its loss, draws from the global generators."""

    def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        for words, following in super().train_batches(shard):
            order = torch.randperm(len(words))
            yield words[order] + 0, following[order]


class Meeting(Tiny):
    """After the first `alone` losses each waits until another thread computes one too, for up to 30 seconds."""

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
        if getattr(model, "steps", 0) == 3 and threading.current_thread().name.startswith("heads"):
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
def test_concurrent_heads_equal_separate_ones_bitwise(worker: Tiny, heads: int, reset: str) -> None:
    """Whatever the data or the model draws, and whether or not threads turn out to be faster."""
    settings = make_settings(heads=heads, steps=20, reset=reset)
    apart = run_in_process(worker, settings, torch.float64)
    for concurrent in (2, 4):
        together = run_in_process(worker, settings, torch.float64, heads_per_actor=heads, concurrent_heads=concurrent)
        assert torch.equal(together.base, apart.base)
        assert [m.losses for m in together.merges] == [m.losses for m in apart.merges]


def group_of(worker: Tiny, heads: int, concurrent_heads: int, **settings: int) -> HeadGroup:
    group = HeadGroup(
        worker, make_settings(heads=heads, **settings), range(heads), dtype=torch.float64, concurrent_heads=concurrent_heads
    )
    for head in group.heads:
        head.start(0, prepare(worker, make_settings(heads=heads), torch.float64).base)
    return group


def next_round(group: HeadGroup) -> None:
    group.train_round()
    for head in group.heads:
        head.state.pending = None


def test_heads_of_different_sets_train_at_the_same_time() -> None:
    """Two losses are computed at once, or the barrier would break; and each set has its own main weights."""
    group = group_of(Meeting(alone=2 * 2 * 3), 2, 2)  # two rounds in turns
    for _ in range(3):
        next_round(group)
    assert all(head.step == 9 for head in group.heads)
    for name, main in group.heads[0].converted.main_weights.items():
        assert group.heads[1].converted.main_weights[name].stored is not main.stored


def test_heads_of_one_set_share_their_main_weights() -> None:
    """Seven heads in two sets have two copies."""
    group = group_of(Tiny(), 7, 2)
    copies = {
        id(main.stored) for head in group.heads for name, main in head.converted.main_weights.items() if name.startswith("up")
    }
    assert len(copies) == 2


def test_models_that_draw_train_in_turns() -> None:
    """Threads share the global generators: heads with dropout train in turns, and the group says so."""
    for dropout, reason in ((0.3, "draws random numbers"), (0.0, "")):
        group = group_of(Tiny(dropout=dropout), 4, 2)
        next_round(group)
        assert reason in group.sequential_reason
        assert bool(group.sequential_reason) == bool(reason)


def test_draws_that_begin_late_end_concurrent_training() -> None:
    """A loss that draws from its tenth step on is noticed after that round."""

    class Late(Tiny):
        def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            model.steps = getattr(model, "steps", 0) + 1
            return super().loss(model, batch) + (0 * torch.rand(()) if model.steps > 9 else 0)

    group = group_of(Late(), 4, 2, steps=30)
    group._threaded._sequential_seconds = float("inf")  # threads are faster
    for _ in range(3):
        group._threaded._calls = 5  # after the trial
        next_round(group)
        assert not group.sequential_reason
    next_round(group)
    assert "draws random numbers" in group.sequential_reason


def test_an_error_in_a_thread_names_the_head_and_the_step() -> None:
    """The other heads end their rounds first, and nothing hangs."""
    group = group_of(Failing(), 3, 3, steps=12)
    next_round(group)
    with pytest.raises(WorkerFailed, match=r"head [012].*step 4[\s\S]*no more"):
        next_round(group)


def test_a_trial_finds_what_is_faster() -> None:
    """After the third round heads train in turns if threads took longer, and only then."""
    for seconds, stays in ((1e9, True), (0.0, False)):
        group = group_of(Tiny(), 4, 2)
        for _ in range(2):
            next_round(group)
        group._threaded._train_sequentially = lambda heads, threads, kept=group._threaded._train_sequentially: kept(
            heads, threads
        )
        group._threaded._sequential_seconds = seconds
        next_round(group)
        assert ("faster" not in group.sequential_reason) == stays


@pytest.mark.parametrize(
    ("configured", "cpus", "heads", "expected"),
    [(0, 2, 1, (1, 2)), (0, 2, 8, (2, 1)), (2, 2, 8, (1, 2)), (0, 8, 2, (2, 4)), (0, 0.5, 4, (1, 1)), (3, 8, 8, (2, 3))],
)
def test_the_cores_of_an_actor_are_shared_out(configured: int, cpus: float, heads: int, expected: tuple[int, int]) -> None:
    """Heads at once, times threads of each, are at most the actor's whole CPUs."""
    assert head_threads(configured, cpus, heads) == expected

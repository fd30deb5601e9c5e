"""Ordinary training in several processes: together they take the steps of one process, up to rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from threading import Barrier

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.data import Shard
from lte_ray.engine.coordinator.coordinator import Coordinator
from lte_ray.engine.data_parallel import TrainingProcess
from lte_ray.engine.head.batch_stream import BatchStream
from lte_ray.engine.head.snapshot import SavedState, snapshot
from lte_ray.engine.in_process import InProcessRun, run_in_process
from lte_ray.engine.prepare import prepare
from lte_ray.engine.settings import Settings
from lte_ray.errors import ConfigError, WorkerFailed
from lte_ray.merging.registry import make_policy
from lte_ray.messages import CheckpointRequest, MergeRecord
from tests.support.numerics import assert_near
from tests.support.tiny_worker import WORDS, Tiny


class Numbers:
    """Batches that are the numbers of their slots."""

    def train_batches(self, shard: Shard) -> Iterator[int]:
        yield from shard.slots()


@dataclass
class Conditional(Tiny):
    """A batch whose first word is odd doesn't use the tables, so that some processes have no gradient of them."""

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = super().loss(model, batch)
        if int(batch[0].flatten()[0]) % 2:
            first = next(p for p in model.parameters() if p.requires_grad)
            loss = loss.detach() + first.square().mean()
        return loss


def make(processes: int, **train: object) -> Settings:
    config = TrainConfig(**{"steps": 12, "seed": 3, "baseline": True} | train | {"baseline_processes": processes})  # type: ignore[arg-type]
    return Settings("test", LTEConfig(num_heads=6), MergeConfig(merge_iter=5), config)


class Processes:
    """Processes of one training, each in a thread of its own; they sum tensors in the order of their ranks."""

    def __init__(self, worker: Tiny, settings: Settings, saved: tuple[SavedState, Coordinator] | None = None) -> None:
        self.settings = settings.resolved()
        count = self.settings.train.baseline_processes
        self._barrier, self._tensors = Barrier(count), [torch.empty(0)] * count
        initial = prepare(worker, self.settings, torch.float64)
        self.coordinators, self.processes = [], []
        for rank in range(count):  # one after the other: models are built under global generators
            base, state = initial.base.clone(), {}
            if saved is not None:
                before = saved[1]
                base, state = before.base.clone(), {"version": before.version, "positions": before.positions}
            policy = make_policy(self.settings.merge)
            coordinator = Coordinator(self.settings, initial.plan, base, policy, **state)  # type: ignore[arg-type]
            process = TrainingProcess(worker, self.settings, coordinator, rank, self._all_reduce(rank), dtype=torch.float64)
            process.start(None if saved is None else saved[0])
            self.coordinators.append(coordinator)
            self.processes.append(process)

    def _all_reduce(self, rank: int) -> Callable[[Tensor], None]:
        def sum_all(tensor: Tensor) -> None:
            self._tensors[rank] = tensor.detach().clone()
            self._barrier.wait()
            total = sum(self._tensors[1:], self._tensors[0].clone())
            self._barrier.wait()
            tensor.copy_(total)

        return sum_all

    def train(self, rounds: int = 100) -> list[MergeRecord]:
        """Trains at most this many rounds; returns the first process's merges."""

        def one(process: TrainingProcess) -> list[MergeRecord]:
            merges: list[MergeRecord] = []
            try:
                for _ in range(rounds):
                    if not process.done:
                        merges += process.train_round()
            except BaseException:
                self._barrier.abort()
                raise
            return merges

        with ThreadPoolExecutor(len(self.processes)) as pool:
            futures = [pool.submit(one, each) for each in self.processes]
            merges, *_ = [future.result() for future in futures]
        return merges

    def assert_equal(self) -> None:
        """All processes hold the same weights, bit by bit."""
        for coordinator in self.coordinators[1:]:
            assert torch.equal(coordinator.base, self.coordinators[0].base)


def run_one(worker: Tiny, settings: Settings) -> tuple[InProcessRun, list[MergeRecord]]:
    merges: list[MergeRecord] = []
    done = run_in_process(worker, settings, torch.float64, on_merge=lambda record, _: merges.append(record))
    return done, merges


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("worker", [Tiny(), Conditional(optimizer="adamw")], ids=lambda w: type(w).__name__)
def test_several_processes_equal_one(worker: Tiny, processes: int) -> None:
    """Weights, losses, samples and positions after every merge, with accumulation and clipping."""
    together = Processes(worker, make(processes, accumulate=2, clip_norm=0.5))
    merges = together.train()
    one, expected = run_one(worker, make(1, accumulate=2, clip_norm=0.5))
    together.assert_equal()
    assert_near(together.coordinators[0].base, one.base, 1e-10)
    assert [m.version for m in merges] == [1, 2, 3]
    for merge, other in zip(merges, expected, strict=True):
        assert merge.losses[0] == pytest.approx(other.losses[0], rel=1e-10)
        assert (merge.step, merge.samples, merge.positions) == (other.step, other.samples, other.positions)


def test_running_statistics_are_averaged() -> None:
    """Each process's batches count equally in them, and the losses, which don't depend on them, are those of one process."""

    @dataclass
    class Normalized(Tiny):
        def build_model(self) -> nn.Module:
            return nn.Sequential(super().build_model(), nn.BatchNorm1d(WORDS).double())

    together = Processes(Normalized(), make(2))
    merges = together.train()
    _, expected = run_one(Normalized(), make(1))
    together.assert_equal()
    assert [m.losses[0] for m in merges] == pytest.approx([m.losses[0] for m in expected], rel=1e-10)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (2, 2)])
def test_a_checkpoint_continues_in_another_number_of_processes(before: int, after: int) -> None:
    """The state of the first process after a merge is that of a single one."""
    first = Processes(Tiny(), make(before))
    first.train(rounds=1)
    coordinator, head = first.coordinators[0], first.processes[0].head
    saved = snapshot(head, CheckpointRequest(coordinator.version, {0: head.sequence}))
    second = Processes(Tiny(), make(after), (saved, coordinator))
    second.train()
    one, _ = run_one(Tiny(), make(1))
    assert_near(second.coordinators[0].base, one.base, 1e-10)


def test_a_wish_to_stop_stops_all_after_their_round() -> None:
    """Whichever process is asked to."""
    together = Processes(Tiny(), make(3))
    together.processes[0].stop_requested = lambda: True
    assert [merge.step for merge in together.train()] == [5]
    assert all(process.done and process.head.step == 5 for process in together.processes)


def test_a_lost_process_isnt_the_workers_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """An all-reduce that fails raises as it is; a worker's error names the head."""

    def fail(tensor: Tensor) -> None:
        raise RuntimeError("connection closed by peer")

    together = Processes(Tiny(), make(2))
    together.processes[0].head.average_gradients = lambda: fail(torch.empty(0))
    with pytest.raises(RuntimeError, match="closed by peer"):
        together.processes[0].train_round()

    @dataclass
    class Raises(Tiny):
        def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            raise ZeroDivisionError("no words")

    monkeypatch.setattr("lte_ray.engine.prepare.check_first_loss", lambda *arguments: None)
    with pytest.raises(WorkerFailed, match="no words"):
        Processes(Raises(), make(2)).train()


@given(st.integers(1, 5), st.integers(0, 40), st.integers(1, 12))
def test_the_processes_read_the_batches_of_one(count: int, start: int, each: int) -> None:
    """Those of `count` x `each` batches are the next ones of the stream, each once; all positions say so."""
    streams = [BatchStream(Numbers(), 0, 1, 0, (rank, count)) for rank in range(count)]  # type: ignore[arg-type]
    whole = BatchStream(Numbers(), 0, 1, 0)  # type: ignore[arg-type]
    for stream in [*streams, whole]:
        stream.seek(start, ((start, 1),))
    read = sorted(stream.next_batch() for stream in streams for _ in range(each))  # type: ignore[type-var]
    assert read == list(islice(iter(whole.next_batch, None), count * each))
    assert {(s.batches_taken, s.partitions) for s in [*streams, whole]} == {(whole.batches_taken, whole.partitions)}


@pytest.mark.parametrize(
    ("train", "merge", "says"),
    [
        ({"baseline": False, "baseline_processes": 2}, {}, "this run isn't ordinary training. Add --baseline"),
        ({"baseline_processes": 4}, {}, "--baseline-processes is 4, but a step takes 6 batches"),
        ({"baseline_processes": 0}, {}, "--baseline-processes is 0"),
        ({"baseline_processes": 2}, {"merge_every": "30s"}, "--merge-every and --baseline-processes 2 contradict"),
        ({"baseline_processes": 2}, {"rollback_z": 3.0}, "--rollback-z and --baseline-processes 2 contradict"),
    ],
)
def test_settings_that_contradict_are_refused(train: dict[str, object], merge: dict[str, object], says: str) -> None:
    """With words that say what to change."""
    with pytest.raises(ConfigError, match=says):
        Settings(
            "test",
            LTEConfig(num_heads=6),
            MergeConfig(**merge),  # type: ignore[arg-type]
            TrainConfig(**{"baseline": True} | train),  # type: ignore[arg-type]
        )


def test_settings_resolve_twice() -> None:
    """A step takes as many batches as the heads would, whatever the number of processes."""
    once = make(3, accumulate=2).resolved()
    assert (once.train.accumulate, once.train.baseline_processes, once.lte.num_heads) == (12, 3, 1)
    assert once.resolved() == once


@pytest.mark.parametrize("processes", [2, 3])
def test_figures_are_means_over_all_processes(processes: int) -> None:
    """Also of a figure that only some processes have in a round, since it isn't of every batch."""

    @dataclass
    class Scored(Tiny):
        def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> object:  # type: ignore[override]
            loss, first = super().loss(model, batch), int(batch[0].flatten()[0])
            return loss, {"double": 2 * loss, f"first {first}": first} if first else {}

    merges = Processes(Scored(), make(processes, accumulate=2)).train()
    _, expected = run_one(Scored(), make(1, accumulate=2))
    assert len({name for merge in merges for name in merge.figures}) > 3
    for merge, other in zip(merges, expected, strict=True):
        assert merge.figures.keys() == other.figures.keys()
        for name, values in merge.figures.items():
            assert values == pytest.approx(other.figures[name], rel=1e-10)

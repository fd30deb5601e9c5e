"""Whole runs on a real Ray, through the Python API."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import ray
import ray.train
import safetensors.torch
import torch
from ray.util import placement_group_table
from torch import nn

from lte_ray import Discard, LTEConfig, LTETrainer, Merge, MergeConfig, Pending, Roster, Shard, Wait, checkpoint
from lte_ray.audit import audit, read_rows
from lte_ray.config import FailureConfig, PlacementConfig
from lte_ray.engine.in_process import run_in_process
from lte_ray.engine.prepare import load_base, prepare
from lte_ray.engine.settings import Settings
from lte_ray.errors import ContributionRefused, HeadLost, PolicyError, StorageError, WorkerError, WorkerFailed
from lte_ray.run.metrics import Progress
from lte_ray.storage import RunDirectory
from tests.support.ray_runs import (
    Dropping,
    Failing,
    Normed,
    Regression,
    assert_same_model,
    lte_actors,
    settings,
    simulated,
    storage,
)

pytestmark = pytest.mark.ray

FIRST_ENDS = FailureConfig(max_failures=0)
"""The first death ends the run."""


def model_of(path: str) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(Path(path) / "model.safetensors")


class Collect:
    """A reporter that keeps what it is shown."""

    def __init__(self) -> None:
        self.seen: list[Progress] = []
        self.closed = False

    def update(self, progress: Progress) -> None:
        self.seen.append(progress)

    def close(self) -> None:
        self.closed = True


class Usual(NamedTuple):
    """A run of two heads to its end, which several tests look at."""

    path: Path
    result: ray.train.Result
    reporter: Collect


@pytest.fixture(scope="module")
def usual(shared_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Usual:
    """Dropout included; evaluated and saved at every second merge; named by Ray's own RunConfig."""
    path, reporter = tmp_path_factory.mktemp("usual"), Collect()
    run_config = ray.train.RunConfig(name="r", storage_path=str(path))
    kwargs = settings(eval_every=2, checkpoint_every=2)
    return Usual(path, LTETrainer(Dropping(), run_config=run_config, reporter=reporter, **kwargs).fit(), reporter)


def test_a_barrier_run_is_bitwise_the_same_simulated_and_on_ray(usual: Usual) -> None:
    """Same seed, same weights, whether the heads are actors or objects in one process; dropout included."""
    assert_same_model(usual.result.path, simulated(Dropping(), **settings()))


def test_the_result_holds_metrics_a_checkpoint_and_a_complete_run_directory(usual: Usual) -> None:
    """`fit` gives Ray's Result; the run directory has what the README says."""
    result = usual.result
    assert isinstance(result, ray.train.Result)
    assert result.metrics["step"] == 30
    assert result.metrics["version"] == 6
    assert result.metrics["samples"] == 2 * 30 * 64
    assert result.metrics["validation_loss"] < 0.6
    directory = usual.path / "r"
    assert result.path == str(directory)
    assert sorted(p.name for p in directory.iterdir()) == ["checkpoints", "metrics.jsonl", "model.safetensors", "run.toml"]
    with result.checkpoint.as_directory() as saved:
        assert saved == str(directory / "checkpoints" / "000006")
        files = {"base.safetensors", "head-0000.safetensors", "head-0001.safetensors", "manifest.json"}
        files |= {"references.safetensors"}
        assert {p.name for p in Path(saved).iterdir()} == files
    assert tomllib.loads((directory / "run.toml").read_text())["merge_iter"] == 5
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["version"] for row in rows if row["kind"] == "merge"] == [1, 2, 3, 4, 5, 6]
    assert {row["version"] for row in rows if row["kind"] == "evaluation"} >= {0, 6}


def test_the_model_file_loads_strictly_and_gives_the_evaluators_figures(usual: Usual) -> None:
    """model.safetensors has the unconverted model's names, and its logits are those that were evaluated."""
    worker = Dropping()
    model = worker.build_model()
    model.load_state_dict(model_of(usual.result.path), strict=True)
    with torch.no_grad():
        assert worker.evaluate(model.eval())["validation_loss"] == usual.result.metrics["validation_loss"]


def test_a_reporter_sees_every_head_and_nothing_is_left_behind(usual: Usual) -> None:
    """After a run no actor and no placement group of it exists, and no partial file."""
    assert usual.reporter.closed
    last = usual.reporter.seen[-1]
    assert (last.step, last.version, [h.head for h in last.heads]) == (30, 6, [0, 1])
    assert all(h.state == "done" for h in last.heads)
    assert_clean(usual.path)


class HalfOfHeadOne:
    """Merges head 1 alone, by half; head 0's contributions are waited for, and count nothing."""

    def decide(self, pending: list[Pending], roster: Roster) -> Merge | Wait:
        if len(pending) < roster.num_heads:
            return Wait("for both")
        return Merge({0: 0.0, 1: 0.5})


@pytest.mark.slow
def test_a_policy_object_is_what_merges(local_ray: None, tmp_path: Path) -> None:
    """The weights after a real run are those that the user's policy says, to the last bit of its simulation."""
    kwargs = settings(steps=10) | {"merge": MergeConfig(merge_iter=5, merge_threads=1, policy=HalfOfHeadOne())}
    result = LTETrainer(Regression(), run_config=storage(tmp_path, "r"), **kwargs).fit()
    ours = simulated(Regression(), **kwargs)
    assert_same_model(result.path, ours)
    average = simulated(Regression(), **settings(steps=10))
    assert any(not torch.equal(ours[name], value) for name, value in average.items())


def assert_clean(path: Path) -> None:
    assert all(group["state"] == "REMOVED" for group in placement_group_table().values())
    deadline = time.monotonic() + 30
    while lte_actors() and time.monotonic() < deadline:  # they were killed; the kernel takes a moment
        time.sleep(0.05)
    assert lte_actors() == []
    assert not list(path.rglob("*.part"))


def test_a_worker_that_raises_ends_the_run_and_leaves_the_last_checkpoint(local_ray: None, tmp_path: Path) -> None:
    """The error names the head and the step and carries the worker's traceback; actors go, the others' states are saved."""
    run = {"run_config": storage(tmp_path, "r"), "failure": FIRST_ENDS}
    trainer = LTETrainer(Failing(), **run, **settings(checkpoint_every=1))
    with pytest.raises(WorkerFailed, match=r"head 1 at local step 13") as caught:
        trainer.fit()
    assert "ZeroDivisionError: the disk of the data is gone" in str(caught.value)
    assert "train_batches" in str(caught.value)
    directory = RunDirectory.open(str(tmp_path), "r")
    newest, passed = checkpoint.read_newest_intact(directory)
    assert newest.version >= 2
    assert newest.facts["standings"]["1"]["step"] == 10
    assert 0 in newest.heads
    assert passed == []
    assert not (tmp_path / "r" / "model.safetensors").exists()
    assert_clean(tmp_path)


@pytest.mark.slow
def test_a_failing_evaluation_ends_the_run(local_ray: None, tmp_path: Path) -> None:
    """An error in `evaluate` isn't swallowed: it is named, with its traceback."""
    with pytest.raises(WorkerFailed, match=r"the evaluator:[\s\S]*the validation set is gone"):
        LTETrainer(Failing(in_evaluate=True), run_config=storage(tmp_path, "r"), **settings()).fit()
    assert_clean(tmp_path)


class Broken:
    """A policy that raises at the second merge."""

    def decide(self, pending: list[Pending], roster: Roster) -> Merge | Wait:
        if len(pending) < roster.num_heads:
            return Wait()
        if roster.version == 1:
            raise LookupError("no weight for you")
        return Merge({p.head: 0.5 for p in pending})


@pytest.mark.slow
def test_a_policy_that_raises_ends_the_run_by_name(local_ray: None, tmp_path: Path) -> None:
    """Every head is told, nobody waits for ever, and the error names the policy."""
    kwargs = settings() | {"merge": MergeConfig(merge_iter=5, policy=Broken())}
    with pytest.raises(PolicyError, match="Broken raised LookupError: no weight for you"):
        LTETrainer(Regression(), run_config=storage(tmp_path, "r"), **kwargs).fit()
    assert_clean(tmp_path)


class Deadly(Regression):
    """Kills its own process in head 1's eighth step, as the kernel does when memory runs out."""

    def train_batches(self, shard):  # type: ignore[no-untyped-def]
        import os
        import signal

        for step, batch in enumerate(super().train_batches(shard), 1):
            if (shard.head, step) == (1, 8):
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


@pytest.mark.slow
def test_a_killed_head_ends_the_run_with_its_number(local_ray: None, tmp_path: Path) -> None:
    """A real SIGKILL, where no failure is allowed: the error says which head's process died."""
    with pytest.raises(HeadLost, match="head 1"):
        LTETrainer(Deadly(), run_config=storage(tmp_path, "r"), failure=FIRST_ENDS, **settings()).fit()
    assert_clean(tmp_path)


class Diverging(Regression):
    """Its learning rate makes every weight infinite."""

    def build_optimizer(self, params: list[dict]) -> torch.optim.Optimizer:  # type: ignore[type-arg]
        return torch.optim.SGD(params, lr=float("inf"))


@pytest.mark.slow
def test_a_diverged_head_is_refused_and_ends_the_run(local_ray: None, tmp_path: Path) -> None:
    """NaN never reaches the base: three refusals in a row quarantine each head, and with the last the run ends and says why."""
    with pytest.raises(ContributionRefused, match=r"NaN, infinite[\s\S]*lower the learning rate"):
        LTETrainer(Diverging(), run_config=storage(tmp_path, "r"), **settings()).fit()
    assert_clean(tmp_path)


@dataclasses.dataclass
class Poisoned(Regression):
    """The loss of head 1's batches from `first` to `last` is NaN."""

    first: int = 7
    last: int = 12

    def train_batches(self, shard: Shard) -> Iterator[tuple[torch.Tensor, ...]]:
        for number, batch in enumerate(super().train_batches(shard), shard.cursor):
            poison = shard.head == 1 and self.first <= number <= self.last
            yield (*batch, torch.tensor(float("nan") if poison else 1.0))

    def loss(self, model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return super().loss(model, batch[:2]) * batch[2]


@pytest.mark.slow
@pytest.mark.parametrize(("last", "dropped"), [(12, 10), (99, 0)], ids=["two rounds", "for ever"])
def test_poison_costs_what_it_held_and_nothing_else(local_ray: None, tmp_path: Path, last: int, dropped: int) -> None:
    """Bitwise the simulation, whether the head recovers or is quarantined; to the audit it is dropped, not lost."""
    kwargs, worker = settings(), Poisoned(last=last)
    result = LTETrainer(worker, run_config=storage(tmp_path, "r"), **kwargs).fit()
    done = run_in_process(worker, Settings("r", kwargs["lte"], kwargs["merge"], kwargs["train"]))
    assert_same_model(result.path, simulated(worker, **kwargs))
    found = audit(read_rows((tmp_path / "r" / "metrics.jsonl").read_text()))
    assert found.clean, found.problems
    assert (found.dropped, found.batches) == (dropped, sum(merge.steps for merge in done.merges))


@pytest.mark.slow
def test_a_resumed_run_is_bitwise_the_run_that_never_stopped(local_ray: None, tmp_path: Path) -> None:
    """20 steps, then 20 more from the checkpoint: the same weights as 40 at once.

    Optimizer, data, dropout and running statistics go on.
    """
    LTETrainer(Normed(), run_config=storage(tmp_path, "parts"), **settings(steps=20)).fit()
    resumed = LTETrainer(Normed(), run_config=storage(tmp_path, "parts", resume=True), **settings(steps=40)).fit()
    expected = simulated(Normed(), **settings(steps=40))
    assert_same_model(resumed.path, expected)
    assert float((expected["0.running_var"] - 1).abs().max()) > 0.001
    assert resumed.metrics["step"] == 40
    assert resumed.metrics["version"] == 8
    rows = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [row["version"] for row in rows if row["kind"] == "merge"] == list(range(1, 9))


@pytest.mark.parametrize(
    ("stack", "worker", "apart", "tolerance", "stops"),
    [
        ("never", Dropping(), True, 0.0, False),
        pytest.param("never", Dropping(), True, 0.0, True, marks=pytest.mark.slow),
        pytest.param("always", Dropping(), False, 0.0, True, marks=pytest.mark.slow),
        # Stacked sums have another order: float32's 1e-7, magnified by 20 steps of Adam, which takes steps of 3e-3 however
        # small the gradient; heads that got each other's gradients, data or state would be off by about that.
        pytest.param("always", Regression(), True, 1e-4, True, marks=pytest.mark.slow),
    ],
    ids=["never", "never, resumed", "always, as simulated", "always, as apart"],
)
def test_virtual_heads_are_the_heads_of_as_many_actors_and_resume(
    local_ray: None, tmp_path: Path, stack: str, worker: Regression, apart: bool, tolerance: float, stops: bool
) -> None:
    """Five heads in actors of two: those of five actors, bitwise in turns and nearly so stacked (bitwise as one process
    that stacks them draws its dropout); stopped and resumed, too."""
    kwargs = settings(steps=20, checkpoint_every=1)
    kwargs["lte"] = LTEConfig(num_heads=5, lora_r=(2, 2, 4, 4, 8), lora_alpha=16) if stack == "never" else LTEConfig(5, 4)
    made = Settings("a", kwargs["lte"], kwargs["merge"], kwargs["train"])
    expected = run_in_process(worker, made) if apart else run_in_process(worker, made, heads_per_actor=2, stack_heads=stack)
    placement = PlacementConfig(heads_per_actor=2, cpus_per_head=0.5, stack_heads=stack)
    if stops:
        first = {**kwargs, "train": dataclasses.replace(kwargs["train"], steps=10)}
        LTETrainer(worker, scaling_config=placement, run_config=storage(tmp_path, "a"), **first).fit()
    result = LTETrainer(worker, scaling_config=placement, run_config=storage(tmp_path, "a", resume=True), **kwargs).fit()
    start, model = prepare(worker, made).model.state_dict(), worker.build_model()
    load_base(model, expected.plan, expected.base)
    merged = model_of(result.path)
    for name, value in model.state_dict().items():
        assert torch.allclose(merged[name], value, rtol=0.0, atol=tolerance), name
        assert float((value - start[name]).abs().max()) > 0.01, name  # far more than the tolerance
    assert result.metrics["samples"] == 5 * 20 * 64


class OddOnes(Regression):
    """Its evaluation's names are those of other things, and its sample fails."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"version": 7.0, "step": float("nan"), "acc[/top5]": 0.5}

    def sample(self, model: nn.Module) -> str:
        raise ZeroDivisionError("nothing to show")


@pytest.mark.slow
def test_names_of_an_evaluation_and_a_failing_sample_break_nothing(local_ray: None, tmp_path: Path) -> None:
    """The figures are kept apart from ours; the model is there all the same; JSON has null for NaN."""
    result = LTETrainer(OddOnes(), run_config=storage(tmp_path, "r"), **settings(steps=10)).fit()
    assert result.metrics["version"] == 2
    assert result.metrics["evaluation"]["version"] == 7.0
    assert result.metrics["sample"] == "sample() raised: ZeroDivisionError: nothing to show"
    assert (tmp_path / "r" / "model.safetensors").exists()
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    values = [row["values"] for row in rows if row["kind"] == "evaluation"]
    assert values[-1] == {"version": 7.0, "step": None, "acc[/top5]": 0.5}


class Locked:
    """A policy that can't be sent anywhere."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def decide(self, pending: list[Pending], roster: Roster) -> Wait:
        return Wait()


def test_an_overwrite_that_cannot_start_leaves_the_old_run(usual: Usual, tmp_path: Path) -> None:
    """What is there goes only when the new run can start; a failed start leaves no folder that blocks the name."""
    shutil.copytree(usual.path / "r", tmp_path / "r")
    kwargs = settings() | {"merge": MergeConfig(policy=Locked())}
    with pytest.raises(WorkerError, match="Locked can't be sent"):
        LTETrainer(Regression(), run_config=storage(tmp_path, "r", overwrite=True), **kwargs).fit()
    assert (tmp_path / "r" / "model.safetensors").exists()
    with pytest.raises(WorkerError, match="Locked can't be sent"):
        LTETrainer(Regression(), run_config=storage(tmp_path, "new"), **kwargs).fit()
    assert not (tmp_path / "new").exists()


class OnlyHeadOne:
    """Merges head 1 as soon as it is there, and nobody else."""

    def decide(self, pending: list[Pending], roster: Roster) -> Merge | Discard | Wait:
        if not pending:
            return Wait()
        if pending[0].head == 0:
            return Discard([0], "not today")
        return Merge({1: 1.0})


@pytest.mark.slow
def test_a_run_whose_policy_leaves_a_head_out_is_resumed_with_what_that_head_trained(local_ray: None, tmp_path: Path) -> None:
    """A head that was never merged carries all its steps, and they are in its state: nothing is lost at the resume."""
    kwargs = settings(steps=10) | {"merge": MergeConfig(merge_iter=5, policy=OnlyHeadOne())}
    LTETrainer(Regression(), run_config=storage(tmp_path, "r"), **kwargs).fit()
    kwargs |= {"train": dataclasses.replace(kwargs["train"], steps=20)}
    resumed = LTETrainer(Regression(), run_config=storage(tmp_path, "r", resume=True), **kwargs).fit()
    assert (resumed.metrics["step"], resumed.metrics["samples"]) == (20, 2 * 20 * 64)
    newest, _ = checkpoint.read_newest_intact(RunDirectory.open(str(tmp_path), "r"))
    assert {head: held["step"] for head, held in newest.facts["standings"].items()} == {"0": 0, "1": 20}


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    local_ray: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One altered byte in a head's file: the file is named, and the run is bitwise the one that never stopped all the same.

    With none left that is whole, nothing starts.
    """
    LTETrainer(Dropping(), run_config=storage(tmp_path, "r"), **settings(steps=10, checkpoint_every=1)).fit()
    _alter(tmp_path / "r" / "checkpoints" / "000002" / "head-0001.safetensors")
    resumed = LTETrainer(Dropping(), run_config=storage(tmp_path, "r", resume=True), **settings(steps=20)).fit()
    assert "head-0001.safetensors is damaged" in caplog.text
    assert "using 000001 instead" in caplog.text
    assert_same_model(resumed.path, simulated(Dropping(), **settings(steps=20)))
    for file in (tmp_path / "r" / "checkpoints").glob("*/base.safetensors"):
        _alter(file)
    with pytest.raises(StorageError, match=r"base\.safetensors is damaged"):
        LTETrainer(Dropping(), run_config=storage(tmp_path, "r", resume=True), **settings(steps=30)).fit()


def _alter(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_resume_refuses_what_it_cannot_continue(usual: Usual, tmp_path: Path) -> None:
    """Other heads, fewer steps than were taken, or more heads for none: one clear error each."""
    shutil.copytree(usual.path / "r", tmp_path / "r")
    again = storage(tmp_path, "r", resume=True)
    with pytest.raises(StorageError, match=r"has already taken all 30 local steps per head\. Raise --steps"):
        LTETrainer(Dropping(), run_config=again, **settings(steps=25)).fit()
    more = settings()
    with pytest.raises(StorageError, match="Raise --steps"):
        LTETrainer(Dropping(), run_config=again, **more | {"lte": dataclasses.replace(more["lte"], num_heads=3)}).fit()
    kwargs = settings(steps=50)
    with pytest.raises(StorageError, match="--lora-r was 8 and is 4"):
        LTETrainer(Dropping(), run_config=again, **kwargs | {"lte": dataclasses.replace(kwargs["lte"], lora_r=4)}).fit()


def test_a_run_whose_driver_died_just_before_its_end_is_ended_by_the_same_call(usual: Usual, tmp_path: Path) -> None:
    """All steps are taken and merged, the model isn't written yet: no step is taken again, the same weights are exported."""
    shutil.copytree(usual.path / "r", tmp_path / "r")
    model, rows = tmp_path / "r" / "model.safetensors", tmp_path / "r" / "metrics.jsonl"
    exported, before = model.read_bytes(), rows.read_text().count('"merge"')
    model.unlink()
    result = LTETrainer(Dropping(), run_config=storage(tmp_path, "r", resume=True), **settings()).fit()
    assert model.read_bytes() == exported
    assert rows.read_text().count('"merge"') == before
    assert result.metrics is not None
    assert usual.result.metrics is not None
    for name in ("validation_loss", "step", "version"):
        assert result.metrics[name] == usual.result.metrics[name], name


def test_rebuilding_gives_the_driver_and_heads_the_same_start(tmp_path: Path) -> None:
    """`prepare` twice gives bitwise the same version 0."""
    kwargs = settings()
    config = Settings("r", kwargs["lte"], kwargs["merge"], kwargs["train"])
    assert torch.equal(prepare(Regression(), config).base, prepare(Regression(), config).base)

"""Complete runs on a real Ray, through the Python API."""

from __future__ import annotations

import dataclasses
import json
import shutil
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
    RUN_FILES,
    BatchNormRegression,
    DropoutRegression,
    FailingWorker,
    Regression,
    assert_same_model,
    lte_actors,
    merged_in_process,
    settings,
    storage,
)

pytestmark = pytest.mark.ray

NO_FAILURES = FailureConfig(max_failures=0)
"""The first death ends the run."""


def model_of(path: str) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(Path(path) / "model.safetensors")


class RecordingReporter:
    """A reporter that records all updates."""

    def __init__(self) -> None:
        self.updates: list[Progress] = []
        self.closed = False

    def update(self, progress: Progress) -> None:
        self.updates.append(progress)

    def close(self) -> None:
        self.closed = True


class CompletedRun(NamedTuple):
    """A completed run of two heads, which several tests check."""

    path: Path
    result: ray.train.Result
    reporter: RecordingReporter


@pytest.fixture(scope="module")
def completed(shared_ray: None, tmp_path_factory: pytest.TempPathFactory) -> CompletedRun:
    """With dropout; evaluated and saved at every second merge; named by Ray's own RunConfig."""
    path, reporter = tmp_path_factory.mktemp("completed"), RecordingReporter()
    run_config = ray.train.RunConfig(name="r", storage_path=str(path))
    kwargs = settings(eval_every=2, checkpoint_every=2)
    return CompletedRun(
        path, LTETrainer(DropoutRegression(), run_config=run_config, reporter=reporter, **kwargs).fit(), reporter
    )


def test_a_barrier_run_is_bitwise_the_same_simulated_and_on_ray(completed: CompletedRun) -> None:
    """The same seed gives the same weights, whether heads are actors or objects in one process; dropout included."""
    assert_same_model(completed.result.path, merged_in_process(DropoutRegression(), **settings()))


def test_the_result_has_metrics_a_checkpoint_and_a_complete_run_directory(completed: CompletedRun) -> None:
    """`fit` returns Ray's Result; the run directory has the files that the README lists."""
    result = completed.result
    assert isinstance(result, ray.train.Result)
    assert result.metrics["step"] == 30
    assert result.metrics["version"] == 6
    assert result.metrics["samples"] == 2 * 30 * 64
    assert result.metrics["validation_loss"] < 0.6
    directory = completed.path / "r"
    assert result.path == str(directory)
    assert {p.name for p in directory.iterdir()} == RUN_FILES
    with result.checkpoint.as_directory() as saved:
        assert saved == str(directory / "checkpoints" / "000006")
        files = {"base.safetensors", "head-0000.safetensors", "head-0001.safetensors", "manifest.json"}
        files |= {"references.safetensors"}
        assert {p.name for p in Path(saved).iterdir()} == files
    assert tomllib.loads((directory / "run.toml").read_text())["merge_iter"] == 5
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["version"] for row in rows if row["kind"] == "merge"] == [1, 2, 3, 4, 5, 6]
    assert {row["version"] for row in rows if row["kind"] == "evaluation"} >= {0, 6}


def test_the_model_file_loads_strictly_and_gives_the_evaluators_figures(completed: CompletedRun) -> None:
    """model.safetensors has the unconverted model's names, and its evaluation gives the result's figures."""
    worker = DropoutRegression()
    model = worker.build_model()
    model.load_state_dict(model_of(completed.result.path), strict=True)
    with torch.no_grad():
        assert worker.evaluate(model.eval())["validation_loss"] == completed.result.metrics["validation_loss"]


def test_a_reporter_sees_every_head_and_nothing_is_left_behind(completed: CompletedRun) -> None:
    """After a run, none of its actors, placement groups, and partial files exists."""
    assert completed.reporter.closed
    last = completed.reporter.updates[-1]
    assert (last.step, last.version, [h.head for h in last.heads]) == (30, 6, [0, 1])
    assert all(h.state == "done" for h in last.heads)
    assert_clean(completed.path)


class HalfOfHeadOne:
    """Merges head 1 with weight 0.5; it waits for head 0's contributions and gives them weight 0."""

    def decide(self, pending: list[Pending], roster: Roster) -> Merge | Wait:
        if len(pending) < roster.num_heads:
            return Wait("for both")
        return Merge({0: 0.0, 1: 0.5})


@pytest.mark.slow
def test_a_policy_object_decides_merges(local_ray: None, tmp_path: Path) -> None:
    """The weights after a real run are bitwise those of a simulation with the user's policy."""
    kwargs = settings(steps=10) | {"merge": MergeConfig(merge_iter=5, merge_threads=1, policy=HalfOfHeadOne())}
    result = LTETrainer(Regression(), run_config=storage(tmp_path, "r"), **kwargs).fit()
    expected = merged_in_process(Regression(), **kwargs)
    assert_same_model(result.path, expected)
    average = merged_in_process(Regression(), **settings(steps=10))
    assert any(not torch.equal(expected[name], value) for name, value in average.items())


def assert_clean(path: Path) -> None:
    assert all(group["state"] == "REMOVED" for group in placement_group_table().values())
    deadline = time.monotonic() + 120
    while lte_actors() and time.monotonic() < deadline:  # they were killed; the kernel takes a moment
        time.sleep(0.05)
    assert lte_actors() == []
    assert not list(path.rglob("*.part"))


def test_a_worker_that_raises_ends_the_run_and_leaves_the_last_checkpoint(local_ray: None, tmp_path: Path) -> None:
    """The error has head, step, and the worker's traceback; actors are ended, and the other heads' states saved."""
    run = {"run_config": storage(tmp_path, "r"), "failure": NO_FAILURES}
    trainer = LTETrainer(FailingWorker(), **run, **settings(checkpoint_every=1))
    with pytest.raises(WorkerFailed, match=r"head 1 at local step 13") as caught:
        trainer.fit()
    assert "ZeroDivisionError: the disk of the data is gone" in str(caught.value)
    assert "train_batches" in str(caught.value)
    directory = RunDirectory.open(str(tmp_path), "r")
    newest, skipped = checkpoint.read_newest_intact(directory)
    assert newest.version >= 2
    assert newest.facts["standings"]["1"]["step"] == 10
    assert 0 in newest.heads
    assert skipped == []
    assert not (tmp_path / "r" / "model.safetensors").exists()
    assert_clean(tmp_path)


@pytest.mark.slow
def test_a_failing_evaluation_ends_the_run(local_ray: None, tmp_path: Path) -> None:
    """An error in `evaluate` is raised with its traceback."""
    with pytest.raises(WorkerFailed, match=r"the evaluator:[\s\S]*the validation set is gone"):
        LTETrainer(FailingWorker(in_evaluate=True), run_config=storage(tmp_path, "r"), **settings()).fit()
    assert_clean(tmp_path)


class RaisingPolicy:
    """A policy that raises at the second merge."""

    def decide(self, pending: list[Pending], roster: Roster) -> Merge | Wait:
        if len(pending) < roster.num_heads:
            return Wait()
        if roster.version == 1:
            raise LookupError("no weight for you")
        return Merge({p.head: 0.5 for p in pending})


@pytest.mark.slow
def test_a_policy_that_raises_ends_the_run_by_name(local_ray: None, tmp_path: Path) -> None:
    """No head waits forever, and the error names the policy."""
    kwargs = settings() | {"merge": MergeConfig(merge_iter=5, policy=RaisingPolicy())}
    with pytest.raises(PolicyError, match="RaisingPolicy raised LookupError: no weight for you"):
        LTETrainer(Regression(), run_config=storage(tmp_path, "r"), **kwargs).fit()
    assert_clean(tmp_path)


class KilledHead(Regression):
    """Kills its own process in head 1's eighth step, as the kernel does when memory runs out."""

    def train_batches(self, shard):  # type: ignore[no-untyped-def]
        import os
        import signal

        for step, batch in enumerate(super().train_batches(shard), 1):
            if (shard.head, step) == (1, 8):
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


@pytest.mark.slow
def test_a_killed_head_ends_the_run_and_is_named(local_ray: None, tmp_path: Path) -> None:
    """After a real SIGKILL with max_failures=0, the error says which head's process died."""
    with pytest.raises(HeadLost, match="head 1"):
        LTETrainer(KilledHead(), run_config=storage(tmp_path, "r"), failure=NO_FAILURES, **settings()).fit()
    assert_clean(tmp_path)


class Diverging(Regression):
    """Its learning rate makes every weight infinite."""

    def build_optimizer(self, params: list[dict]) -> torch.optim.Optimizer:  # type: ignore[type-arg]
        return torch.optim.SGD(params, lr=float("inf"))


@pytest.mark.slow
def test_a_diverged_head_is_refused_and_ends_the_run(local_ray: None, tmp_path: Path) -> None:
    """NaN never reaches the base: three refusals in a row quarantine a head, and with the last head the run ends."""
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
@pytest.mark.parametrize(("last", "dropped"), [(12, 10), (99, 0)], ids=["two rounds", "forever"])
def test_poisoned_batches_cost_their_contributions_and_nothing_else(
    local_ray: None, tmp_path: Path, last: int, dropped: int
) -> None:
    """Bitwise the simulation, whether the head recovers or is quarantined; to the audit its batches are dropped, not lost."""
    kwargs, worker = settings(), Poisoned(last=last)
    result = LTETrainer(worker, run_config=storage(tmp_path, "r"), **kwargs).fit()
    in_process = run_in_process(worker, Settings("r", kwargs["lte"], kwargs["merge"], kwargs["train"]))
    assert_same_model(result.path, merged_in_process(worker, **kwargs))
    report = audit(read_rows((tmp_path / "r" / "metrics.jsonl").read_text()))
    assert report.clean, report.problems
    assert (report.dropped, report.batches) == (dropped, sum(merge.steps for merge in in_process.merges))


@pytest.mark.slow
def test_a_resumed_run_is_bitwise_the_uninterrupted_run(local_ray: None, tmp_path: Path) -> None:
    """20 steps, then 20 more from the checkpoint, give the same weights as 40 at once.

    Optimizer, data, dropout, and running statistics continue.
    """
    LTETrainer(BatchNormRegression(), run_config=storage(tmp_path, "parts"), **settings(steps=20)).fit()
    resumed = LTETrainer(BatchNormRegression(), run_config=storage(tmp_path, "parts", resume=True), **settings(steps=40)).fit()
    expected = merged_in_process(BatchNormRegression(), **settings(steps=40))
    assert_same_model(resumed.path, expected)
    assert float((expected["0.running_var"] - 1).abs().max()) > 0.001
    assert resumed.metrics["step"] == 40
    assert resumed.metrics["version"] == 8
    rows = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [row["version"] for row in rows if row["kind"] == "merge"] == list(range(1, 9))


@pytest.mark.parametrize(
    ("stack", "worker", "as_separate", "tolerance", "stops"),
    [
        ("never", DropoutRegression(), True, 0.0, False),
        pytest.param("never", DropoutRegression(), True, 0.0, True, marks=pytest.mark.slow),
        pytest.param("always", DropoutRegression(), False, 0.0, True, marks=pytest.mark.slow),
        # Stacking changes the order of sums: float32's 1e-7, magnified by 20 steps of Adam, whose steps are 3e-3 however small
        # the gradient. Heads with each other's gradients, data, or state would be off by about 3e-3.
        pytest.param("always", Regression(), True, 1e-4, True, marks=pytest.mark.slow),
    ],
    ids=["never", "never, resumed", "always, as simulated", "always, as separate"],
)
def test_virtual_heads_train_as_heads_of_separate_actors_and_resume(
    local_ray: None, tmp_path: Path, stack: str, worker: Regression, as_separate: bool, tolerance: float, stops: bool
) -> None:
    """Three heads in actors of two train as three actors do, also if stopped and resumed.

    Bitwise in turns, and nearly so if stacked; stacked heads with dropout equal bitwise one process that stacks them.
    """
    kwargs = settings(steps=20, checkpoint_every=1)
    kwargs["lte"] = LTEConfig(num_heads=3, lora_r=(2, 4, 8), lora_alpha=16) if stack == "never" else LTEConfig(3, 4)
    run = Settings("a", kwargs["lte"], kwargs["merge"], kwargs["train"])
    expected = run_in_process(worker, run) if as_separate else run_in_process(worker, run, heads_per_actor=2, stack_heads=stack)
    placement = PlacementConfig(heads_per_actor=2, cpus_per_head=0.5, stack_heads=stack)
    if stops:
        first = {**kwargs, "train": dataclasses.replace(kwargs["train"], steps=10)}
        LTETrainer(worker, scaling_config=placement, run_config=storage(tmp_path, "a"), **first).fit()
    result = LTETrainer(worker, scaling_config=placement, run_config=storage(tmp_path, "a", resume=True), **kwargs).fit()
    start, model = prepare(worker, run).model.state_dict(), worker.build_model()
    load_base(model, expected.plan, expected.base)
    merged = model_of(result.path)
    for name, value in model.state_dict().items():
        assert torch.allclose(merged[name], value, rtol=0.0, atol=tolerance), name
        assert float((value - start[name]).abs().max()) > 0.01, name  # far more than the tolerance
    assert result.metrics["samples"] == 3 * 20 * 64


class OddEvaluation(Regression):
    """Its evaluation uses names of the run's own metrics, and its sample fails."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"version": 7.0, "step": float("nan"), "acc[/top5]": 0.5}

    def sample(self, model: nn.Module) -> str:
        raise ZeroDivisionError("nothing to show")


@pytest.mark.slow
def test_odd_names_in_an_evaluation_and_a_failing_sample_break_nothing(local_ray: None, tmp_path: Path) -> None:
    """The evaluation's figures are separate from the run's; the model is still written; NaN is null in JSON."""
    result = LTETrainer(OddEvaluation(), run_config=storage(tmp_path, "r"), **settings(steps=10)).fit()
    assert result.metrics["version"] == 2
    assert result.metrics["evaluation"]["version"] == 7.0
    assert result.metrics["sample"] == "sample() raised: ZeroDivisionError: nothing to show"
    assert (tmp_path / "r" / "model.safetensors").exists()
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    values = [row["values"] for row in rows if row["kind"] == "evaluation"]
    assert values[-1] == {"version": 7.0, "step": None, "acc[/top5]": 0.5}


class Unpicklable:
    """A policy that can't be pickled."""

    def __init__(self) -> None:
        self.source = (n for n in range(3))

    def decide(self, pending: list[Pending], roster: Roster) -> Wait:
        return Wait()


def test_an_overwrite_that_cannot_start_leaves_the_old_run(completed: CompletedRun, tmp_path: Path) -> None:
    """The old run is removed only if the new one can start; a failed start leaves no folder that blocks the name."""
    shutil.copytree(completed.path / "r", tmp_path / "r")
    kwargs = settings() | {"merge": MergeConfig(policy=Unpicklable())}
    with pytest.raises(WorkerError, match="Unpicklable can't be sent"):
        LTETrainer(Regression(), run_config=storage(tmp_path, "r", overwrite=True), **kwargs).fit()
    assert (tmp_path / "r" / "model.safetensors").exists()
    with pytest.raises(WorkerError, match="Unpicklable can't be sent"):
        LTETrainer(Regression(), run_config=storage(tmp_path, "new"), **kwargs).fit()
    assert not (tmp_path / "new").exists()


class OnlyHeadOne:
    """Merges each contribution of head 1 at once and discards those of head 0."""

    def decide(self, pending: list[Pending], roster: Roster) -> Merge | Discard | Wait:
        if not pending:
            return Wait()
        if pending[0].head == 0:
            return Discard([0], "not today")
        return Merge({1: 1.0})


@pytest.mark.slow
def test_a_head_that_the_policy_never_merges_keeps_its_steps_on_resume(local_ray: None, tmp_path: Path) -> None:
    """All its steps are in its saved state, so the resumed run loses nothing."""
    kwargs = settings(steps=10) | {"merge": MergeConfig(merge_iter=5, policy=OnlyHeadOne())}
    LTETrainer(Regression(), run_config=storage(tmp_path, "r"), **kwargs).fit()
    kwargs |= {"train": dataclasses.replace(kwargs["train"], steps=20)}
    resumed = LTETrainer(Regression(), run_config=storage(tmp_path, "r", resume=True), **kwargs).fit()
    assert (resumed.metrics["step"], resumed.metrics["samples"]) == (20, 2 * 20 * 64)
    newest, _ = checkpoint.read_newest_intact(RunDirectory.open(str(tmp_path), "r"))
    assert {head: position["step"] for head, position in newest.facts["standings"].items()} == {"0": 0, "1": 20}


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_previous_one_is_used(
    local_ray: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One byte of a head's file is changed: the file is named, and the run still is bitwise the uninterrupted one.

    If no intact checkpoint is left, nothing starts.
    """
    LTETrainer(DropoutRegression(), run_config=storage(tmp_path, "r"), **settings(steps=10, checkpoint_every=1)).fit()
    _damage(tmp_path / "r" / "checkpoints" / "000002" / "head-0001.safetensors")
    resumed = LTETrainer(DropoutRegression(), run_config=storage(tmp_path, "r", resume=True), **settings(steps=20)).fit()
    assert "head-0001.safetensors is damaged" in caplog.text
    assert "using 000001 instead" in caplog.text
    assert_same_model(resumed.path, merged_in_process(DropoutRegression(), **settings(steps=20)))
    for file in (tmp_path / "r" / "checkpoints").glob("*/base.safetensors"):
        _damage(file)
    with pytest.raises(StorageError, match=r"base\.safetensors is damaged"):
        LTETrainer(DropoutRegression(), run_config=storage(tmp_path, "r", resume=True), **settings(steps=30)).fit()


def _damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_resume_refuses_incompatible_settings(completed: CompletedRun, tmp_path: Path) -> None:
    """Fewer steps than were taken, more heads without more steps, and another rank: one clear error each."""
    shutil.copytree(completed.path / "r", tmp_path / "r")
    resume = storage(tmp_path, "r", resume=True)
    with pytest.raises(StorageError, match=r"has already taken all 30 local steps per head\. Raise --steps"):
        LTETrainer(DropoutRegression(), run_config=resume, **settings(steps=25)).fit()
    more = settings()
    with pytest.raises(StorageError, match="Raise --steps"):
        LTETrainer(
            DropoutRegression(), run_config=resume, **more | {"lte": dataclasses.replace(more["lte"], num_heads=3)}
        ).fit()
    kwargs = settings(steps=50)
    with pytest.raises(StorageError, match="--lora-r was 8 and is 4"):
        LTETrainer(
            DropoutRegression(), run_config=resume, **kwargs | {"lte": dataclasses.replace(kwargs["lte"], lora_r=4)}
        ).fit()


def test_a_run_whose_driver_died_just_before_its_end_is_completed_by_the_same_call(
    completed: CompletedRun, tmp_path: Path
) -> None:
    """All steps are merged but the model isn't written: no step is taken again, and the same weights are exported."""
    shutil.copytree(completed.path / "r", tmp_path / "r")
    model, rows = tmp_path / "r" / "model.safetensors", tmp_path / "r" / "metrics.jsonl"
    exported, before = model.read_bytes(), rows.read_text().count('"merge"')
    model.unlink()
    result = LTETrainer(DropoutRegression(), run_config=storage(tmp_path, "r", resume=True), **settings()).fit()
    assert model.read_bytes() == exported
    assert rows.read_text().count('"merge"') == before
    assert result.metrics is not None
    assert completed.result.metrics is not None
    for name in ("validation_loss", "step", "version"):
        assert result.metrics[name] == completed.result.metrics[name], name


def test_rebuilding_gives_the_driver_and_heads_the_same_start(tmp_path: Path) -> None:
    """Two calls of `prepare` give bitwise the same version 0."""
    kwargs = settings()
    config = Settings("r", kwargs["lte"], kwargs["merge"], kwargs["train"])
    assert torch.equal(prepare(Regression(), config).base, prepare(Regression(), config).base)

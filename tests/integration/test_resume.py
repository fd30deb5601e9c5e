"""Runs that are interrupted and resumed, with the same number of heads and with another, on a real Ray."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch

from lte_ray import LTETrainer, MergeConfig, Shard, checkpoint
from lte_ray.audit import audit
from lte_ray.cli.main import main
from lte_ray.errors import StorageError
from lte_ray.run.metrics import Progress
from lte_ray.storage import RunDirectory
from tests.support.ray_runs import DropoutRegression, assert_same_model, merged_in_process, settings, storage

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@dataclasses.dataclass
class Slow(DropoutRegression):
    """Steps take 20 ms; after step `hold_at` they take a second while the file `hold` exists.

    So a run is still in the middle of a round when the driver interrupts it, even on a loaded machine.
    """

    hold: str = ""
    hold_at: int = 0

    def train_batches(self, shard: Shard) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for step, batch in enumerate(super().train_batches(shard), shard.cursor + 1):
            time.sleep(1.0 if self.hold and step > self.hold_at and Path(self.hold).exists() else 0.02)
            yield batch


class Interrupting:
    """A reporter that raises KeyboardInterrupt, as Ctrl-C does, once every head has taken `step` local steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def update(self, progress: Progress) -> None:
        if progress.heads and min(head.step for head in progress.heads) >= self.step:
            raise KeyboardInterrupt

    def close(self) -> None: ...


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run_interrupted(path: Path, step: int, kwargs: dict[str, Any]) -> None:
    """Trains until `step` and asserts that the checkpoint has the states of all heads, wherever they are in a round."""
    hold = path / "hold"
    hold.touch()
    trainer = LTETrainer(
        Slow(hold=str(hold), hold_at=step), run_config=storage(path, "r"), reporter=Interrupting(step), **kwargs
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    hold.unlink()
    newest, skipped = checkpoint.read_newest_intact(RunDirectory.open(str(path), "r"))
    assert skipped == []
    assert len(newest.heads) == kwargs["lte"].num_heads


@pytest.mark.slow
@pytest.mark.parametrize(("step", "schedule"), [(1, ""), (12, ""), (24, ""), (24, "0:2 0.3:20 0.4:3")])
def test_a_barrier_run_interrupted_anywhere_is_bitwise_the_uninterrupted_run(
    local_ray: None, tmp_path: Path, step: int, schedule: str
) -> None:
    """Ctrl-C in the middle of a round: resumed, the run gives the weights of the simulation, dropout included.

    With the schedule, the interrupted round began at step 18 with 20 steps; one that began at step 24 would have 3.
    """
    kwargs = settings(steps=60) | {"merge": MergeConfig(merge_iter=5, merge_threads=1, merge_schedule=schedule)}
    if step == 1:  # with longer rounds nothing would be merged yet, so nothing would be saved
        kwargs["merge"] = MergeConfig(merge_iter=2, merge_threads=1)
    run_interrupted(tmp_path, max(step, 3), kwargs)
    result = LTETrainer(Slow(), run_config=storage(tmp_path, "r", resume=True), **kwargs).fit()
    assert_same_model(result.path, merged_in_process(DropoutRegression(), **kwargs))
    assert audit(read_rows(tmp_path / "r")).clean


@pytest.mark.parametrize(
    ("heads_before", "heads"),
    [
        pytest.param(1, 2, marks=pytest.mark.slow),
        pytest.param(2, 1, marks=pytest.mark.slow),
        pytest.param(2, 3, marks=pytest.mark.slow),
    ],
)
def test_an_asynchronous_run_resumed_with_more_or_fewer_heads_merges_each_batch_once(
    local_ray: None, tmp_path: Path, heads_before: int, heads: int
) -> None:
    """Interrupted, and restored with more or fewer heads: the data is repartitioned without repeats or gaps."""
    kwargs = settings(steps=30) | {"merge": MergeConfig(merge_iter=5, merge_threads=1, when="arrival", wait=False)}
    kwargs["lte"] = dataclasses.replace(kwargs["lte"], num_heads=heads_before)
    run_interrupted(tmp_path, 12, kwargs)
    before, _ = checkpoint.read_newest_intact(RunDirectory.open(str(tmp_path), "r"))
    trainer = LTETrainer.restore(tmp_path / "r", worker=Slow, lte=dataclasses.replace(kwargs["lte"], num_heads=heads))
    result = trainer.fit()
    assert audit(read_rows(tmp_path / "r")).problems == []
    assert result.metrics["version"] > before.version
    newest, _ = checkpoint.read_newest_intact(RunDirectory.open(str(tmp_path), "r"))
    assert set(newest.facts["standings"]) == {str(head) for head in range(heads)}


@pytest.mark.slow
def test_a_run_is_resumed_by_its_name_alone(
    local_ray: None, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """``--resume NAME`` takes worker and settings from run.toml; flags win; another name is one clear error."""
    flags = ["--num-heads", "1", "--lora-r", "4", "--merge-iter", "5", "--name", "r", "--storage", str(tmp_path)]
    assert main(["train", "workers.regression:Regression", *flags, "--steps", "10", "--worker.width", "12"]) == 0
    assert main(["train", "--resume", "r", "--storage", str(tmp_path), "--steps", "20"]) == 0
    assert "continues with workers.regression:Regression" in caplog.text
    merges = [row for row in read_rows(tmp_path / "r") if row["kind"] == "merge"]
    assert [row["version"] for row in merges] == [1, 2, 3, 4]
    assert main(["train", "--resume", "typo", "--storage", str(tmp_path)]) == 2
    assert "There is no run in" in capfd.readouterr().err


def test_a_run_that_cannot_be_restored_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without a run, a name without a folder (searched in the current one), and a damaged run.toml."""
    with pytest.raises(StorageError, match="There is no run in"):
        LTETrainer.restore(tmp_path / "nothing")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match=f"There is no run in {tmp_path}/nothing: "):
        LTETrainer.restore("nothing")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "run.toml").write_text("steps = [")
    with pytest.raises(StorageError, match=r"run\.toml is damaged"):
        LTETrainer.restore(tmp_path / "r")


def test_rays_default_of_no_failures_does_not_make_a_run_fragile() -> None:
    """Ray's RunConfig has max_failures=0 by default, which counts as unset; other numbers count."""
    from lte_ray.trainer import _failure

    assert _failure(ray.train.RunConfig(name="r")).max_failures == -1
    explicit = ray.train.RunConfig(name="r", failure_config=ray.train.FailureConfig(max_failures=3))
    assert _failure(explicit).max_failures == 3

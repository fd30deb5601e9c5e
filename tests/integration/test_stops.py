"""Runs on Ray that end early without an error, and that callbacks follow."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lte_ray
from lte_ray import LTEConfig, LTETrainer, MergeConfig, TrainConfig
from lte_ray.config import PlacementConfig
from tests.support.ray_runs import DropoutRegression, assert_same_model, merged_in_process, settings, storage
from workers.regression import Regression

pytestmark = pytest.mark.ray

CALLBACK = """
import lte_ray

class Stop(lte_ray.Callback):
    def on_merge(self, run, row):
        if row["version"] == 2:
            run.stop("two merges are enough")
"""


class Kept(lte_ray.Callback):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def on_merge(self, run: Any, row: dict[str, Any]) -> None:
        self.calls.append(("merge", row["version"]))

    def on_checkpoint(self, run: Any, version: int) -> None:
        self.calls.append(("checkpoint", version))

    def on_event(self, run: Any, row: dict[str, Any]) -> None:
        self.calls.append((row["event"], row.get("why")))

    def on_run_end(self, run: Any, outcome: Any) -> None:
        self.calls.append(("end", outcome))


def test_a_run_that_a_callback_ends_is_resumed_to_the_same_bits(tmp_path: Path, local_ray: None) -> None:
    """It is saved between two steps of a round, exported and evaluated; resumed, its weights are those of one that went on."""
    path = tmp_path / "stop.py"
    path.write_text(CALLBACK)
    run, kept = settings(200, callback=(f"{path}:Stop",)), Kept()
    result = LTETrainer(DropoutRegression(), **run, run_config=storage(tmp_path, "r"), callbacks=[kept]).fit()  # type: ignore[arg-type]
    metrics = result.metrics
    assert metrics["stopped"] == {"kind": "request", "reason": "two merges are enough"}
    assert 2 <= metrics["version"] < 40 and metrics["validation_loss"] == metrics["evaluation"]["validation_loss"]
    assert (Path(result.path) / "model.safetensors").exists()
    last = metrics["version"]
    assert [value for name, value in kept.calls if name == "merge"] == list(range(1, last + 1))
    assert kept.calls[-3:] == [("stopped", "two merges are enough"), ("finished", None), ("end", result)]
    assert ("checkpoint", last) in kept.calls and result.checkpoint.path.endswith(f"{last:06d}")
    rows = [json.loads(line) for line in (Path(result.path) / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["lr"]["lora"].keys() == {"0", "1"} and rows[0]["gradient_norm"]["0"] > 0 and rows[0]["memory"]["1"] > 1e7
    steps = TrainConfig(steps=last * 5 + 10, seed=3)
    again = LTETrainer.restore(result.path, train=steps).fit()
    assert again.metrics["stopped"] is None
    assert_same_model(again.path, merged_in_process(DropoutRegression(), run["lte"], run["merge"], steps))  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_limit_ends_virtual_heads_that_do_not_wait(tmp_path: Path, local_ray: None) -> None:
    """Heads in the middle of a round are saved; the resumed run takes all its steps."""
    run = {
        "lte": LTEConfig(num_heads=4, lora_r=8, lora_alpha=16),
        "merge": MergeConfig(merge_iter=5, wait=False),
        "scaling_config": PlacementConfig(heads_per_actor=2),
    }
    train = TrainConfig(steps=10**6, seed=3, eval_every=2, stop_when="validation_loss<0.1", schedule="constant")
    result = LTETrainer(DropoutRegression(), train=train, run_config=storage(tmp_path, "r"), **run).fit()  # type: ignore[arg-type]
    assert result.metrics["stopped"]["kind"] == "stop-when"
    assert result.metrics["step"] < train.steps
    steps = result.metrics["step"] + 20
    again = LTETrainer.restore(result.path, train=TrainConfig(steps=steps, seed=3)).fit()
    assert again.metrics["step"] == steps and again.metrics["stopped"] is None


@pytest.mark.slow
def test_processes_of_ordinary_training_end_after_their_round(tmp_path: Path, local_ray: None) -> None:
    """The time is over before the first merge is evaluated; the run is resumed from its last version."""
    train = TrainConfig(steps=10**6, seed=3, baseline=True, baseline_processes=2, max_time=1.0)
    run = settings() | {"train": train}
    result = LTETrainer(DropoutRegression(), run_config=storage(tmp_path, "r"), **run).fit()  # type: ignore[arg-type]
    assert result.metrics["stopped"]["kind"] == "max-time"
    assert result.metrics["step"] == 5 * result.metrics["version"] > 0
    assert result.checkpoint.path.endswith(f"{result.metrics['version']:06d}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "train",
    [{}, {"baseline": True, "baseline_processes": 2}],
    ids=["heads", "ordinary training"],
)
def test_a_run_with_traces_trains_as_without(tmp_path: Path, local_ray: None, train: dict[str, Any]) -> None:
    """The traces name the parts of the work; the weights are the same."""
    for name, profile in (("plain", ""), ("traced", "12:14")):
        LTETrainer(
            Regression(),
            lte=LTEConfig(num_heads=2, lora_r=4),
            merge=MergeConfig(merge_iter=5),
            train=TrainConfig(steps=20, eval_every=0, profile=profile, **train),
            scaling_config=PlacementConfig(cpus_per_head=1),
            run_config=storage(tmp_path, name),
        ).fit()
    plain, traced = (tmp_path / name / "model.safetensors" for name in ("plain", "traced"))
    assert plain.read_bytes() == traced.read_bytes()
    traces = tmp_path / "traced" / "profile"
    names = {file.name: gzip.decompress(file.read_bytes()).decode() for file in traces.iterdir()}
    assert '"optimizer step"' in names["head-0.json.gz"]
    if not train:
        assert '"merge"' in names["coordinator.json.gz"]


@pytest.mark.slow
def test_a_run_is_stopped_from_elsewhere(tmp_path: Path, local_ray: None) -> None:
    """`lte-ray stop` finds it by its files and waits until it has saved, exported and ended. The request is gone then."""
    said: list[str] = []

    class Elsewhere(lte_ray.Callback):
        """Stops the run as another process would."""

        def on_merge(self, run: Any, row: dict[str, Any]) -> None:
            if row["version"] == 2:
                code = "import sys; from lte_ray.cli.main import main; sys.exit(main(sys.argv[1:]))"
                command = [sys.executable, "-c", code, "stop", run.path, "--reason", "enough", "--json"]
                self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

        def wait(self) -> None:
            said.append(self.process.communicate()[0])

    elsewhere = Elsewhere()
    result = LTETrainer(Regression(), **settings(100_000), run_config=storage(tmp_path, "r"), callbacks=[elsewhere]).fit()  # type: ignore[arg-type]
    elsewhere.wait()
    assert result.metrics["stopped"] == {"kind": "request", "reason": "enough"}
    assert elsewhere.process.returncode == 0
    status = json.loads(said[0])
    assert (status["state"], status["why"], status["model"]) == ("stopped", "enough", True)
    assert status["checkpoint"] == status["version"] == result.metrics["version"]
    assert not (Path(result.path) / "stop.json").exists()

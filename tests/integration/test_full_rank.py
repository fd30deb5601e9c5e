"""Full-rank runs and the baseline on a real Ray: equal to a single process, resumed, and told apart from LTE."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from lte_ray import LTEConfig, LTETrainer, MergeConfig, TrainConfig
from lte_ray.audit import audit, read_rows
from lte_ray.cli.main import main
from lte_ray.errors import ConfigError, StorageError
from lte_ray.export import peft_adapter, safetensors
from tests.support.ray_runs import BatchNormRegression, assert_same_model, merged_in_process, settings, storage

pytestmark = pytest.mark.ray

DILOCO: dict[str, Any] = {
    **settings(20),
    "lte": LTEConfig(num_heads=2, full_rank=True),
    "merge": MergeConfig(merge_iter=5, merge_threads=1, policy="nesterov", policy_args={"lr": 0.5, "momentum": 0.5}),
}


@pytest.mark.slow
def test_diloco_on_ray_equals_one_process_and_resumes(shared_ray: None, tmp_path: Path) -> None:
    """Bit by bit, with dropout, running statistics, the outer momentum and each head's optimizer state."""
    worker = BatchNormRegression()
    whole = merged_in_process(worker, **DILOCO)
    LTETrainer(worker, **{**DILOCO, "train": TrainConfig(steps=10, seed=3)}, run_config=storage(tmp_path, "r")).fit()
    result = LTETrainer(worker, **DILOCO, run_config=storage(tmp_path, "r", resume=True)).fit()
    assert_same_model(result.path, whole)
    assert audit(read_rows((tmp_path / "r" / "metrics.jsonl").read_bytes())).clean
    assert safetensors(result.path, tmp_path / "m.safetensors", version=4, worker=worker).rank is None
    assert_same_model_file(tmp_path / "m.safetensors", tmp_path / "r")
    with pytest.raises(ConfigError, match="was trained in full rank, so an adapter of low rank can't hold its change"):
        peft_adapter(result.path, tmp_path / "adapter", worker=worker)
    for changed, says in (
        ({"train": TrainConfig(steps=20, baseline=True)}, "is a run of LTE: to continue it, leave --baseline out"),
        ({"lte": dataclasses.replace(DILOCO["lte"], full_rank=False)}, "--full-rank was True and is False"),
    ):
        trainer = LTETrainer(worker, **{**DILOCO, **changed}, run_config=storage(tmp_path, "r", resume=True))
        with pytest.raises(StorageError, match=says):
            trainer.fit()


def assert_same_model_file(file: Path, run: Path) -> None:
    assert file.read_bytes() == (run / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_the_baseline_on_ray_equals_one_process_and_resumes(
    shared_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command of an LTE run and --baseline, whose other settings don't count; its records say what it is."""
    train = TrainConfig(steps=20, seed=3, baseline=True)
    lte, merge = (
        LTEConfig(num_heads=4, lora_r=8, reset="B"),
        MergeConfig(merge_iter=5, policy="ties", merge_threads=1),
    )
    whole = merged_in_process(BatchNormRegression(), lte, merge, train)
    worker = "tests.support.ray_runs:BatchNormRegression"
    flags = "--num-heads 4 --lora-r 8 --reset B --merge-iter 5 --policy ties --seed 3 --heads-per-actor 2"
    flags += f" --min-heads 2 --threads-per-head 1 --storage {tmp_path} --name r"
    assert main(["train", worker, *flags.split(), "--baseline", "--steps", "10"]) == 0
    shown = capsys.readouterr().out
    assert "10 steps of ordinary training (baseline), 2,560 samples" in " ".join(shown.split())
    assert "head" not in shown[shown.rindex("done") :]
    assert main(["train", "--resume", "r", "--storage", str(tmp_path), "--steps", "20"]) == 0
    assert_same_model(tmp_path / "r", whole)

    record = tomllib.loads((tmp_path / "r" / "run.toml").read_text())
    assert (record["baseline"], record["num_heads"], record["policy"], record["accumulate"]) == (True, 4, "ties", 1)
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    merges = [row for row in rows if row["kind"] == "merge"]
    assert [(row["step"], row["samples"], row["heads"]) for row in merges] == [(n, 5 * 4 * 64, [0]) for n in (5, 10, 15, 20)]
    assert audit(rows).clean
    safetensors(tmp_path / "r", tmp_path / "m.safetensors", version=4, worker=BatchNormRegression())
    assert_same_model_file(tmp_path / "m.safetensors", tmp_path / "r")

    capsys.readouterr()
    assert main(["train", worker, *flags.split(), "--resume"]) == 2
    assert "is a run of ordinary training: to continue it, give --baseline" in " ".join(capsys.readouterr().err.split())

"""For tests that start Ray: workers that fail on purpose, run settings, and process look-ups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lte_ray import LTEConfig, MergeConfig, Shard, TrainConfig
from lte_ray.config import StorageConfig
from lte_ray.engine.in_process import run_in_process
from lte_ray.engine.prepare import load_base
from lte_ray.engine.settings import Settings
from workers.regression import Regression

RUN_FILES = {"checkpoints", "environment.json", "metrics.jsonl", "model.safetensors", "run.toml", "tensorboard"}
"""What a run directory has after a run with default logs."""

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class FailingWorker(Regression):
    """Raises in local step `at` of head `head`, or in evaluate."""

    head: int = 1
    at: int = 13
    in_evaluate: bool = False

    def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        for step, batch in enumerate(super().train_batches(shard), shard.cursor + 1):
            if (shard.head, step) == (self.head, self.at) and not self.in_evaluate:
                raise ZeroDivisionError("the disk of the data is gone")
            yield batch

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        if self.in_evaluate:
            raise ZeroDivisionError("the validation set is gone")
        return super().evaluate(model)


@dataclass
class DropoutRegression(Regression):
    """Regression with dropout, so that results depend on each head's random numbers."""

    def build_model(self) -> nn.Module:
        return nn.Sequential(*super().build_model(), nn.Dropout(0.1))


class BatchNormRegression(DropoutRegression):
    """With batch normalization, whose running statistics are merged, and a buffer that overlaps another."""

    def build_model(self) -> nn.Module:
        model = nn.Sequential(nn.BatchNorm1d(self.width), *super().build_model())
        model.register_buffer("table", torch.arange(8.0))
        model.register_buffer("part", model.table[:4])
        return model


def settings(steps: int = 30, **train: object) -> dict[str, object]:
    """Returns settings of small runs that merge with one thread, as bitwise comparisons need."""
    return {
        "lte": LTEConfig(num_heads=2, lora_r=8, lora_alpha=16),
        "merge": MergeConfig(merge_iter=5, merge_threads=1),
        "train": TrainConfig(steps=steps, seed=3, **train),  # type: ignore[arg-type]
    }


def storage(path: Path, name: str, **more: object) -> StorageConfig:
    return StorageConfig(name=name, storage=str(path), **more)  # type: ignore[arg-type]


def merged_in_process(
    worker: Any, lte: LTEConfig, merge: MergeConfig, train: TrainConfig, ema: bool = False
) -> dict[str, Tensor]:
    """Returns the merged model of a run with these settings, or its moving average, all in this process."""
    done = run_in_process(worker, Settings("r", lte, merge, train))
    model, weights = worker.build_model(), done.coordinator.ema if ema else done.base
    assert weights is not None
    load_base(model, done.plan, weights)
    return dict(model.state_dict())


def assert_same_model(run: str | Path, expected: dict[str, Tensor], file: str = "model.safetensors") -> None:
    """Asserts that the model in this file of the run's directory equals this one, bit by bit."""
    merged = load_file(Path(run) / file)
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(merged[name], value), name


def descendants(root: int) -> dict[int, str]:
    """Returns the command lines of all descendants of the process `root`, by process id."""
    parents: dict[int, int] = {}
    lines: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                lines[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ").strip()
            except OSError:
                continue  # it ended meanwhile
    found: set[int] = set()
    while more := {pid for pid, parent in parents.items() if (parent == root or parent in found) and pid not in found}:
        found |= more
    return {pid: lines[pid] for pid in found}


def lte_actors(root: int | None = None) -> list[str]:
    """Returns the command lines of lte-ray's actors below the process `root` (by default this one)."""
    names = ("ray::HeadActor", "ray::CoordinatorActor", "ray::EvaluatorActor", "ray::DataParallelActor")
    return [line for line in descendants(root or os.getpid()).values() if any(name in line for name in names)]

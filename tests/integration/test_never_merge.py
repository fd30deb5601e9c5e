"""Heads that never merge, on a real Ray: one is killed, the run is continued, and each adapter is as if trained alone."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lte_ray.export
from lte_ray import LTEConfig, LTETrainer, MergeConfig, Shard, TrainConfig
from lte_ray.engine.in_process import run_in_process
from lte_ray.engine.settings import Settings
from lte_ray.export.run_reader import read_run
from tests.support.ray_runs import storage
from workers.regression import Regression

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(600)]


class Plain(Regression):
    """Has an optimizer without state: a head whose process was killed may find none of its own in the newest checkpoint."""

    def build_optimizer(self, params: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.02)


@dataclasses.dataclass
class Mortal(Plain):
    """Head 1's process is killed once, in the middle of its second round."""

    marker: str = ""

    def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        for step, batch in enumerate(super().train_batches(shard), shard.cursor + 1):
            if self.marker and shard.head == 1 and step == 8 and not Path(self.marker).exists():
                Path(self.marker).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


def test_adapters_survive_a_kill_and_a_resume_and_equal_those_of_lone_heads(tmp_path: Path) -> None:
    """Bit for bit. Each version has all heads' losses and figures, sends nothing down, and no merged model is written."""
    lte, merge = LTEConfig(num_heads=2, lora_r=4, others="frozen"), MergeConfig(merge_iter=5, never_merge=True)
    train = TrainConfig(steps=15, seed=3, checkpoint_every=1, eval_every=1)
    kwargs = {"lte": lte, "merge": merge, "train": train}
    result = LTETrainer(Mortal(marker=str(tmp_path / "dead")), run_config=storage(tmp_path, "r"), **kwargs).fit()  # type: ignore[arg-type]
    assert (tmp_path / "dead").exists()
    train = dataclasses.replace(train, steps=25)
    result = LTETrainer.restore(result.path, Plain(), train=train).fit()
    done = run_in_process(Plain(), Settings("r", lte, merge, train))
    saved = read_run(result.path, worker=Plain())
    assert torch.equal(saved.base, saved.initial)
    for head in done.heads:
        tensors = saved.head(head.number)
        for name, factor in head.state.factors.items():
            assert torch.equal(tensors[f"factor.{name}"], factor), (head.number, name)
    rows = [json.loads(line) for line in Path(result.path, "metrics.jsonl").read_text().splitlines()]
    merges = [row for row in rows if row["kind"] == "merge"]
    assert sum(row["steps"] for row in merges) == 2 * 25
    assert {row["bytes_down"] for row in merges} == {0}
    assert all([str(head) for head in row["heads"]] == list(row["train_loss"]) for row in merges)
    values = [row["values"] for row in rows if row["kind"] == "evaluation"][-1]
    of_heads = [values[f"head_{number}_validation_loss"] for number in (0, 1)]
    assert values["validation_loss"] == pytest.approx(sum(of_heads) / 2)
    assert result.metrics is not None
    assert result.metrics["validation_loss"] == values["validation_loss"]
    assert not Path(result.path, "model.safetensors").exists()
    lte_ray.export.safetensors(result.path, tmp_path / "one.safetensors", head=1, worker=Plain())

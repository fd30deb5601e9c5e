"""A worker in a file of a package, on real heads: what it holds, and what is seen when it fails."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from lte_ray import LTEConfig, LTETrainer, MergeConfig, TrainConfig
from lte_ray.errors import WorkerError
from lte_ray.import_object import load_object
from tests.support.ray_runs import storage

pytestmark = pytest.mark.ray

DATA = """
from functools import lru_cache
from threading import Lock

import torch

LOCK = Lock()

@lru_cache
def load():
    with LOCK:
        return torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
"""

NET = """
from pathlib import Path

import torch.nn.functional as F
from torch import nn

from .data import load

class Net:
    def __init__(self, marks: str):
        self.marks = Path(marks)

    def build_model(self):
        return nn.Linear(8, 8)

    def train_batches(self, shard):
        for step, rows in enumerate(shard.indices(len(load()), 16), shard.cursor + 1):
            if (shard.head, step) == (1, 7) and not (self.marks / "failed").exists():
                (self.marks / "failed").touch()
                raise ValueError("sample 17 is broken")
            yield load()[rows]

    def loss(self, model, batch):
        return F.mse_loss(model(batch), batch)

    def evaluate(self, model):
        return {"error": F.mse_loss(model(load()), load()).item()}
"""


def test_a_file_with_a_cache_and_relative_imports_trains_and_its_failure_is_seen(
    local_ray: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Heads and evaluator import the package. One head raises once: one warning, and the traceback is in errors.log."""
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "data.py").write_text(DATA)
    (tmp_path / "pkg" / "net.py").write_text(NET)
    kind = load_object(f"{tmp_path}/pkg/net.py:Net", what="WORKER", error=WorkerError)
    with caplog.at_level(logging.WARNING, "lte_ray"):
        result = LTETrainer(
            kind(str(tmp_path)),
            LTEConfig(num_heads=2, lora_r=2),
            MergeConfig(merge_iter=5),
            TrainConfig(steps=20),
            run_config=storage(tmp_path, "r"),
        ).fit()
    assert result.metrics is not None
    assert result.metrics["step"] == 20
    assert result.metrics["evaluation"]["error"] > 0
    (warning,) = [record.getMessage() for record in caplog.records if "head 1" in record.getMessage().lower()]
    place = tmp_path / "r" / "errors.log"
    assert warning.endswith(f"ValueError: sample 17 is broken. Head 1 is started again. Details: {place}")
    text = place.read_text()
    assert text.index("In your code:") < text.index("pkg/net.py") < text.index("All of it:")
    assert "    raise ValueError" in text
    rows = [json.loads(row) for row in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [row["heads"] for row in rows if row.get("event") == "head_restarts"] == [[1]]

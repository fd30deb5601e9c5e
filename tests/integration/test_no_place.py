"""A head for which the cluster has no place any more, in a run whose other head gets done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lte_ray import LTETrainer
from lte_ray.audit import audit, read_rows
from lte_ray.errors import RunError
from lte_ray.runtime import placement
from lte_ray.runtime.controller import actor_launcher, head_actors
from tests.support.ray_runs import FailingWorker, Regression, settings, storage

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_the_run_ends_by_itself_with_everything_saved(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The error says why; the merged weights are there, and the run continues with both heads once there is room."""
    launch, lost_places = actor_launcher.ActorLauncher.launch_heads, []

    def launch_nowhere(self: Any, numbers: tuple[int, ...], strategy: Any, incarnation: int, moved: Any) -> Any:
        if not incarnation:
            return launch(self, numbers, strategy, incarnation, moved)
        lost_places.append(strategy)
        with monkeypatch.context() as patch:
            patch.setattr(placement.Placement, "bundle", {"CPU": 1.0, "a resource that no node has": 1.0})
            return launch(self, numbers, "DEFAULT", incarnation, moved)

    with monkeypatch.context() as patch:
        patch.setattr(actor_launcher.ActorLauncher, "launch_heads", launch_nowhere)
        patch.setattr(head_actors, "is_placed", lambda strategy: strategy not in lost_places)
        patch.setattr(placement, "PATIENCE", 1.0)
        patch.setattr(placement, "LAST_PATIENCE", 5.0)
        with pytest.raises(RunError, match="The run ended without head 1: the cluster had no place for 5 s"):
            LTETrainer(FailingWorker(), **settings(), run_config=storage(tmp_path, "r")).fit()
    assert "the run ends without head 1 after 5 s (--resource-timeout)" in caplog.text
    assert (tmp_path / "r" / "model.safetensors").exists()
    rows = [json.loads(row) for row in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [row["heads"] for row in rows if row.get("event") == "head_dropped"] == [[1]]
    assert [row["kind"] for row in rows].count("evaluation") >= 1

    resumed = LTETrainer(Regression(), **settings(), run_config=storage(tmp_path, "r", resume=True)).fit()
    assert resumed.metrics is not None
    assert resumed.metrics["step"] == 30
    report = audit(read_rows((tmp_path / "r" / "metrics.jsonl").read_text()))
    assert report.clean, report.problems
    assert report.samples == 2 * 30 * Regression().batch_size

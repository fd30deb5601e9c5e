"""Sinks, Ray's metrics, the environment and the result of a real run, which is resumed."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import ray

import lte_ray
from lte_ray import LogRow, LTETrainer, RunInfo
from tests.support.ray_runs import settings, storage
from workers.regression import Regression

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@dataclass
class Watching:
    """A sink that keeps what it is told."""

    runs: list[RunInfo] = field(default_factory=list)
    rows: list[LogRow] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)

    def open(self, run: RunInfo) -> None:
        self.runs.append(run)

    def row(self, row: LogRow) -> None:
        self.rows.append(row)

    def close(self, status: str) -> None:
        self.ends.append(status)


def exported() -> str:
    """What this node gives to Prometheus."""
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=10) as answer:
        return str(answer.read().decode())


def gauges(run: str) -> dict[str, float]:
    """Those of a run, without Ray's prefix."""
    values = {}
    for line in exported().splitlines():
        name, _, rest = line.partition("{")
        if name.startswith("ray_lte_") and f'run="{run}"' in rest:
            values[name.removeprefix("ray_lte_")] = float(rest.rpartition(" ")[2])
    return values


def test_a_resumed_run_continues_in_its_sinks(tmp_path: Path, local_ray: None) -> None:
    """Under the same id and with all samples; environment.json has both starts, and Ray's metrics the newest figures."""
    watching = Watching()
    first = LTETrainer(Regression(), **settings(), run_config=storage(tmp_path, "r"), log=["auto", "csv", watching]).fit()
    again = LTETrainer.restore(first.path, train=settings(60)["train"], log=["csv", "prometheus", watching])
    result = again.fit()
    one, two = watching.runs
    assert one.id == two.id
    assert (one.resumed, one.step, two.resumed, two.step) == (False, 0, True, 30)
    assert (two.config["steps"], two.config["log"], two.environment["versions"]["ray"]) == (
        60,
        ["csv", "prometheus"],
        ray.__version__,
    )
    assert watching.ends == ["finished", "finished"]
    samples = [row.samples for row in watching.rows if row.kind == "merge"]
    assert samples == sorted(samples)
    assert samples[-1] == result.metrics["samples"]
    starts = json.loads((Path(first.path) / "environment.json").read_text())["starts"]
    assert [(start["version"], start["devices"]) for start in starts] == [
        (0, {"0": "cpu", "1": "cpu"}),
        (6, {"0": "cpu", "1": "cpu"}),
    ]
    table = result.metrics_dataframe
    assert table.equals(lte_ray.read_metrics(result.path))
    assert len(table[table["kind"] == "merge"]) == 12
    written = (Path(first.path) / "csv" / "metrics.csv").read_text().splitlines()
    assert len(written) == len(table) + 1
    assert list((Path(first.path) / "tensorboard").glob("events.out.tfevents.*"))
    best, figures = result.best_checkpoints[0]
    assert figures["validation_loss"] == min(each["validation_loss"] for _, each in result.best_checkpoints)
    assert result.get_best_checkpoint("validation_loss", "min").path == best.path
    while (shown := gauges("r")).get("step") != 60 or shown.get("running") != 0:  # Ray collects them every few seconds
        pass
    assert shown["version"] == 12
    assert shown["train_loss"] > 0
    assert "evaluation" in shown

"""The sinks of Weights & Biases and MLflow, with their own packages and without a server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lte_ray.errors import ConfigError
from lte_ray.run.sinks.mlflow import MlflowSink
from lte_ray.run.sinks.wandb import WandbSink
from tests.support.sink_rows import evaluation_row, event_row, merge_row, named, run_info


@pytest.fixture
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of this machine for either."""
    for name in os.environ:
        if name.startswith(("WANDB_", "MLFLOW_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))  # where wandb keeps the keys of its servers
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


@pytest.fixture
def wandb(_clean: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The package, offline."""
    package = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield package
    package.teardown()


def test_wandb_offline_continues_its_run(wandb: Any, tmp_path: Path) -> None:
    """The same run for each start, with the step as x axis, also after a rewind; files are in the run directory."""
    WandbSink.check()
    for step, rows in ((0, [merge_row(1), merge_row(2), merge_row(2, 2.5)]), (20, [merge_row(3), event_row("still", why="x")])):
        sink = WandbSink()
        sink.open(run_info(tmp_path / "wandb", resumed=step > 0, step=step))
        for row in named(*rows):
            sink.row(row)
        summary = dict(wandb.run.summary)
        config = dict(wandb.run.config)
        assert (wandb.run.id, wandb.run.name, wandb.run.project) == ("ab12cd34", "r", "lte-ray")
        sink.close("finished")
        assert wandb.run is None
    assert (summary["train/loss"], summary["step"], summary["events"]) == (1.0, 30, "still why=x")
    assert (config["steps"], config["worker"], config["environment"]["host"]) == (7, {"width": 3}, "h")
    assert len(list(tmp_path.glob("wandb/offline-run-*/run-ab12cd34.wandb"))) >= 1


def test_wandb_uses_the_run_of_the_program(wandb: Any, tmp_path: Path) -> None:
    """As in a sweep: figures go there, and it isn't ended."""
    own = wandb.init(project="mine", dir=str(tmp_path), config={"lr": 0.5})
    sink = WandbSink()
    sink.open(run_info(tmp_path / "wandb"))
    for row in named(merge_row(1, 3.0)):
        sink.row(row)
    sink.close("finished")
    assert wandb.run is own
    assert dict(own.summary)["train/loss"] == 3.0
    assert dict(own.config)["lr"] == 0.5
    own.finish()


def test_wandb_without_a_login_is_refused(wandb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the run starts, with what to do."""
    monkeypatch.delenv("WANDB_MODE")
    wandb.teardown()
    with pytest.raises(ConfigError, match=r"needs a login: .*wandb login, set WANDB_API_KEY, or set WANDB_MODE=offline"):
        WandbSink.check()


def mlflow_run(folder: Path) -> tuple[Any, Any]:
    """A client for the files in a folder, and the only run there."""
    import mlflow

    client = mlflow.MlflowClient(f"file:{folder}")
    experiment = client.get_experiment_by_name("lte-ray")
    (run,) = client.search_runs([experiment.experiment_id])
    return client, run


@pytest.mark.usefixtures("_clean")
def test_mlflow_keeps_one_run_in_the_run_directory(tmp_path: Path) -> None:
    """Figures by step, settings as parameters, the environment as tags, events as a file; a resumed run goes on there."""
    pytest.importorskip("mlflow")
    folder = tmp_path / "mlflow"
    starts = [
        (
            run_info(folder),
            [merge_row(1, 2.0, bytes_up=5), evaluation_row(1, 0.5), event_row("head_restart", head=1)],
            "failed",
        ),
        (run_info(folder, resumed=True, step=10, config={"steps": 9, "name": "r"}), [merge_row(2, 1.0)], "finished"),
    ]
    for info, rows, status in starts:
        sink = MlflowSink()
        sink.open(info)
        for row in named(*rows):
            sink.row(row)
        assert mlflow_run(folder)[1].info.status == "RUNNING"
        sink.close(status)  # type: ignore[arg-type]
        assert mlflow_run(folder)[1].info.status == status.upper()
    client, run = mlflow_run(folder)
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(metric.step, metric.value, metric.timestamp) for metric in history] == [(10, 2.0, 1001000), (20, 1.0, 1002000)]
    assert (run.data.metrics["train/loss.head_0"], run.data.metrics["eval/accuracy"], run.data.metrics["traffic/bytes_up"]) == (
        1.0,
        0.5,
        5.0,
    )
    assert (run.info.run_name, run.data.params["steps"], run.data.params["worker.width"]) == ("r", "7", "3")
    assert (run.data.tags["changed.steps"], run.data.tags["environment.versions.torch"]) == ("9", "2")
    (events,) = folder.rglob("events.txt")
    assert events.read_text() == "head_restart head=1\n"


@pytest.mark.usefixtures("_clean")
def test_mlflow_follows_the_users_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'elsewhere'}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    sink = MlflowSink()
    sink.open(run_info(tmp_path / "mlflow"))
    sink.close("interrupted")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert run.info.status == "KILLED"
    assert not any((tmp_path / "mlflow").iterdir())

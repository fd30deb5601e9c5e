"""Many runs on one cluster: side by side, within Ray's own processes, in a sweep, and in Ray Tune. Nothing is left of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from lte_ray import LTETrainer
from lte_ray.cli.main import main
from lte_ray.config import PlacementConfig
from tests.support.ray_runs import DropoutRegression, assert_same_model, merged_in_process, settings, storage

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SMALL = "--worker.width 8 --worker.samples 256 --num-heads 2 --merge-iter 5 --eval-every 2 --log none --cpus-per-head 0.5"


def living() -> list[str]:
    """The classes of the actors that are alive."""
    return sorted(actor["ActorClassName"] for actor in ray._private.state.actors().values() if actor["State"] == "ALIVE")


def reserved() -> list[str]:
    """The states of the placement groups that aren't removed."""
    return [group["state"] for group in placement_group_table().values() if group["state"] != "REMOVED"]


def taken() -> float:
    """The CPUs that aren't free."""
    return float(ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0.0))


def assert_nothing_left() -> None:
    """No actor, no placement group, no name; Ray needs a moment to end processes."""
    deadline = time.monotonic() + 60
    while (living() or reserved() or taken()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert (living(), reserved(), taken()) == ([], [], 0)
    assert ray.util.list_named_actors(all_namespaces=True) == []


@ray.remote(num_cpus=0)
def nested(path: str, name: str) -> str:
    """A driver within a task: trains a run and returns its folder."""
    trainer = LTETrainer(
        DropoutRegression(),
        **settings(),  # type: ignore[arg-type]
        scaling_config=PlacementConfig(cpus_per_head=0.5),
        run_config=storage(Path(path), name),
    )
    return str(trainer.fit().path)


def test_runs_next_to_each_other_give_what_they_give_alone(local_ray: None, tmp_path: Path) -> None:
    """Two runs in tasks of one cluster, at once and with one name in two folders: bitwise the model of one process."""
    expected = merged_in_process(DropoutRegression(), **settings())  # type: ignore[arg-type]
    runs = ray.get([nested.remote(str(tmp_path / place), "same-name") for place in ("a", "b")])
    for run in runs:
        assert_same_model(run, expected)
        assert main(["audit", run]) == 0
    assert_nothing_left()


def test_a_run_uses_the_placement_group_that_it_is_started_in(local_ray: None, tmp_path: Path) -> None:
    """An actor in an otherwise full cluster: its run's heads get the group's bundles, and the group stays."""
    group = ray.util.placement_group([{"CPU": 2.0}, {"CPU": 2.0}])
    ray.get(group.ready())
    strategy = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
    driver = ray.remote(num_cpus=0)(_fit_by_defaults).options(scheduling_strategy=strategy)
    run, cpus = ray.get(driver.remote(str(tmp_path)))
    assert cpus == 0
    assert_same_model(run, merged_in_process(DropoutRegression(), **settings()))  # type: ignore[arg-type]
    assert reserved() == ["CREATED"]
    ray.util.remove_placement_group(group)
    assert_nothing_left()


def _fit_by_defaults(path: str) -> tuple[str, float]:
    one_thread = settings(threads_per_head=1)  # each head has two CPUs, and sums depend on the threads
    trainer = LTETrainer(DropoutRegression(), **one_thread, run_config=storage(Path(path), "in-group"))  # type: ignore[arg-type]
    return str(trainer.fit().path), ray.available_resources().get("CPU", 0.0)


def test_a_sweep_trains_trials_at_once_and_is_understood_by_other_commands(
    local_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each trial is a run; the figures are those of `train` with the command of the best."""
    command = ["sweep", "workers.regression:Regression", *SMALL.split(), "--steps", "60", "--storage", str(tmp_path)]
    command += ["--name", "s", "--over", "lora-r=2,8", "--over", "worker.lr=log:0.001:0.1", "--num-trials", "4"]
    assert main([*command, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert_nothing_left()
    assert sorted(arm["name"] for arm in content["arms"]) == [f"trial-{number:03d}" for number in range(4)]
    finished = [arm for arm in content["arms"] if not arm["stopped"] and not arm["failed"]]
    best = min(finished, key=lambda arm: arm["points"][-1]["figures"]["validation_loss"])
    assert content["best"]["name"] == best["name"]
    _, _, *again = content["best"]["command"].split()
    assert main(["train", *again, "--storage", str(tmp_path), "--name", "again", "--json"]) == 0
    repeated = json.loads(capsys.readouterr().out)
    assert repeated["evaluation"]["validation_loss"] == best["points"][-1]["figures"]["validation_loss"]
    for arm in content["arms"]:
        assert main(["audit", str(tmp_path / "s" / arm["name"])]) == 0
    assert main(["status", str(tmp_path / "s" / best["name"])]) == 0
    assert "finished" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "s"), "-o", str(tmp_path / "s.html")]) == 0
    assert main(command) == 0  # nothing is left to train
    assert "4 trials are done" in capsys.readouterr().err


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A cluster of 2 CPUs, to which other processes connect."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "killed"])
def test_an_interrupted_sweep_continues(cluster: Cluster, tmp_path: Path, end: signal.Signals) -> None:
    """The cluster has nothing left of it; the same command trains what isn't done, from checkpoints."""
    command = [sys.executable, "-c", "from lte_ray.cli.main import entry; entry()", "sweep", "workers.regression:Regression"]
    command += [*SMALL.split(), "--steps", "4000", "--checkpoint-every", "5", "--storage", str(tmp_path), "--name", "s"]
    command += ["--scheduler", "none", "--over", "worker.lr=0.001,0.002,0.004", "--max-concurrent", "1"]
    environment = {**os.environ, "RAY_ADDRESS": cluster.address}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    file = tmp_path / "s" / "sweep.json"
    second = tmp_path / "s" / "trial-001" / "checkpoints"
    try:
        _wait_for(lambda: second.exists() and any(second.glob("*/manifest.json")))
        process.send_signal(end)
        errors = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == (130 if end == signal.SIGINT else -signal.SIGKILL), errors
    done = [arm["name"] for arm in json.loads(file.read_text())["arms"]]
    assert done == ["trial-000"]
    ray.init(address=cluster.address, logging_level="error")
    assert_nothing_left()
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "1 trials are done" in finished.stderr
    for number in range(3):
        rows = [json.loads(row) for row in (tmp_path / "s" / f"trial-{number:03d}" / "metrics.jsonl").read_text().splitlines()]
        resumed = [row for row in rows if row.get("event") == "resumed"]
        assert bool(resumed) == (number == 1)
        assert main(["audit", str(tmp_path / "s" / f"trial-{number:03d}")]) == 0
    assert_nothing_left()


def _wait_for(reached: Any, timeout: float = 600) -> None:
    deadline = time.monotonic() + timeout
    while not reached():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.1)


def test_a_trainer_runs_in_ray_tune(shared_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/sweep.md: the example, with ASHA over rank and rate. Its heads are in the trials' groups."""
    from tests.docs.pages import page_blocks

    monkeypatch.setenv("HOME", str(tmp_path))
    names: dict[str, Any] = {"__name__": "__main__"}  # as a script: its functions are sent by value
    exec(page_blocks("docs/sweep.md", "python")[0], names)
    best = names["best"]
    assert best.metrics["loss"] < 1.0
    runs = list(Path(best.path).parent.glob("*/run/run.toml"))
    assert len(runs) == 4
    assert_nothing_left()

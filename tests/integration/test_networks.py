"""Slow and broken networks, on hosts that have networks of their own (tests/support/network.py)."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lte_ray import LTEConfig, MergeConfig, TrainConfig
from lte_ray.audit import audit
from tests.support.network import Network, NetworkUnavailable, RayNodes
from tests.support.ray_runs import assert_same_model, merged_in_process
from workers.regression import Regression

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

HOSTS, BATCH = 3, 64


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path, since Ray's sockets are in it. Ray's logs go with it."""
    made = Path(tempfile.mkdtemp(prefix="lte-", dir="/tmp"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def network() -> Iterator[Network]:
    """Three hosts that are joined by fast links."""
    try:
        hosts = Network(HOSTS).__enter__()
    except NetworkUnavailable as error:
        pytest.skip(str(error))
    yield hosts
    hosts.__exit__()


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The run's rows so far."""
    path = folder / "r" / "metrics.jsonl"
    return (
        [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if path.exists()
        else []
    )


def count_merges(folder: Path) -> int:
    return sum(row["kind"] == "merge" for row in rows_of(folder))


def train(nodes: RayNodes, folder: Path, name: str, flags: str) -> subprocess.Popen[bytes]:
    fixed = f"--num-heads {HOSTS} --lora-r 8 --lora-alpha 16 --merge-iter 5 --merge-threads 1 --cpus-per-head 1 --seed 3"
    return nodes.start_driver(
        ["train", *flags.split(), *fixed.split(), "--storage", str(folder), "--name", name], folder / f"{name}.log"
    )


def wait_until(condition: Callable[[], bool], driver: subprocess.Popen[bytes], log: Path) -> None:
    """Waits for the condition; fails if the driver ends before."""
    while not condition():
        assert driver.poll() is None, log.read_text()
        time.sleep(0.1)


def test_slow_links_change_nothing_but_the_time(network: Network, folder: Path) -> None:
    """At 1 Gbit/s and at 100 Mbit/s, three hosts that wait for each other end with the weights of one process, bit by bit."""
    lte = LTEConfig(num_heads=HOSTS, lora_r=8, lora_alpha=16)
    expected = merged_in_process(Regression(), lte, MergeConfig(merge_iter=5, merge_threads=1), TrainConfig(steps=30, seed=3))
    with RayNodes(network, 1, folder) as nodes:
        for rate in ("1gbit", "100mbit"):
            network.shape(rate)
            driver = train(nodes, folder, rate, "workers.regression:Regression --steps 30 --eval-every 0")
            assert driver.wait(timeout=300) == 0, (folder / f"{rate}.log").read_text()
            assert_same_model(folder / rate, expected)
    assert all(min(carried) > 100_000 for carried in network.carried().values())


def test_a_host_is_cut_off_for_twenty_seconds(network: Network, folder: Path) -> None:
    """Packets from and to a host are lost for a while: the others go on, its head is replaced, and no batch is lost."""
    steps, log = 1000, folder / "r.log"
    network.shape("100mbit")
    with RayNodes(network, 1, folder) as nodes:
        flags = f"tests.support.node_loss:SlowRegression --steps {steps} --no-wait --when arrival"
        driver = train(nodes, folder, "r", flags)
        wait_until(lambda: count_merges(folder) >= 30, driver, log)
        # One without driver and coordinator, which Ray puts where it likes; their loss is in test_nodes.py.
        host = next(host for host in (2, 1) if not network.runs(host, "ray::CoordinatorActor"))
        network.cut(host)
        cut_at, before = time.time(), count_merges(folder)
        while time.time() < cut_at + 20:
            time.sleep(0.5)
        during = count_merges(folder) - before
        network.mend(host)
        end = time.monotonic() + 600
        while driver.poll() is None and time.monotonic() < end:
            nodes.start_if_ended(host)  # as a service manager does
            time.sleep(0.5)
        assert driver.poll() == 0, log.read_text()
    rows = rows_of(folder)
    assert during > 50
    events = {row["event"] for row in rows if row["kind"] == "event"}
    assert events & {"head_hung", "head_lost"} and "coordinator_lost" not in events
    report = audit(rows)
    assert (report.lost, report.doubled, report.problems) == (0, 0, [])
    assert report.samples == HOSTS * steps * BATCH

"""Loss of nodes, on a real Ray of several nodes on one machine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lte_ray.audit import audit

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200), pytest.mark.slow]


def run(path: Path, what: str, steps: int) -> list[Any]:
    """Runs until the end with this fault of a node; returns the rows of its metrics."""
    script = Path(__file__).parents[1] / "support" / "node_loss.py"
    process = subprocess.run([sys.executable, script, path, what], capture_output=True, text=True, timeout=900, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    assert json.loads(process.stdout.splitlines()[-1])["step"] == steps
    return [json.loads(line) for line in (path / "r" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("what", ["lose", "cut"])
def test_a_run_survives_the_loss_of_a_node(tmp_path: Path, what: str) -> None:
    """The node with two of four heads is lost or cut off: all steps are taken, and each batch is merged once."""
    rows = run(tmp_path, what, 300)
    lost = {head for row in rows if row.get("event") in ("head_lost", "head_hung") for head in row["heads"]}
    assert len(lost) >= 2 or (what == "cut" and any(row.get("event") == "coordinator_lost" for row in rows))
    report = audit(rows)
    assert (report.samples, report.lost, report.doubled, report.problems) == (4 * 300 * 64, 0, 0, [])


def test_heads_without_resources_are_dropped_and_added_again_when_a_node_joins(tmp_path: Path) -> None:
    """With --exhausted drop, the two remaining heads train on all data; when a node joins, the other two come back."""
    rows = run(tmp_path, "leave", 600)
    events = [row for row in rows if row["kind"] == "event"]
    dropped = [row for row in events if row["event"] == "head_dropped"]
    assert len({head for row in dropped for head in row["heads"]}) == len(dropped) == 2
    assert all("the cluster has had no place for it" in row["why"] for row in dropped)
    back = [row for row in events if row["event"] == "head_added"]
    assert {row["head"] for row in back} == {head for row in dropped for head in row["heads"]}
    assert any(
        set(row["heads"]) & {row["head"] for row in back}
        for row in rows
        if row["kind"] == "merge" and row["at"] > back[-1]["at"]
    )
    report = audit(rows)
    assert (report.lost, report.doubled, report.problems) == (0, 0, [])


def test_processes_are_on_the_nodes_that_their_labels_choose(tmp_path: Path) -> None:
    """Heads on the labeled node; coordinator and evaluator off the spot nodes. Labels that no node has: no run begins."""
    script = Path(__file__).parents[1] / "support" / "labeled_nodes.py"
    process = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=600, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    refusal, places = [line for line in process.stdout.splitlines() if line.startswith(("No node", "{"))]
    assert "matches --head-labels kind=c" in refusal and "kind=a (1 node), kind=b (1 node), kind=safe (1 node)" in refusal
    places = {name: kinds for name, kinds in json.loads(places).items() if name.endswith("Actor")}
    assert places == {"HeadActor": ["b"], "CoordinatorActor": ["safe"], "EvaluatorActor": ["safe"]}


def test_heads_of_a_node_share_what_they_fetch(tmp_path: Path) -> None:
    """With two heads on a node, each base, or each factor of the other heads, comes to that node once."""
    script = Path(__file__).parents[1] / "support" / "shared_fetches.py"
    process = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=600, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    runs = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    assert [run["way"] for run in runs] == ["dense", "factors"]
    for run in runs:
        assert run["created"] - run["made"] <= 1.05 * run["needed"], run


def can_create_networks() -> bool:
    """Whether this process may create and enter network namespaces."""
    tools = all(shutil.which(tool) for tool in ("unshare", "nsenter", "ip"))
    command = ["unshare", "--net", "ip", "link", "add", "type", "veth"]
    return tools and subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("seconds", [20, 60])
def test_a_run_survives_a_cut_network(tmp_path: Path, seconds: int) -> None:
    """Packets between two nodes are dropped for a while without closing connections: each batch is still merged once."""
    if not can_create_networks():
        pytest.skip("needs permission to create network namespaces")
    script = Path(__file__).parents[1] / "support" / "network_cut.py"
    command = ["unshare", "--net", sys.executable, script, tmp_path, str(seconds)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    (result,) = [line for line in process.stdout.splitlines() if line.startswith("{")]
    assert json.loads(result)["step"] == 300
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    noticed = {row["event"] for row in rows if row["kind"] == "event"}
    assert noticed & {"head_hung", "head_lost", "coordinator_lost"}
    report = audit(rows)
    assert (report.samples, report.lost, report.doubled, report.problems) == (4 * 300 * 64, 0, 0, [])

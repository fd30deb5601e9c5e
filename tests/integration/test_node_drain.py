"""Nodes that drain, on a real Ray of several nodes on one machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lte_ray.audit import audit
from lte_ray.errors import RESUMABLE
from lte_ray.run.inspect import inspect_run
from lte_ray.storage import RunDirectory

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200), pytest.mark.slow]

STEPS, HEADS = 400, 4


def run(path: Path, case: str, code: int = 0) -> list[dict[str, Any]]:
    """Runs a case of `node_drain.py` to its end; returns the rows of its metrics."""
    script = Path(__file__).parents[1] / "support" / "node_drain.py"
    process = subprocess.run([sys.executable, script, path, case], capture_output=True, text=True, timeout=900, check=False)
    assert process.returncode == code, process.stdout + process.stderr
    return [json.loads(line) for line in (path / "r" / "metrics.jsonl").read_text().splitlines()]


def events(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [row for row in rows if row.get("event") == name]


def check_nothing_lost(rows: list[dict[str, Any]]) -> None:
    """Each batch is merged once; heads left with all their steps merged, and no step was taken twice."""
    report = audit(rows)
    assert (report.samples, report.lost, report.doubled, report.problems) == (HEADS * STEPS * 64, 0, 0, [])
    assert not [row for name in ("head_lost", "head_hung", "coordinator_lost") for row in events(rows, name)]
    merges = [row for row in rows if row["kind"] == "merge"]
    held = {(int(head), position["step"]) for row in merges for head, position in row["held"].items()}
    for row in events(rows, "head_moves"):
        assert held & {(head, row["step"]) for head in row["heads"]}, row
    taken = sum(steps for row in merges for steps in row["head_steps"].values())
    assert taken == HEADS * STEPS


@pytest.mark.parametrize("case", ["barrier", "quorum", "arrival", "virtual", "shards"])
def test_heads_leave_a_node_that_drains_and_lose_no_step(tmp_path: Path, case: str) -> None:
    """The heads on it contribute, move to a spare node, and continue; the node is then taken away, and nothing is lost."""
    rows = run(tmp_path, case)
    check_nothing_lost(rows)
    (notice,) = events(rows, "node_drains")
    assert len(notice["heads"]) == (4 if case == "virtual" else 2)  # an actor of two reserves one CPU, too
    assert sorted(head for row in events(rows, "head_moves") for head in row["heads"]) == sorted(notice["heads"])


def test_heads_without_another_place_wait_for_a_node(tmp_path: Path) -> None:
    """Nothing is lost while they wait; the others go on, and the heads continue on the node that joins."""
    rows = run(tmp_path, "no room")
    check_nothing_lost(rows)
    assert {head for row in events(rows, "waits_for_place") for head in row["heads"]} == {
        head for row in events(rows, "node_drains") for head in row["heads"]
    }


def test_a_run_grows_onto_a_node_that_joins_and_leaves_it_again(tmp_path: Path) -> None:
    """Up to --max-heads: two heads train on the new node until it drains. Others take what they hadn't trained."""
    rows = run(tmp_path, "grow")
    assert sorted(row["head"] for row in events(rows, "head_added"))[:2] == [4, 5]
    assert {4, 5} <= {head for row in rows if row["kind"] == "merge" for head in row["heads"]}
    assert {4, 5} == {head for row in events(rows, "node_drains") for head in row["heads"]}
    assert {4, 5} == {head for row in events(rows, "head_dropped") for head in row["heads"]}
    report = audit(rows)
    assert (report.lost, report.doubled, report.problems) == (0, 0, [])


def test_the_coordinator_leaves_a_node_that_drains(tmp_path: Path) -> None:
    """The next one continues from a checkpoint of the newest version, so the momentum isn't lost."""
    rows = run(tmp_path, "coordinator")
    check_nothing_lost(rows)
    assert events(rows, "coordinator_moves")
    assert events(rows, "coordinator_restarts")[0]["version"] == events(rows, "coordinator_moves")[0]["version"]
    assert not events(rows, "momentum_restarts")


def test_a_run_whose_driver_must_go_ends_saved(tmp_path: Path) -> None:
    """Its exit code is that of runs that can be resumed, and all heads' states are in its last checkpoint."""
    rows = run(tmp_path, "driver", code=RESUMABLE)
    assert events(rows, "node_drains")[0]["heads"] == []
    assert "driver's own node" in events(rows, "ended_early")[0]["why"]
    assert inspect_run(RunDirectory.open(str(tmp_path), "r")).is_resumable

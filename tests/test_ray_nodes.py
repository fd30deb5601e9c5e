"""Whole nodes that are lost, on a real Ray of several nodes on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ray_support import LONG

from lte_ray.audit import audit

pytestmark = [pytest.mark.ray, pytest.mark.timeout(280), LONG]


@pytest.mark.parametrize("what", ["lose", "cut"])
def test_a_run_survives_the_loss_of_a_node(tmp_path: Path, what: str) -> None:
    """Two of four heads are on the node that is lost, or cut off: all steps are taken, and each batch is merged once."""
    script = Path(__file__).parent / "node_loss.py"
    done = subprocess.run([sys.executable, script, tmp_path, what], capture_output=True, text=True, timeout=270, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["step"] == 300
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    lost = {head for row in rows if row.get("event") in ("head_lost", "head_hung") for head in row["heads"]}
    assert len(lost) >= 2 or (what == "cut" and any(row.get("event") == "coordinator_lost" for row in rows))
    found = audit(rows)
    assert (found.samples, found.lost, found.doubled, found.problems) == (4 * 300 * 64, 0, 0, [])

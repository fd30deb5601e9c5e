"""`lte-ray ladder --on ray` gives what one process gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lte_ray.cli.main import main

pytestmark = pytest.mark.ray


@pytest.mark.slow
def test_a_ladder_on_ray_equals_one_in_a_process(shared_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every rung: the same figures after the same samples; the arms' own runs keep their records, without checkpoints."""
    flags = "--num-heads 2 --steps 20 --merge-iters 1 5 --rates 1 --lora-r 4 --worker.width 8 --worker.samples 256"
    command = ["ladder", "workers.regression:Regression", *flags.split(), "--storage", str(tmp_path)]
    for place in ("process", "ray"):
        assert main([*command, "--on", place, "--name", place]) == 0
    process, ray = (json.loads((tmp_path / place / "ladder.json").read_text())["arms"] for place in ("process", "ray"))
    assert [arm["rung"] for arm in ray] == ["ordinary", "mhlora", "merge_iter=1", "merge_iter=5"]
    for one, other in zip(process, ray, strict=True):
        assert one["key"] == other["key"]
        expected = {(p["step"], p["samples"]): p["figures"]["validation_loss"] for p in one["points"]}
        for p in other["points"]:  # evaluations that would have been late may be missing
            assert p["figures"]["validation_loss"] == pytest.approx(expected[p["step"], p["samples"]], rel=1e-5)
        assert other["points"][-1]["samples"] == 20 * 2 * 64
        assert other["ddp"] == one["ddp"]
        assert (other["sent"] > 0) == (one["sent"] > 0)
    runs = sorted(path.name for path in (tmp_path / "ray" / "arms").iterdir())
    assert [name.rpartition("-")[0] for name in runs] == [
        "merge_iter=1-x1-seed-0",
        "merge_iter=5-x1-seed-0",
        "ordinary-x1-seed-0",
    ]
    for name in runs:
        assert (tmp_path / "ray" / "arms" / name / "metrics.jsonl").exists()
        assert not (tmp_path / "ray" / "arms" / name / "checkpoints").exists()

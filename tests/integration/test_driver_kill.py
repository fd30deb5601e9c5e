"""The driver's process is killed, on a real Ray; the same command resumes the run."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from lte_ray import LTEConfig, MergeConfig, TrainConfig, checkpoint
from lte_ray.audit import audit
from lte_ray.storage import RunDirectory
from tests.support.ray_runs import ROOT, BatchNormRegression, DropoutRegression, assert_same_model, merged_in_process

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

WORKER = """
import os
import time
from dataclasses import dataclass

import torch
from torch import nn
from workers.regression import Regression


{models}
class Slow(BatchNormRegression):
    def train_batches(self, shard):
        for step, batch in enumerate(super().train_batches(shard), shard.cursor + 1):
            hold = os.environ.get("HOLD_AT_STEP")
            time.sleep(1.0 if hold and step > int(hold) else 0.03)
            yield batch
""".format(models="\n\n".join(map(inspect.getsource, (DropoutRegression, BatchNormRegression))))

FLAGS = "--num-heads 2 --lora-r 8 --lora-alpha 16 --merge-iter 5 --merge-threads 1 --steps 60 --seed 3 --checkpoint-every 2"


def start_command(path: Path, hold_at: int | None = None) -> subprocess.Popen[str]:
    """Starts `lte-ray train ... --resume` on the tests' Ray; steps after `hold_at` take a second, so that the run lasts."""
    (path / "slow.py").write_text(WORKER.replace('os.environ.get("HOLD_AT_STEP")', repr(hold_at)))
    flags = f"--eval-every 0 --cpus-per-head 0.5 --name r --storage {path} --resume"
    return subprocess.Popen(
        [Path(sys.executable).parent / "lte-ray", "train", f"{path}/slow.py:Slow", *FLAGS.split(), *flags.split()],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def newest_version(path: Path) -> int:
    return max(checkpoint.complete_versions(RunDirectory.open(str(path), "r")), default=0)


@pytest.mark.parametrize("version", [4, pytest.param(2, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)])
def test_a_barrier_run_whose_driver_was_killed_is_bitwise_the_uninterrupted_run(
    local_ray: None, tmp_path: Path, version: int
) -> None:
    """SIGKILL after a checkpoint: the next driver resumes from it, and nothing is lost or merged twice.

    Optimizers, data, dropout, and running statistics continue.
    """
    killed = start_command(tmp_path, hold_at=5 * version + 2)
    deadline = time.monotonic() + 300
    while newest_version(tmp_path) < version and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    output, _ = killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL, output
    assert version <= newest_version(tmp_path) < 12
    resumed = start_command(tmp_path)
    output, _ = resumed.communicate(timeout=400)
    assert resumed.returncode == 0, output
    lte, merge = LTEConfig(num_heads=2, lora_r=8, lora_alpha=16), MergeConfig(merge_iter=5, merge_threads=1)
    assert_same_model(tmp_path / "r", merged_in_process(BatchNormRegression(), lte, merge, TrainConfig(steps=60, seed=3)))
    assert audit([json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]).clean


@pytest.mark.slow
def test_two_processes_cannot_train_the_same_run(local_ray: None, tmp_path: Path) -> None:
    """The second gets an error that names the first and changes nothing; the first finishes."""
    first = start_command(tmp_path, hold_at=50)
    deadline = time.monotonic() + 300
    while not newest_version(tmp_path) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    second = start_command(tmp_path)
    output, _ = second.communicate(timeout=300)
    assert second.returncode == 2, output
    assert f"is being trained by process {first.pid} on" in " ".join(output.split())
    output, _ = first.communicate(timeout=400)
    assert first.returncode == 0, output

"""`lte-ray submit` on a real cluster: two nodes of Ray with a token, and somebody with an empty home directory."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.job_cluster import BIN, ROOT, TOKEN, JobCluster, token_cluster

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

WORKER = """
import time
import lte_ray
import torch
from sibling import SIZE
from torch import nn

print("the code is", lte_ray.__file__)

class Net:
    def __init__(self, pause: float = 0.0):
        self.pause = pause
    def build_model(self):
        return nn.Sequential(nn.Linear(16, SIZE), nn.Linear(SIZE, 1))
    def train_batches(self, shard):
        x = torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
        for rows in shard.indices(len(x), batch_size=8):
            yield x[rows]
    def loss(self, model, batch):
        time.sleep(self.pause)
        return model(batch).square().mean()
    def evaluate(self, model):
        return {"norm": sum(p.detach().norm().item() for p in model.parameters())}
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobCluster]:
    """Two nodes with one CPU each, so that two heads are on both. The second one has another release of lte-ray."""
    other = tmp_path_factory.mktemp("other")
    (other / "lte_ray").mkdir()
    (other / "lte_ray" / "__init__.py").write_text("__version__ = '9.9'\n")
    with token_cluster(nodes=2, cpus=1, PYTHONPATH=str(other)) as started:
        yield started


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder: a worker, what it imports, and what isn't sent."""
    root = tmp_path / "project"
    (root / ".venv").mkdir(parents=True)
    (root / ".venv" / "large").write_bytes(bytes(1000))
    (root / "sibling.py").write_text("SIZE = 24\n")
    (root / "net.py").write_text(WORKER)
    return root


def submit(cluster: JobCluster, folder: Path, command: str, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs `lte-ray submit` to its end."""
    return subprocess.run(
        [BIN / "lte-ray", "submit", "--address", cluster.address, *flags, "--", *command.split()],
        cwd=folder, env=with_checkout(cluster, **variables), capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip


def with_checkout(cluster: JobCluster, **variables: str) -> dict[str, str]:
    """The client's environment, which imports this checkout."""
    return cluster.environment(PYTHONPATH=str(ROOT), **variables)


def wait_for(condition: Callable[[], Any], limit: float = 300) -> None:
    """Returns once the condition holds; fails after `limit` seconds."""
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, "the condition never held"
        time.sleep(0.05)


def test_a_run_on_two_nodes_shows_its_log_and_gives_its_exit_code(cluster: JobCluster, folder: Path, tmp_path: Path) -> None:
    """The job runs this checkout's code, sent along, with the user's files. A run that is over already can't be repeated: 2."""
    command = f"train net.py:Net --num-heads 2 --steps 20 --merge-iter 5 --lora-r 2 --storage {tmp_path}/runs --name job"
    done = submit(cluster, folder, command, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["status"] == "SUCCEEDED"
    assert "2 files" in done.stderr
    assert "Left out: .venv/" in done.stderr
    assert "step 20/20" in done.stderr
    assert "train loss" in done.stderr
    assert done.stderr.rstrip().endswith("lte-ray: exit code 0")
    assert re.search(r"the code is .*/py_modules_files/.*/lte_ray/__init__.py", done.stderr)
    resumed = submit(cluster, folder, f"resume job --steps 30 --storage {tmp_path}/runs")  # from another job's folder
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "step 30/30" in resumed.stdout
    again = submit(cluster, folder, command)
    assert again.returncode == 2, again.stdout + again.stderr
    assert "A run named 'job' is already in" in again.stdout
    assert "failed: exit code 2" in again.stderr


def test_nodes_that_differ_are_named_before_training(cluster: JobCluster, folder: Path, tmp_path: Path) -> None:
    """With what is installed on the nodes, instead of the code that is sent. Nothing is written. The token is in a file."""
    (tmp_path / "token").write_text(TOKEN)
    token = {"RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    command = f"train net.py:Net --num-heads 2 --steps 20 --lora-r 2 --storage {tmp_path}/runs"
    done = submit(cluster, folder, command, "--package", "none", **token)
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(r"error: Node \S+ \(.*\) has lte-ray 9.9, but the driver has lte-ray ", done.stdout)
    assert "are starting" not in done.stdout
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_saves_before_the_job_ends(cluster: JobCluster, folder: Path, tmp_path: Path) -> None:
    """All heads' states are in the checkpoint, submit's exit code is 130, and the job's own is 75."""
    metrics = tmp_path / "runs" / "long" / "metrics.jsonl"
    flags = "--num-heads 2 --steps 100000 --merge-iter 5 --lora-r 2 --checkpoint-every 100000 --worker.pause 0.01"
    command = f"train net.py:Net {flags} --storage {tmp_path}/runs --name long"
    process = subprocess.Popen(
        [BIN / "lte-ray", "submit", "--address", cluster.address, *command.split()],
        cwd=folder, env=with_checkout(cluster), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  # background jobs ignore it
    )  # fmt: skip
    try:
        wait_for(lambda: process.poll() is not None or (metrics.exists() and metrics.read_text().count('"kind": "merge"') >= 3))
        assert process.poll() is None, process.communicate()[0]
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert "asked to stop, and saves itself first" in output
    assert "continue from it with --resume" in output
    assert "lte-ray: exit code 75" in output
    (saved,) = (metrics.parent / "checkpoints").iterdir()
    assert {"head-0000.safetensors", "head-0001.safetensors"} <= {file.name for file in saved.iterdir()}


def test_a_wrong_token_or_none_is_one_sentence(cluster: JobCluster, folder: Path) -> None:
    """It says where the token came from, and doesn't show it."""
    wrong = submit(cluster, folder, "train net.py:Net", RAY_AUTH_TOKEN="wrong" * 8)
    assert wrong.returncode == 2, wrong.stdout + wrong.stderr
    assert "refuses: " in wrong.stderr
    assert "the token comes from RAY_AUTH_TOKEN." in wrong.stderr
    assert "wrongwrong" not in wrong.stderr
    none = submit(cluster, folder, "train net.py:Net", RAY_AUTH_MODE="disabled")
    assert none.returncode == 2, none.stdout + none.stderr
    assert "RAY_AUTH_MODE is disabled here" in none.stderr
    assert "Traceback" not in wrong.stderr + none.stderr


def test_storage_in_the_jobs_folder_is_refused_there(cluster: JobCluster, folder: Path) -> None:
    """As with `ray job submit`, where nothing has looked at the settings before. It sends the package's folder, too."""
    command = "python -m lte_ray train net.py:Net --lora-r 2 --storage runs"
    code = json.dumps({"py_modules": [str(ROOT / "lte_ray")]})
    flags = ["--address", cluster.address, "--working-dir", ".", "--runtime-env-json", code]
    process = subprocess.run(
        [BIN / "ray", "job", "submit", *flags, "--", *command.split()],
        cwd=folder, env=cluster.environment(), capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert process.returncode == 1, process.stdout + process.stderr
    assert "in the folder of this job, which Ray removes after the job" in process.stdout + process.stderr
    assert re.search(r"the code is .*/py_modules_files/", process.stdout)

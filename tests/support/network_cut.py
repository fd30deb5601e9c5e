"""A run on two nodes with separate networks, one of which is cut off for a while; runs as a program in its own network.

Usage: unshare --net python network_cut.py FOLDER SECONDS. Prints the result's metrics; exits with 0 if the run finished.

The second node's processes are in another network namespace, connected to this one by a pair of virtual interfaces. The cut
sets that pair down: packets are lost, and no connection is closed. Everything disappears with the processes. Needs
CAP_NET_ADMIN.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import ray  # noqa: E402

from lte_ray import LTEConfig, LTETrainer, MergeConfig  # noqa: E402
from lte_ray.config import PlacementConfig  # noqa: E402
from tests.support.node_loss import SlowRegression, count_rows  # noqa: E402
from tests.support.ray_runs import settings, storage  # noqa: E402

HERE, THERE = "10.77.0.1", "10.77.0.2"
PORT = 6379
RAY = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--num-cpus", "2"]


def run_command(command: str) -> None:
    subprocess.run(command.split(), check=True)


def join_networks() -> subprocess.Popen[bytes]:
    """Starts a process in another network, and connects that to ours."""
    other = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
    ours = Path("/proc/self/ns/net").readlink()
    while Path(f"/proc/{other.pid}/ns/net").readlink() == ours:
        time.sleep(0.01)
    run_command("ip link set lo up")
    run_command("ip link add cut-here type veth peer name cut-there")
    run_command(f"ip link set cut-there netns {other.pid}")
    run_command(f"ip addr add {HERE}/24 dev cut-here")
    run_command("ip link set cut-here up")
    for command in ("ip link set lo up", f"ip addr add {THERE}/24 dev cut-there", "ip link set cut-there up"):
        run_command(f"nsenter --target {other.pid} --net {command}")
    return other


class CutOffNode:
    """The node that is cut off."""

    def __init__(self, network: int, log: Path) -> None:
        self._network, self._log, self.starts = network, log, 0
        self._process: subprocess.Popen[bytes] | None = None

    def restart_if_ended(self) -> None:
        if self._process is None or self._process.poll() is not None:
            self.starts += 1
            command = [*RAY, "--address", f"{HERE}:{PORT}", "--node-ip-address", THERE]
            enter = ["nsenter", "--target", str(self._network), "--net", *command]
            self._process = subprocess.Popen(enter, stdout=self._log.open("ab"), stderr=subprocess.STDOUT)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(timeout=300)


def main(folder: Path, seconds: float) -> int:
    """Runs the scenario; returns 0 if the run finished."""
    network = join_networks()
    start = [*RAY, "--head", "--port", str(PORT), "--node-ip-address", HERE, "--include-dashboard", "false"]
    head = subprocess.Popen(start, stdout=(folder / "head.log").open("wb"), stderr=subprocess.STDOUT)
    node = CutOffNode(network.pid, folder / "node.log")
    found: list[Any] = []
    try:
        connect(f"{HERE}:{PORT}", head)
        node.restart_if_ended()
        while ray.cluster_resources().get("CPU", 0) < 4:
            time.sleep(0.2)
        thread = threading.Thread(target=lambda: found.append(train(folder)), daemon=True)
        thread.start()
        while count_rows(folder, '"kind": "merge"') < 20 and thread.is_alive():
            time.sleep(0.1)
        run_command("ip link set cut-here down")
        time.sleep(seconds)
        before = count_rows(folder, '"kind": "merge"')
        run_command("ip link set cut-here up")
        end = time.monotonic() + 600
        while thread.is_alive() and time.monotonic() < end:
            node.restart_if_ended()
            thread.join(timeout=0.5)
        print(
            json.dumps({**(found[0] if found else {}), "merges_until_the_end_of_the_cut": before, "starts": node.starts}),
            flush=True,
        )
        ray.shutdown()
    finally:
        for process in (node.stop, head.terminate, head.wait, network.kill):
            process()
    return 0 if found else 1


def connect(address: str, head: subprocess.Popen[bytes]) -> None:
    """Connects to the head node once it answers."""
    end = time.monotonic() + 300
    while True:
        try:
            ray.init(address=address, _node_ip_address=HERE, logging_level="error", log_to_driver=False)
            return
        except Exception:
            if head.poll() is not None or time.monotonic() > end:
                raise
            time.sleep(0.5)


def train(folder: Path) -> dict[str, Any]:
    """Four heads, two on each node."""
    config = settings(300) | {
        "lte": LTEConfig(num_heads=4, lora_r=8, lora_alpha=16),
        "merge": MergeConfig(merge_iter=5, merge_threads=1, when="arrival", wait=False),
    }
    placed = PlacementConfig(cpus_per_head=1.0)
    metrics = LTETrainer(SlowRegression(), run_config=storage(folder, "r"), scaling_config=placed, **config).fit().metrics
    assert metrics is not None
    return {name: metrics[name] for name in ("step", "samples", "version")}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2])))

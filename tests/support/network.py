"""Hosts on this machine, each with a network of its own, joined by links with a bandwidth; and a Ray node on each.

A host is a network namespace. All hosts are connected to a bridge in one more namespace, so that the machine's own network
isn't touched. Rates come from `tc`'s tbf at both ends of each link, delays from netem at the host's end. The namespaces and
all that is in them go with the block; if this process was killed, ``python -m tests.support.network`` removes what is left.
Needs root, `ip` and `tc`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PREFIX = "lte-net"
"""Namespaces are named PREFIX-PID-HOST, with the process id of their maker."""

PORT = 6379
"""Of Ray's head node."""

BURST_SECONDS, QUEUE_SECONDS = 0.002, 0.05
"""How long a link may send at full speed, and how long a packet may wait for it."""

START_SECONDS = 180.0
"""Seconds for Ray's nodes to start."""


class NetworkUnavailable(Exception):
    """This machine can't make such a network; the text says why."""


class Network:
    """Hosts that are joined by links, for the block. Host n has the address 10.77.0.(n + 1).

    Args:
        hosts: how many.
        rate: of each link in each direction, as `tc` reads it (100mbit); None: as fast as the machine is.
        delay: of each packet on its way out of a host, as `tc` reads it (10ms); None: none.
    """

    def __init__(self, hosts: int = 3, rate: str | None = None, delay: str | None = None) -> None:
        self.hosts, self._rate, self._delay = range(hosts), rate, delay

    def __enter__(self) -> Network:
        if os.geteuid() or not shutil.which("ip") or not shutil.which("tc"):
            raise NetworkUnavailable("needs root, and the programs ip and tc of iproute2")
        clean()
        try:
            self._make("switch")
            self._run("ip -n", "switch", "link add br0 type bridge")
            self._run("ip -n", "switch", "link set br0 up")
            for host in self.hosts:
                self._make(host)
                self._run("ip -n", "switch", f"link add port{host} type veth peer name eth0 netns {name_of(host)}")
                self._run("ip -n", "switch", f"link set port{host} master br0 up")
                self._run("ip -n", host, f"addr add {self.address(host)}/24 dev eth0")
                self._run("ip -n", host, "link set eth0 up")
                self._run("ip -n", host, "route add default dev eth0")  # Ray finds a host's address by it
            self.shape(self._rate, self._delay)
        except BaseException as error:
            self.__exit__()
            if isinstance(error, subprocess.CalledProcessError):
                raise NetworkUnavailable(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from None
            raise
        return self

    def __exit__(self, *_: object) -> None:
        remove(os.getpid())

    @staticmethod
    def address(host: int) -> str:
        return f"10.77.0.{host + 1}"

    def enter(self, host: int) -> list[str]:
        """The words before a command that runs it on this host."""
        return ["ip", "netns", "exec", name_of(host)]

    def shape(self, rate: str | None, delay: str | None = None) -> None:
        """Gives all links this rate and delay from now on.

        Raises:
            subprocess.CalledProcessError: the kernel lacks what is needed; for delays it is netem, which many small ones lack.
        """
        for host in self.hosts:
            for where, device, wait in ((host, "eth0", delay), ("switch", f"port{host}", None)):
                with contextlib.suppress(subprocess.CalledProcessError):  # there is none
                    self._run("tc -n", where, f"qdisc del dev {device} root")
                parent = "root"
                if wait:
                    self._run("tc -n", where, f"qdisc add dev {device} root handle 1: netem delay {wait} limit 100000")
                    parent = "parent 1:"
                if rate:
                    burst = max(65_536, round(BURST_SECONDS * bytes_per_second(rate)))  # packets have up to 64 KiB
                    queue = round(QUEUE_SECONDS * 1000)
                    limits = f"rate {rate} burst {burst} latency {queue}ms"
                    self._run("tc -n", where, f"qdisc add dev {device} {parent} handle 2: tbf {limits}")

    def cut(self, host: int) -> None:
        """Loses all packets from and to this host from now on. No connection is closed."""
        self._run("ip -n", "switch", f"link set port{host} down")

    def mend(self, host: int) -> None:
        """Ends what `cut` began."""
        self._run("ip -n", "switch", f"link set port{host} up")

    def carried(self) -> dict[int, tuple[int, int]]:
        """Bytes that each host has sent and received so far."""
        links = json.loads(self._run("ip -n", "switch", "-s -j link").stdout)
        stats = {link["ifname"]: link["stats64"] for link in links}
        return {host: (stats[f"port{host}"]["rx"]["bytes"], stats[f"port{host}"]["tx"]["bytes"]) for host in self.hosts}

    def runs(self, host: int, program: str) -> bool:
        """Whether a process whose command line has this text runs on the host."""
        pids = _call(f"ip netns pids {name_of(host)}").stdout.split()
        with contextlib.suppress(FileNotFoundError):  # one has just ended
            return any(program in Path(f"/proc/{pid}/cmdline").read_text() for pid in pids)
        return self.runs(host, program)

    def _make(self, where: int | str) -> None:
        _call(f"ip netns add {name_of(where)}")
        self._run("ip -n", where, "link set lo up")

    def _run(self, program: str, where: int | str, command: str) -> subprocess.CompletedProcess[str]:
        return _call(f"{program} {name_of(where)} {command}")


def bytes_per_second(rate: str) -> float:
    """What `tc` understands by a rate such as 100mbit."""
    return float(rate.removesuffix("mbit").removesuffix("gbit")) * (1e9 if rate.endswith("gbit") else 1e6) / 8


def name_of(where: int | str, pid: int | None = None) -> str:
    """The name of a namespace."""
    return f"{PREFIX}-{pid or os.getpid()}-{where}"


def clean() -> None:
    """Removes the networks whose makers are gone."""
    for pid in {int(name.removeprefix(PREFIX).split("-")[1]) for name in _namespaces()}:
        if not Path(f"/proc/{pid}").exists():
            remove(pid)


def remove(pid: int) -> None:
    """Removes the networks that this process made, with what still runs in them."""
    mine = [name for name in _namespaces() if name.startswith(f"{PREFIX}-{pid}-")]
    for name in mine:
        for line in _call(f"ip netns pids {name}").stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(line), signal.SIGKILL)
        _call(f"ip netns del {name}")


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _call("ip netns list").stdout.splitlines() if line.startswith(f"{PREFIX}-")]


def _call(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command.split(), capture_output=True, text=True, check=True)


class RayNodes:
    """A Ray cluster with a node on each host of a network, for the block. Ray's head node is on host 0.

    Args:
        network: the hosts.
        cpus: that each host is said to have; one number for all, or one each.
        folder: for Ray's own files, and for what the nodes print. Sockets are in it, so its path must be short.
        environment: further variables of all nodes, such as RAY_health_check_period_ms.
        store: bytes of each host's object store.
    """

    def __init__(
        self,
        network: Network,
        cpus: int | Sequence[int],
        folder: Path,
        environment: Mapping[str, str] | None = None,
        store: int = 256 * 2**20,
    ) -> None:
        self._network, self._folder, self._store = network, folder, store
        self._cpus = [cpus] * len(network.hosts) if isinstance(cpus, int) else list(cpus)
        # gloo looks for the address of this machine's name, which is another one on each host.
        own = {"GLOO_SOCKET_IFNAME": "eth0", "RAY_AUTH_MODE": "disabled", "PYTHONHASHSEED": "0", "PYTHONUNBUFFERED": "1"}
        # On a busy machine a node, and its agents, take longer to start than Ray allows.
        patient = {
            "RAY_raylet_start_wait_time_s": f"{START_SECONDS:.0f}",
            "RAY_agent_register_timeout_ms": f"{1000 * START_SECONDS:.0f}",
        }
        self._environment = {**os.environ, **own, **patient, **(environment or {})}
        self._environment.pop("RAY_ADDRESS", None)
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}
        self.starts = dict.fromkeys(network.hosts, 0)
        """How often the node of each host was started."""

    @property
    def address(self) -> str:
        return f"{self._network.address(0)}:{PORT}"

    def __enter__(self) -> RayNodes:
        try:
            for host in self._network.hosts:
                self.start_if_ended(host)
                if host == 0:
                    self._wait(host)
            for host in self._network.hosts:
                self._wait(host)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for _, node in sorted(self._nodes.items(), reverse=True):  # the head node last
            node.terminate()
        for node in self._nodes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(timeout=30)
            node.kill()  # what it started ends with its namespace
        self._nodes.clear()

    def start_if_ended(self, host: int) -> None:
        """Starts the host's node, unless it runs."""
        if host in self._nodes and self._nodes[host].poll() is None:
            return
        self.starts[host] += 1
        joins = ["--head", f"--port={PORT}", "--include-dashboard=false"] if host == 0 else [f"--address={self.address}"]
        command = [
            *self._network.enter(host),
            str(Path(sys.executable).parent / "ray"),
            *("start", "--block", "--disable-usage-stats", f"--node-ip-address={self._network.address(host)}"),
            *(f"--num-cpus={self._cpus[host]}", "--num-gpus=0", f"--object-store-memory={self._store}"),
            *(f"--temp-dir={self._folder}/h{host}", *joins),  # nodes that start at once in one folder take the same names
        ]
        with (self._folder / f"host-{host}-{self.starts[host]}.log").open("wb") as log:
            self._nodes[host] = subprocess.Popen(command, env=self._environment, stdout=log, stderr=subprocess.STDOUT)

    def start_driver(self, flags: Sequence[str], log: Path, host: int = 0) -> subprocess.Popen[bytes]:
        """Starts `lte-ray FLAGS` on a host, connected to this cluster; its output goes to a file."""
        command = [*self._network.enter(host), str(Path(sys.executable).parent / "lte-ray"), *flags]
        environment = {**self._environment, "RAY_ADDRESS": self.address}
        with log.open("ab") as file:
            return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)

    def has_started(self, host: int) -> bool:
        """Whether the host's newest node runs."""
        node = self._nodes[host]
        log = (self._folder / f"host-{host}-{self.starts[host]}.log").read_text()
        if node.poll() is not None:
            raise RuntimeError(f"The Ray node of host {host} ended with {node.returncode}: {log[-2000:]}")
        return "Ray runtime started" in log

    def _wait(self, host: int) -> None:
        end = time.monotonic() + START_SECONDS
        while not self.has_started(host):
            if time.monotonic() > end:
                raise TimeoutError(f"The Ray node of host {host} didn't start in {START_SECONDS:.0f} s")
            time.sleep(0.1)


@contextlib.contextmanager
def cluster(folder: Path, cpus: int | Sequence[int], **network: Any) -> Iterator[tuple[Network, RayNodes]]:
    """A network and a Ray node on each of its hosts, for the block."""
    with Network(**network) as hosts, RayNodes(hosts, cpus, folder) as nodes:
        yield hosts, nodes


if __name__ == "__main__":
    clean()

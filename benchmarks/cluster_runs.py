"""Runs on hosts with networks of their own, for `benchmarks.cluster`: what is trained, how it starts, what is counted."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lte_ray import Shard
from tests.support.network import Network, RayNodes
from workers.gpt import GPT

LIMIT_SECONDS = 420.0
"""Seconds that one run may take."""


@dataclass
class Paced(GPT):
    """A GPT of 3.3 million weights on two windows of 64 bytes, which pauses after each step."""

    width: int = 256
    context: int = 64
    batch_size: int = 2
    pause: float = 0.1
    """Seconds after each step, in which other processes of this machine compute."""

    def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in super().train_batches(shard):
            yield batch
            time.sleep(self.pause)


PACED = "benchmarks.cluster_runs:Paced"


@dataclass(frozen=True)
class Done:
    """A run that has ended.

    Attributes:
        folder: of the run.
        rows: of its metrics.
        first_step: seconds from the start of `lte-ray train` to the end of the first round of local steps.
        seconds: from there to its end.
        carried: bytes that all hosts together had sent when the row of this version was seen.
    """

    folder: Path
    rows: list[dict[str, Any]]
    first_step: float
    seconds: float
    carried: dict[int, int]

    @property
    def merges(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["kind"] == "merge"]

    def samples_per_second(self) -> float:
        """From the second merge to the last but one: at the end, heads run out of steps one after another."""
        merges = self.merges[1:-1]
        return sum(row["samples"] for row in merges[1:]) / (merges[-1]["at"] - merges[0]["at"])

    def utilisation(self) -> float:
        """The share of the heads' time in which they train, by the stalls that they report, in the same part of the run."""
        merges = self.merges[1:-1]
        stalls = sum(sum(row["stall_seconds"].values()) for row in merges[1:])
        heads = len({head for row in merges for head in row["heads"]})
        return 1 - float(stalls) / (heads * (merges[-1]["at"] - merges[0]["at"]))

    def round_seconds(self) -> float:
        """Mean time from one merge to the next, from the second on."""
        merges = self.merges[1:]
        return float(merges[-1]["at"] - merges[0]["at"]) / (len(merges) - 1)


class Hosts:
    """A network and Ray nodes for the block; runs are started on host 0, one after another."""

    def __init__(self, hosts: int, cpus: int | Sequence[int] = 1) -> None:
        self.network, self._cpus = Network(hosts), cpus

    def __enter__(self) -> Hosts:
        self._folder = Path(tempfile.mkdtemp(prefix="lte-", dir="/tmp"))  # Ray's sockets need a short path
        try:
            self.network.__enter__()
            self.nodes = RayNodes(self.network, self._cpus, self._folder, store=1024 * 2**20)
            self.nodes.__enter__()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "nodes"):
            self.nodes.__exit__()
        self.network.__exit__()
        shutil.rmtree(self._folder, ignore_errors=True)

    def train(self, name: str, flags: str, worker: str = PACED) -> Done:
        """Runs `lte-ray train` to its end.

        Raises:
            RuntimeError: it failed, or took too long.
        """
        log, run = self._folder / f"{name}.log", self._folder / name
        command = ["train", worker, *flags.split(), "--eval-every", "0", "--storage", str(self._folder), "--name", name]
        began = time.time()
        driver = self.nodes.start_driver(command, log)
        carried: dict[int, int] = {}
        try:
            while driver.poll() is None:
                rows = _read_rows(run)
                merges = [row for row in rows if row["kind"] == "merge"]
                if merges and merges[-1]["version"] not in carried:
                    carried[merges[-1]["version"]] = self.sent()
                if time.time() - began > LIMIT_SECONDS:
                    raise RuntimeError(f"{name} took longer than {LIMIT_SECONDS:.0f} s: {log.read_text()[-2000:]}")
                time.sleep(0.1)
        finally:
            if driver.poll() is None:
                driver.kill()
                driver.wait()
        if driver.returncode:
            raise RuntimeError(f"{name} ended with {driver.returncode}: {log.read_text()[-4000:]}")
        rows = _read_rows(run)
        first = min(row["at"] for row in rows if row["kind"] == "merge")
        return Done(run, rows, first - began, time.time() - first, carried)

    def sent(self) -> int:
        """Bytes that all hosts together have sent so far."""
        return sum(sent for sent, _ in self.network.carried().values())


def _read_rows(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def idle_bytes_per_second(hosts: Hosts, seconds: float = 5.0) -> float:
    """What Ray itself sends between the hosts while nothing runs."""
    before = hosts.sent()
    time.sleep(seconds)
    return (hosts.sent() - before) / seconds

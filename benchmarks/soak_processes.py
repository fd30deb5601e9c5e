"""The processes of the soak: the command ``lte-ray train``, which is restarted, its descendants, and how they are ended."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORKER = f"{ROOT}/benchmarks/soak_worker.py:Paced"
ADOPT_ORPHANS = 36
"""prctl's PR_SET_CHILD_SUBREAPER: processes whose parents die become children of this process."""

_drivers: set[int] = set()
"""Process numbers of all drivers that were started. `subprocess` reaps them."""


def adopt_orphans() -> None:
    """From now on, all descendants of this process stay its descendants, even if their parents die."""
    if ctypes.CDLL(None, use_errno=True).prctl(ADOPT_ORPHANS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed: the soak needs Linux")


@dataclass(frozen=True)
class Process:
    """One living process: its parent, its start (clock ticks since boot), and its command line."""

    pid: int
    parent: int
    started: int
    line: str

    @property
    def rss(self) -> int:
        """Resident bytes of memory; 0 if it has ended."""
        with contextlib.suppress(OSError):
            return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return 0

    def send(self, number: signal.Signals) -> bool:
        """Sends the signal. Returns False if the process has ended."""
        with contextlib.suppress(OSError):
            os.kill(self.pid, number)
            return True
        return False


def below(root: int) -> list[Process]:
    """All living descendants of `root`."""
    processes: dict[int, Process] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent, *rest = (entry / "stat").read_text().rpartition(")")[2].split()
                line = (entry / "cmdline").read_text(errors="replace").replace("\0", " ").strip()
                if state not in "ZX":
                    processes[int(entry.name)] = Process(int(entry.name), int(parent), int(rest[17]), line)
    inside: set[int] = {root}
    while more := {p.pid for p in processes.values() if p.parent in inside and p.pid not in inside}:
        inside |= more
    return [processes[pid] for pid in sorted(inside - {root}) if pid in processes]


CLASSES = {"head": "HeadActor", "coordinator": "CoordinatorActor", "evaluator": "EvaluatorActor"}


def actors(kind: str) -> list[Process]:
    """Living actors of lte-ray whose class has this name, among the descendants of this process."""
    return [process for process in below(os.getpid()) if process.line.startswith("ray::") and kind in process.line]


def reap() -> None:
    """Reaps ended orphans, so that no zombies remain. Not the driver, which `subprocess` reaps."""
    for process in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
        with contextlib.suppress(OSError, ValueError):
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z" and int(process) not in _drivers:
                os.waitpid(int(process), os.WNOHANG)


@dataclass
class Driver:
    """The command that trains, which can be started repeatedly.

    Args:
        storage, name: the storage and name of the run.
        heads: number of heads.
        log: file for its output.
    """

    storage: Path
    name: str
    heads: int
    log: Path
    process: subprocess.Popen[bytes] | None = None
    swept: list[str] = field(default_factory=list)

    @property
    def command(self) -> list[str]:
        """The command as a user would type it."""
        merging = "--when arrival --no-wait --merge-iter 20 --lora-r 8 --lora-alpha 16 --cpus-per-head 0.25"
        keeping = "--steps 10000000 --checkpoint-every 40 --eval-every 40 --head-failures -1"
        place = ["--storage", str(self.storage), "--name", self.name, "--resume"]
        return ["lte-ray", "train", WORKER, "--num-heads", str(self.heads), *merging.split(), *keeping.split(), *place]

    @property
    def metrics(self) -> Path:
        """The run's metrics file."""
        return self.storage / self.name / "metrics.jsonl"

    @property
    def alive(self) -> bool:
        """Whether the command runs."""
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Starts the command, which resumes the run if there is one."""
        arguments = [sys.executable, "-c", "from lte_ray.cli.main import entry; entry()", *self.command[1:]]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        env.pop("RAY_ADDRESS", None)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(arguments, cwd=ROOT, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        _drivers.add(self.process.pid)

    def end(self, number: signal.Signals, patience: float = 60.0) -> float:
        """Ends the command by this signal. Returns the seconds until it ended."""
        assert self.process is not None
        started = time.monotonic()
        self.process.send_signal(number)
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        return time.monotonic() - started

    def sweep(self, patience: float = 10.0) -> list[str]:
        """Waits for the processes of an ended command to end, and kills those that don't. Returns their names."""
        end = time.monotonic() + patience
        while below(os.getpid()) and time.monotonic() < end:
            reap()
            time.sleep(0.1)
        left = below(os.getpid())
        for process in left:
            process.send(signal.SIGKILL)
        while below(os.getpid()):
            reap()
            time.sleep(0.05)
        reap()
        names = [process.line[:80] for process in left]
        self.swept += names
        return names

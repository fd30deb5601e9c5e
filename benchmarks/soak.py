"""The soak: for half an hour, a run's processes are killed and stopped at random, including the coordinator and the driver.

    python -m benchmarks.soak --minutes 30 --faults-per-hour 125 --heads 4

First ``lte-ray train`` runs without faults for a third of the time. Then the same command runs under faults at exponential
intervals, of kinds drawn by `KINDS`, both seeded. When the driver dies, the command is run again with `--resume`. Each head's
step is mostly sleep, in place of a step on its own GPU (`benchmarks.soak_worker`).
"""

from __future__ import annotations

import argparse
import random
import signal
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.soak_account import Fault
from benchmarks.soak_processes import CLASSES, Driver, actors, adopt_orphans, reap
from benchmarks.soak_report import SoakResult, write_report
from benchmarks.soak_watch import Watch

KINDS = {
    "head SIGKILL": 48,
    "head SIGSTOP": 8,
    "coordinator SIGKILL": 18,
    "coordinator SIGSTOP": 6,
    "evaluator SIGKILL": 10,
    "driver SIGKILL": 5,
    "driver SIGTERM": 5,
}
"""Kinds of faults, and their percentages."""

POLL_INTERVAL = 0.1
"""Seconds between two polls of the run."""
PATIENCE = 180.0
"""Seconds to wait for all heads before and after the faults."""


@dataclass
class Soak:
    """One run, its faults, and what is observed.

    Args:
        driver: the run's driver.
        heads: number of heads.
        draw: generator of the times and kinds of faults.
    """

    driver: Driver
    heads: int
    draw: random.Random
    faults: list[Fault] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    unexpected_ends: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.watch = Watch(self.driver)

    def start(self) -> None:
        """Starts the command."""
        self.starts.append(time.time())
        self.driver.start()

    def observe(self, seconds: float) -> None:
        """Observes the run. If the command ends unexpectedly, records that and starts it again."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.watch.look()
            reap()
            if not self.driver.alive:
                assert self.driver.process is not None
                said = self.driver.log.read_text(errors="replace").strip().splitlines()[-3:]
                self.unexpected_ends.append(f"exit code {self.driver.process.returncode}: {' / '.join(said)}")
                self.restart()
            time.sleep(POLL_INTERVAL)

    def restart(self) -> None:
        """Starts the command again after it has ended. Records and ends the processes that it left behind."""
        self.watch.look()
        self.strays += self.driver.sweep(patience=2.0)  # Ray's agents may outlive a killed driver by a minute
        self.start()

    def all_merged(self, since: float) -> bool:
        """Whether every head has been merged since this Unix time."""
        heads = {head for row in self.watch.merges if row["at"] > since for head in row["held"]}
        return len(heads) == self.heads

    def wait_for_all(self, since: float) -> None:
        """Observes the run until every head has been merged since this Unix time."""
        end = time.monotonic() + PATIENCE
        while not self.all_merged(since) and time.monotonic() < end:
            self.observe(0.5)

    def inject(self, kind: str) -> None:
        """Injects a fault of this kind into a process, as soon as there is one."""
        who, signal_name = kind.split()
        number = signal.Signals[signal_name]
        if who == "driver":
            self.faults.append(Fault(time.time(), kind))
            self.driver.end(number)
            self.restart()
            return
        while not (targets := actors(CLASSES[who])):
            self.observe(POLL_INTERVAL)
        fault = Fault(time.time(), kind)
        if self.draw.choice(targets).send(number):
            self.faults.append(fault)

    def under_faults(self, seconds: float, an_hour: float) -> None:
        """Injects faults at random times for `seconds`, `an_hour` per hour on average."""
        end, due = time.monotonic() + seconds, time.monotonic()
        while (due := due + self.draw.expovariate(an_hour / 3600)) < end:
            kind = self.draw.choices(list(KINDS), list(KINDS.values()))[0]
            self.observe(max(0.0, due - time.monotonic()))
            print(f"{time.strftime('%H:%M:%S')}  {kind}", flush=True)
            self.inject(kind)
        self.observe(max(0.0, end - time.monotonic()))

    def stop(self) -> list[str]:
        """Ends the run as `ray job stop` would. Returns the processes that remain."""
        self.watch.look()
        self.driver.end(signal.SIGTERM)
        self.watch.look()
        return self.driver.sweep()


def run_soak(place: Path, name: str, heads: int, minutes: float, an_hour: float, seed: int) -> SoakResult:
    """Observes a run for `minutes`, with `an_hour` faults per hour."""
    soak = Soak(Driver(place, name, heads, place / f"{name}.log"), heads, random.Random(seed))
    soak.start()
    soak.wait_for_all(0.0)
    started = time.time()
    if an_hour:
        soak.under_faults(60 * minutes, an_hour)
        soak.wait_for_all(time.time())
    else:
        soak.observe(60 * minutes)
    ended = time.time()
    left = soak.stop()
    return SoakResult(
        soak.driver, heads, started, ended, soak.watch, soak.faults, soak.starts, soak.strays, soak.unexpected_ends, left
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="duration under faults (default: 30)")
    parser.add_argument("--faults-per-hour", type=float, default=125.0, help="faults per hour (default: 125)")
    parser.add_argument("--heads", type=int, default=4, help="LoRA heads (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults' times and kinds (default: 0)")
    parser.add_argument("--keep", type=Path, help="folder for the runs and their logs; by default a temporary one")
    flags = parser.parse_args()
    adopt_orphans()
    with tempfile.TemporaryDirectory() as temporary:
        place = flags.keep or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        calm = run_soak(place, "calm", flags.heads, flags.minutes / 3, 0.0, flags.seed)
        faulty = run_soak(place, "soak", flags.heads, flags.minutes, flags.faults_per_hour, flags.seed)
        write_report(calm, faulty, vars(flags) | {"keep": None})


if __name__ == "__main__":
    main()

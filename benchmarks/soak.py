"""The soak: a run whose processes are killed and stopped at random for half an hour, coordinator and driver included.

    python -m benchmarks.soak --minutes 30 --faults-per-hour 125 --heads 4

A run of ``lte-ray train`` without faults comes first, a third as long. Then the same command runs under faults: their gaps are
exponential, their kinds drawn by `KINDS`, both seeded. When the driver dies, the same command is given again, with `--resume`.
Each head's step is mostly sleep, for a step on a GPU of its own (`benchmarks.soak_worker`).
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
from benchmarks.soak_report import Soaked, tell
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
"""Kinds of faults, and how many of a hundred each is."""

LOOK = 0.1
"""Seconds between two looks at the run."""
PATIENCE = 180.0
"""Seconds for the run to be at full strength before and after the faults."""


@dataclass
class Soak:
    """One run under watch.

    Args:
        driver: of the run.
        heads: how many.
        draw: gives times and kinds of faults.
    """

    driver: Driver
    heads: int
    draw: random.Random
    faults: list[Fault] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    unasked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.watch = Watch(self.driver)

    def start(self) -> None:
        """Gives the command (again)."""
        self.starts.append(time.time())
        self.driver.start()

    def look(self, seconds: float) -> None:
        """Watches for so long; if the command ends though nobody ended it, that is noted, and it is given again."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.watch.look()
            reap()
            if not self.driver.alive:
                assert self.driver.process is not None
                said = self.driver.log.read_text(errors="replace").strip().splitlines()[-3:]
                self.unasked.append(f"exit code {self.driver.process.returncode}: {' / '.join(said)}")
                self.again()
            time.sleep(LOOK)

    def again(self) -> None:
        """The command has ended: what it left behind is noted and ended, and it is given again."""
        self.watch.look()
        self.strays += self.driver.sweep(patience=2.0)  # Ray's agents may outlive a driver that was killed by a minute
        self.start()

    def full(self, since: float) -> bool:
        """Whether every head has been merged since then (Unix time)."""
        there = {head for row in self.watch.merges if row["at"] > since for head in row["held"]}
        return len(there) == self.heads

    def until_full(self, since: float) -> None:
        """Watches until every head has been merged since then."""
        end = time.monotonic() + PATIENCE
        while not self.full(since) and time.monotonic() < end:
            self.look(0.5)

    def hurt(self, kind: str) -> None:
        """Does that to a process, as soon as there is one."""
        who, signal_name = kind.split()
        number = signal.Signals[signal_name]
        if who == "driver":
            self.faults.append(Fault(time.time(), kind))
            self.driver.end(number)
            self.again()
            return
        while not (targets := actors(CLASSES[who])):
            self.look(LOOK)
        fault = Fault(time.time(), kind)
        if self.draw.choice(targets).send(number):
            self.faults.append(fault)

    def under_faults(self, seconds: float, an_hour: float) -> None:
        """Faults at random times for so long."""
        end, due = time.monotonic() + seconds, time.monotonic()
        while (due := due + self.draw.expovariate(an_hour / 3600)) < end:
            kind = self.draw.choices(list(KINDS), list(KINDS.values()))[0]
            self.look(max(0.0, due - time.monotonic()))
            print(f"{time.strftime('%H:%M:%S')}  {kind}", flush=True)
            self.hurt(kind)
        self.look(max(0.0, end - time.monotonic()))

    def stop(self) -> list[str]:
        """Ends the run as `ray job stop` would; gives what is left of it then."""
        self.watch.look()
        self.driver.end(signal.SIGTERM)
        self.watch.look()
        return self.driver.sweep()


def soaked(place: Path, name: str, heads: int, minutes: float, an_hour: float, seed: int) -> Soaked:
    """A run for so many minutes, with so many faults an hour."""
    soak = Soak(Driver(place, name, heads, place / f"{name}.log"), heads, random.Random(seed))
    soak.start()
    soak.until_full(0.0)
    begun = time.time()
    if an_hour:
        soak.under_faults(60 * minutes, an_hour)
        soak.until_full(time.time())
    else:
        soak.look(60 * minutes)
    ended = time.time()
    left = soak.stop()
    return Soaked(soak.driver, heads, begun, ended, soak.watch, soak.faults, soak.starts, soak.strays, soak.unasked, left)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long under faults (default: 30)")
    parser.add_argument("--faults-per-hour", type=float, default=125.0, help="how many (default: 125)")
    parser.add_argument("--heads", type=int, default=4, help="LoRA heads (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults' times and kinds (default: 0)")
    parser.add_argument("--keep", type=Path, help="a folder for the runs and what they print; by default a temporary one")
    flags = parser.parse_args()
    adopt_orphans()
    with tempfile.TemporaryDirectory() as temporary:
        place = flags.keep or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        calm = soaked(place, "calm", flags.heads, flags.minutes / 3, 0.0, flags.seed)
        hurt = soaked(place, "soak", flags.heads, flags.minutes, flags.faults_per_hour, flags.seed)
        tell(calm, hurt, vars(flags) | {"keep": None})


if __name__ == "__main__":
    main()

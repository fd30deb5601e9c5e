"""Processor time of the commands that train nothing: help, the version, and mistakes that need no worker."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

from benchmarks.report import repeat, report, spread

RUNS = 5
LIMIT = 0.5
"""Seconds of user and system time, at most."""

COMMANDS = ("--version", "--help", "train", "train --help", "train --help-all", "unknown", "export --help", "ladder --help")


def processor_seconds(arguments: list[str]) -> float:
    """User and system time of one call."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([Path(sys.executable).with_name("lte-ray"), *arguments], capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    figures = {
        f"lte-ray {command}": spread(repeat(RUNS, lambda c=command: processor_seconds(c.split()), lambda s: f"{s:.2f} s"))  # type: ignore[misc]
        for command in COMMANDS
    }
    worst = max(each["median"] for each in figures.values())
    report("help", limits={"help": f"median of each command <= {LIMIT} s"}, met={"help": worst <= LIMIT}, figures=figures)


if __name__ == "__main__":
    main()

"""What all benchmarks share: progress lines, spreads, and a results file that names the machine and the command."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

RESULTS = Path(__file__).parent / "results"

_started = time.monotonic()


def machine() -> dict[str, Any]:
    """The machine and the versions that a figure depends on."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_GiB": round(memory, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": version("torch"),
        "ray": version("ray"),
    }


def progress(number: int, total: int, text: str) -> None:
    """Prints a line on standard error: which repetition of how many is done, after how long, and what it measured."""
    minutes, seconds = divmod(int(time.monotonic() - _started), 60)
    print(f"[{number}/{total}] {minutes}:{seconds:02}  {text}", file=sys.stderr, flush=True)


def repeat(runs: int, measure: Callable[[], T], describe: Callable[[T], str]) -> list[T]:
    """Measures `runs` times, prints a line of `progress` after each, and returns the measurements."""
    results: list[T] = []
    for number in range(1, runs + 1):
        results.append(measure())
        progress(number, runs, describe(results[-1]))
    return results


def report(name: str, *, limits: dict[str, str], met: dict[str, bool], figures: dict[str, Any]) -> None:
    """Prints the figures, writes ``benchmarks/results/NAME.json``, and exits with 1 if a limit is missed."""
    content = {
        "benchmark": name,
        "command": f"python -m benchmarks.{name}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "limits": limits,
        "met": met,
        "figures": figures,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
    for limit, text in limits.items():
        print(f"{'met   ' if met[limit] else 'MISSED'}  {limit}: {text}")
    sys.exit(0 if all(met.values()) else 1)


def spread(values: list[float]) -> dict[str, float]:
    """Minimum, median and maximum of several runs."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return {"min": round(ordered[0], 4), "median": round(median, 4), "max": round(ordered[-1], 4)}

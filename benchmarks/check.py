"""Time of `lte-ray check gpt`, from the start of its process to its end. The text has been tokenized before.

The limit is for processor time, which depends little on what else the machine does. On an idle machine, elapsed time is about
the same.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.report import repeat, report, spread

RUNS, LIMIT = 3, 15.0


def check() -> tuple[float, float]:
    """Elapsed and processor seconds of one check."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [str(Path(sys.executable).parent / "lte-ray"), "check", "gpt", "--num-heads", "2"]
    subprocess.run(command, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - began, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    check()
    pairs = repeat(RUNS, check, lambda pair: f"{pair[0]:.1f} s elapsed, {pair[1]:.1f} s of processor time")
    processor = spread([pair[1] for pair in pairs])
    report(
        "check",
        limits={"check": f"processor time of lte-ray check gpt, median <= {LIMIT:g} s"},
        met={"check": processor["median"] <= LIMIT},
        figures={"processor_seconds": processor, "seconds": spread([pair[0] for pair in pairs])},
    )


if __name__ == "__main__":
    main()

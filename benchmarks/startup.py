"""Time from the command to the first local step, relative to that of `import torch` and `ray.init` on this machine.

Ours is `lte-ray train workers.gpt:GPT` from the start of its process to the end of the first merge after one local step, so it
includes that step and a merge. The two alternate. The text has been tokenized before.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.report import repeat, report, spread

RUNS = 5
BARE = "import torch, ray, time; ray.init('local', include_dashboard=False, logging_level='error'); print(time.time())"
TIMEOUT = 120.0
"""Seconds for one process."""


def bare() -> float:
    """Seconds until torch is imported and a local Ray runs."""
    started = time.time()
    done = subprocess.run(
        [sys.executable, "-c", BARE], capture_output=True, text=True, check=True, env=environment(), timeout=TIMEOUT
    )
    return float(done.stdout.split()[-1]) - started


def ours() -> float:
    """Seconds until the first local step of both heads has been merged."""
    with tempfile.TemporaryDirectory() as storage:
        flags = f"--steps 1 --merge-iter 1 --num-heads 2 --eval-every 0 --name run --storage {storage}"
        started = time.time()
        command = [str(Path(sys.executable).parent / "lte-ray"), "train", "workers.gpt:GPT", *flags.split()]
        subprocess.run(command, capture_output=True, check=True, env=environment(), timeout=TIMEOUT)
        row = json.loads((Path(storage) / "run" / "metrics.jsonl").read_text().splitlines()[0])
        return float(row["at"]) - started


def environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}


def main() -> None:
    ours()  # tokenizes the text on a fresh machine, and fills the disk cache
    pairs = repeat(
        RUNS, lambda: (ours(), bare()), lambda pair: f"{pair[0]:.1f} s, bare {pair[1]:.1f} s, ratio {pair[0] / pair[1]:.3f}"
    )
    ratio = spread([a / b for a, b in pairs])
    report(
        "startup",
        limits={"startup": "ratio to import torch + ray.init, median <= 2.5"},
        met={"startup": ratio["median"] <= 2.5},
        figures={
            "first_step_seconds": spread([a for a, _ in pairs]),
            "bare_seconds": spread([b for _, b in pairs]),
            "ratio": ratio,
        },
    )


if __name__ == "__main__":
    main()

"""From the command to the first local step, over the bare time of `import torch` and `ray.init` on this machine.

Ours is the whole of `lte-ray train workers.gpt:GPT`, from the start of its process until the first merge after one local
step is done, so it holds that step and a merge, too. The two are alternated; the text is tokenised already.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.report import report, spread

RUNS = 5
BARE = "import torch, ray, time; ray.init('local', include_dashboard=False, logging_level='error'); print(time.time())"
LIMIT = 120.0  # seconds for one process


def bare() -> float:
    """Seconds until torch is imported and a local Ray is up."""
    begun = time.time()
    done = subprocess.run(
        [sys.executable, "-c", BARE], capture_output=True, text=True, check=True, env=environment(), timeout=LIMIT
    )
    return float(done.stdout.split()[-1]) - begun


def ours() -> float:
    """Seconds until the first local step of both heads is taken and merged."""
    with tempfile.TemporaryDirectory() as storage:
        flags = f"--steps 1 --merge-iter 1 --num-heads 2 --eval-every 0 --name run --storage {storage}"
        begun = time.time()
        command = [str(Path(sys.executable).parent / "lte-ray"), "train", "workers.gpt:GPT", *flags.split()]
        subprocess.run(command, capture_output=True, check=True, env=environment(), timeout=LIMIT)
        row = json.loads((Path(storage) / "run" / "metrics.jsonl").read_text().splitlines()[0])
        return float(row["at"]) - begun


def environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}


def main() -> None:
    ours()  # tokenises the text on a fresh machine, and warms the disk's cache
    pairs = [(ours(), bare()) for _ in range(RUNS)]
    ratio = spread([a / b for a, b in pairs])
    report(
        "startup",
        limits={"startup": "median over import torch + ray.init <= 2.5"},
        met={"startup": ratio["median"] <= 2.5},
        figures={
            "first_step_seconds": spread([a for a, _ in pairs]),
            "bare_seconds": spread([b for _, b in pairs]),
            "ratio": ratio,
        },
    )


if __name__ == "__main__":
    main()

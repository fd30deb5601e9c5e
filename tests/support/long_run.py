"""A long run, made by hand: many rows as real ones have them."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from lte_ray.run.metrics_files import METRICS
from lte_ray.storage import RunDirectory
from tests.support.run_folders import event_row, make_run

BEGIN = 1_790_000_000.0


def make_long_run(folder: Path, merges: int, heads: int = 8, seed: int = 0) -> RunDirectory:
    """A run of many merges with a barrier, an evaluation every 50 of them and a few events. One loss in the middle is 99."""
    generator = random.Random(seed)
    directory = make_run(folder, started=BEGIN, num_heads=heads, steps=10 * merges)
    with (folder / METRICS).open("w") as file:
        for version in range(1, merges + 1):
            file.write(json.dumps(_row(version, heads, generator, peak=version == merges // 2)) + "\n")
            if version % 50 == 0:
                row = {"kind": "evaluation", "at": BEGIN + 2 * version, "version": version, "step": 10 * version}
                file.write(json.dumps({**row, "values": {"loss": 3 * version**-0.1, "accuracy": 0.5}}) + "\n")
            if version % (merges // 10 or 1) == 0:
                for name, later in (("head_lost", 0.5), ("head_restarts", 30.0)):
                    file.write(json.dumps(event_row(name, BEGIN + 2 * version + later, heads=[1])) + "\n")
    return directory


def _row(version: int, heads: int, generator: random.Random, *, peak: bool) -> dict[str, Any]:
    each = {str(head): generator.random() for head in range(heads)}
    loss = 99.0 if peak else 4 * version**-0.1
    return {
        "kind": "merge", "at": BEGIN + 2 * version, "version": version, "step": 10 * version, "steps": 10 * heads,
        "samples": 320 * heads, "heads": list(range(heads)),
        "train_loss": {head: loss + (0 if peak else 0.1 * noise) for head, noise in each.items()},
        "samples_per_second": 160.0 * heads + math.sin(version), "tokens_per_second": 163840.0,
        "lr": {group: dict.fromkeys(each, 0.003) for group in ("lora", "replica")},
        "gradient_norm": each, "memory": dict.fromkeys(each, 438173696), "merge_seconds": 0.01 * each["0"],
        "bytes_up": 76416, "bytes_down": 51840, "base_error": 0.0, "lag": dict.fromkeys(each, 0),
        "head_steps": dict.fromkeys(each, 10), "weight": dict.fromkeys(each, 1 / heads),
        "stall_seconds": {head: 0.2 * noise for head, noise in each.items()},
        "bytes_instead": {"dense": 103680, "ddp": 345600, "diloco": 69120},
        "held": {head: {"incarnation": 0, "sequence": version, "version": version, "step": 10 * version,
                        "samples": 320 * version, "batches": 5, "lanes": [[15, 3]]} for head in each},
    }  # fmt: skip

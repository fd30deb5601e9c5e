"""Validation loss of the main job with main weights in bf16, int8 and nf4, over the same run with fp32.

All train `workers.gpt:GPT` with its defaults (2 heads, 700 local steps), with the same seed and data. Also: the relative error
that requantising the base makes, the largest over layers and merges, and the bytes of the main weights.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from benchmarks.report import report
from lte_ray import LTEConfig, LTETrainer
from lte_ray.config import StorageConfig
from lte_ray.metrics import Silent
from workers.gpt import GPT

FORMATS = ("fp32", "bf16", "int8", "nf4")


def train(base_dtype: str) -> tuple[float, float]:
    """Bits per byte of the last version, and the largest error of requantisation."""
    with tempfile.TemporaryDirectory() as storage:
        result = LTETrainer(
            GPT(),
            lte=LTEConfig(base_dtype=base_dtype),  # type: ignore[arg-type]
            run_config=StorageConfig(name="run", storage=storage),
            reporter=Silent(),
        ).fit()
        rows = [json.loads(line) for line in (Path(storage) / "run" / "metrics.jsonl").read_text().splitlines()]
    assert result.metrics is not None
    return result.metrics["bits_per_byte"], max(row["base_error"] for row in rows if row["kind"] == "merge")


def main() -> None:
    runs = {base_dtype: train(base_dtype) for base_dtype in FORMATS}
    exact = runs["fp32"][0]
    report(
        "quantized",
        limits={f: f"bits per byte over fp32's, {f}, <= 1.03" for f in FORMATS[1:]},
        met={f: runs[f][0] / exact <= 1.03 for f in FORMATS[1:]},
        figures={
            f: {"bits_per_byte": round(bits, 4), "over_fp32": round(bits / exact, 4), "requantisation_error": round(error, 5)}
            for f, (bits, error) in runs.items()
        },
    )


if __name__ == "__main__":
    main()

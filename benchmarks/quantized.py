"""Validation loss of the default run with main weights in nf4, relative to the same run in fp32: three seeds.

All train `workers.gpt:GPT` with its defaults (2 heads, 700 local steps), each pair with the same seed and data. One pair says
little: two runs that differ only in rounding end up to 1.5% apart. Also: the relative error of requantizing the base, the
maximum over layers and merges. Other formats: `python -m benchmarks.quantized int8 bf16`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from benchmarks.report import progress, report, spread
from lte_ray import LTEConfig, LTETrainer, TrainConfig
from lte_ray.config import StorageConfig
from lte_ray.run.metrics import SilentReporter
from workers.gpt import GPT

SEEDS = (0, 1, 2)


def train(base_dtype: str, seed: int) -> tuple[float, float]:
    """Bits per byte of the last version, and the maximum error of requantization."""
    with tempfile.TemporaryDirectory() as storage:
        result = LTETrainer(
            GPT(),
            lte=LTEConfig(base_dtype=base_dtype),  # type: ignore[arg-type]
            train=TrainConfig(seed=seed, eval_every=0, checkpoint_every=0),
            run_config=StorageConfig(name="run", storage=storage),
            reporter=SilentReporter(),
        ).fit()
        rows = [json.loads(line) for line in (Path(storage) / "run" / "metrics.jsonl").read_text().splitlines()]
    assert result.metrics is not None
    return result.metrics["bits_per_byte"], max(row["base_error"] for row in rows if row["kind"] == "merge")


def main() -> None:
    formats = sys.argv[1:] or ["nf4"]
    jobs = [(f, seed) for f in ["fp32", *formats] for seed in SEEDS]
    runs: dict[str, list[tuple[float, float]]] = {f: [] for f, _ in jobs}
    for number, (f, seed) in enumerate(jobs, 1):
        runs[f].append(train(f, seed))
        progress(number, len(jobs), f"{f}, seed {seed}: {runs[f][-1][0]:.4f} bits per byte")
    over = {f: spread([bits / exact for (bits, _), (exact, _) in zip(runs[f], runs["fp32"], strict=True)]) for f in formats}
    report(
        "quantized",
        limits={f: f"bits per byte, ratio to fp32, {f}, median <= 1.03" for f in formats},
        met={f: over[f]["median"] <= 1.03 for f in formats},
        figures={
            "bits_per_byte": {f: [round(bits, 4) for bits, _ in runs[f]] for f in runs},
            "over_fp32": over,
            "requantisation_error": {f: round(max(error for _, error in runs[f]), 4) for f in formats},
        },
    )


if __name__ == "__main__":
    main()

"""Validation loss without waiting, relative to the barrier, with the library's default optimizer (LoRA-Muon) and policy.

As `benchmarks.async_quality`, whose heads train with AdamW: 4 heads with step times 1:1:1:4, 1600 local steps together in every
run, ratios to the barrier with the same seed, medians of the seeds. Nothing is clipped. The momentum and max_lag that are the
default were chosen on seed 100.

    python -m benchmarks.async_defaults
"""

from __future__ import annotations

from typing import Any

from benchmarks.async_quality import CLUSTER, HEADS, MERGE_ITER, STEPS, Way, table, train
from benchmarks.report import progress, report
from workers.gpt import GPT

SEEDS = (0, 1, 2)
WORKER = GPT(width=64, depth=2, context=64, batch_size=8)

DEFAULT = "arrival"
WAYS = {
    "barrier": Way("auto", when="barrier"),
    DEFAULT: Way("auto"),
    "arrival, max_lag 4": Way("auto", max_lag=4),
    "arrival, speed-matched": Way("auto", match_speed=True),
    "quorum of 3": Way("auto", when="quorum", quorum=3),
    "arrival, average": Way("average"),
}


def main() -> None:
    rows: dict[str, dict[int, Any]] = {name: {} for name in WAYS}
    for name, way in WAYS.items():
        for seed in SEEDS:
            rows[name][seed] = train(WORKER, way, seed, clip_norm=0.0)
            done = sum(map(len, rows.values()))
            loss = rows[name][seed]["evaluation"]["bits_per_byte"]
            progress(done, len(WAYS) * len(SEEDS), f"{name}, seed {seed}: {loss:.4f} bits per byte")
    result = table(rows, SEEDS)
    assert len({row["samples"] for row in result.values()}) == 1, "all ways must see equally many samples"
    report(
        "async_defaults",
        limits={DEFAULT: "validation loss, ratio to the barrier, equal samples, speeds 1:1:1:4, median of 3 seeds <= 1.01"},
        met={DEFAULT: result[DEFAULT]["over_barrier"]["median"] <= 1.01},
        figures={"heads": HEADS, "steps_a_head": STEPS, "merge_iter": MERGE_ITER, "speeds": CLUSTER.speeds, "ways": result},
    )


if __name__ == "__main__":
    main()

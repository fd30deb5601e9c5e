"""The formats that `benchmarks.bytes` compares, and their effect on the loss.

`workers.gpt:GPT` (2 blocks of 64, windows of 64 bytes, peak learning rate 1e-3, gradients clipped to 1) on 4 heads of r = 32,
384 steps each, merged every 64: the validation loss of the merged weights at the end, relative to fp32 with the same seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.adamw_gpt import AdamWGPT
from benchmarks.report import progress, spread
from benchmarks.shapes import ALPHA, RANK
from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.engine.in_process import evaluate_base, run_in_process
from lte_ray.engine.prepare import prepare
from lte_ray.engine.settings import Settings
from lte_ray.worker import Worker

HEADS, MERGE_ITER, STEPS, SEEDS = 4, 64, 384, (0, 1)
EVERYTHING = ("linear", "attention", "conv", "embedding")
WORKER = AdamWGPT(width=64, depth=2, context=64, batch_size=8, lr=1e-3)


@dataclass(frozen=True)
class Wire:
    """What is sent, and in which format."""

    merge: MergeConfig
    embeddings: bool = True
    """Whether embeddings have factors."""


WIRES = {
    "fp32": Wire(MergeConfig(merge_iter=MERGE_ITER)),
    "bf16": Wire(MergeConfig(merge_iter=MERGE_ITER, transfer="bf16")),
    "int8": Wire(MergeConfig(merge_iter=MERGE_ITER, transfer="int8")),
    "fp32, embeddings as replicas": Wire(MergeConfig(merge_iter=MERGE_ITER), embeddings=False),
    "int8, embeddings as replicas": Wire(MergeConfig(merge_iter=MERGE_ITER, transfer="int8"), embeddings=False),
    "int8, embeddings as replicas, a tenth of them": Wire(
        MergeConfig(merge_iter=MERGE_ITER, transfer="int8", replica_topk=0.1), embeddings=False
    ),
}


def loss(worker: Worker, wire: Wire, seed: int, steps: int = STEPS) -> float:
    """Validation bits per byte of a run that merges in this format."""
    adapt = EVERYTHING if wire.embeddings else EVERYTHING[:-1]
    lte = LTEConfig(num_heads=HEADS, lora_r=RANK, lora_alpha=ALPHA, adapt=adapt)  # type: ignore[arg-type]
    settings = Settings(
        "bytes",
        lte,
        wire.merge,
        TrainConfig(steps=steps, seed=seed, clip_norm=1.0),
    )
    run = run_in_process(worker, settings)
    return evaluate_base(worker, prepare(worker, settings), run.base)["bits_per_byte"]


def losses(worker: Worker, wires: Mapping[str, Wire], steps: int = STEPS) -> dict[str, dict[str, Any]]:
    """Each format's validation losses, and their ratios to fp32 with the same seed."""
    by_format = {}
    for number, (name, wire) in enumerate(wires.items(), 1):
        by_format[name] = [loss(worker, wire, seed, steps) for seed in SEEDS]
        progress(number, len(wires), f"{name}: {' '.join(f'{bits:.4f}' for bits in by_format[name])} bits per byte")
    result = {}
    for name, values in by_format.items():
        exact = by_format["fp32" if wires[name].embeddings else "fp32, embeddings as replicas"]
        ratios = [a / b for a, b in zip(values, exact, strict=True)]
        result[name] = {"bits_per_byte": [round(v, 4) for v in values], "over_fp32": spread(ratios)}
    return result

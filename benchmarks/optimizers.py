"""CPU seconds of a head's training step with LoRA-Muon, relative to AdamW: forward, backward, optimizer and all.

Both heads are in one process with one thread, and alternate. CPU seconds are those of the process, so that other processes
count less. The models: `workers.gpt:GPT` with its defaults, and with the layers of GPT-2-124M (12 blocks of width 768) on 4
windows of 256 bytes. AdamW is torch's with its defaults.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.report import progress, report, spread
from lte_ray import LTEConfig, MergeConfig, TrainConfig
from lte_ray.engine.head.head import Head
from lte_ray.engine.prepare import prepare
from lte_ray.engine.process_tuning import keep_freed_memory
from lte_ray.engine.settings import Settings
from workers.gpt import GPT

LIMIT = 1.10


@dataclass(frozen=True)
class Case:
    """A model and the factors' rank, and how often steps are compared, of how many steps each."""

    size: dict[str, int]
    rank: int
    runs: int
    steps: int


GPT2: dict[str, int] = {"width": 768, "depth": 12, "attention_heads": 12, "context": 256, "batch_size": 4}

CASES = {
    "gpt, r 16": Case({}, 16, 9, 10),
    "gpt, r 64": Case({}, 64, 9, 10),
    "gpt-2-124m, r 16": Case(GPT2, 16, 3, 1),
    "gpt-2-124m, r 64": Case(GPT2, 64, 3, 1),
}


def start_head(case: Case, optimizer: Any) -> Head:
    train = TrainConfig(steps=10**6, optimizer=optimizer, schedule="constant", warmup=0)
    settings = Settings("optimizers", LTEConfig(num_heads=1, lora_r=case.rank), MergeConfig(), train)
    worker = GPT(**case.size)
    head = Head(worker, settings, 0)
    head.start(0, prepare(worker, settings).base)
    return head


def seconds(head: Head, steps: int) -> float:
    started = time.process_time()
    head.train(steps)
    return (time.process_time() - started) / steps


def optimizer_seconds(head: Head, steps: int) -> float:
    """Of the optimizer's step alone, with the gradients of one batch."""
    head.backward(head.next_batch())
    started = time.process_time()
    for _ in range(steps):
        head.optimizer.step()
    return (time.process_time() - started) / steps


def compare(name: str, case: Case) -> dict[str, Any]:
    """Ratios of whole steps, and milliseconds of whole steps and of the optimizers alone."""
    heads = {kind: start_head(case, kind) for kind in ("lora-muon", "adamw")}
    for head in heads.values():
        seconds(head, 1)
    whole: dict[str, list[float]] = {kind: [] for kind in heads}
    for run in range(case.runs):
        for kind, head in heads.items():
            whole[kind].append(seconds(head, case.steps))
        progress(
            run + 1, case.runs, f"{name}: {whole['lora-muon'][-1]:.3f} s with LoRA-Muon, {whole['adamw'][-1]:.3f} s with AdamW"
        )
    alone = {kind: [optimizer_seconds(head, 3) for _ in range(case.runs)] for kind, head in heads.items()}
    return {
        "ratio": spread([one / other for one, other in zip(*whole.values(), strict=True)]),
        "step_ms": {kind: spread([1000 * s for s in taken]) for kind, taken in whole.items()},
        "optimizer_ms": {kind: spread([1000 * s for s in taken]) for kind, taken in alone.items()},
    }


def main() -> None:
    keep_freed_memory()
    torch.set_num_threads(1)
    figures = {name: compare(name, case) for name, case in CASES.items()}
    report(
        "optimizers",
        limits=dict.fromkeys(CASES, f"step with LoRA-Muon, ratio to AdamW, median <= {LIMIT}"),
        met={name: figures[name]["ratio"]["median"] <= LIMIT for name in CASES},
        figures=figures,
    )


if __name__ == "__main__":
    main()

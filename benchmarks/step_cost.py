"""CPU seconds of a head's training step, relative to a step of ordinary training with AdamW on as many samples.

A head's step is measured twice: as it is, and with every layer's product s B (A x) kept apart from W~ x, which is how layers
computed before some formed W~ + s B A (`lte_ray.adapters.product_cost`). The three are in one process with one thread, and take
turns. CPU seconds are those of the process, so that other processes count less.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any
from unittest import mock

import torch

from benchmarks.report import progress, report, spread
from lte_ray import LTEConfig, MergeConfig, TrainConfig
from lte_ray.engine.head.head import Head
from lte_ray.engine.prepare import prepare
from lte_ray.engine.process_tuning import keep_freed_memory
from lte_ray.engine.settings import Settings
from workers.gpt import GPT
from workers.resnet import ResNet
from workers.vit import ViT

LIMIT = 1.25
"""Of a head's step to one of ordinary training, for the main job."""

MAIN = "gpt"


@dataclass(frozen=True)
class Case:
    """A worker, the rank of its factors, and how many steps a turn has, of how many turns."""

    make: Callable[[], Any]
    rank: int = 64
    steps: int = 3
    turns: int = 9


CASES = {
    MAIN: Case(GPT),
    "gpt, rank 16": Case(GPT, rank=16),
    "vit": Case(lambda: ViT(batch_size=32)),
    "resnet": Case(lambda: ResNet(batch_size=32)),
    "gpt of width 768, 2 blocks": Case(lambda: GPT(width=768, depth=2, attention_heads=12, context=256, batch_size=4), steps=1),
}


def start_head(case: Case, *, ordinary: bool) -> Head:
    optimizer = "adamw" if ordinary else "auto"
    settings = TrainConfig(steps=10**6, schedule="constant", warmup=0, baseline=ordinary, optimizer=optimizer)
    run = Settings("step_cost", LTEConfig(num_heads=1, lora_r=case.rank), MergeConfig(), settings)
    worker = case.make()
    head = Head(worker, run, 0)
    head.start(0, prepare(worker, run).base)
    return head


@contextmanager
def kept_apart() -> Iterator[None]:
    """Within the block, no layer forms its effective weight."""
    with mock.patch("lte_ray.adapters.layer.forms_weight", return_value=False):
        yield


def seconds(head: Head, steps: int) -> float:
    started = time.process_time()
    head.train(steps)
    return (time.process_time() - started) / steps


def measure(case: Case) -> dict[str, Any]:
    """Milliseconds of CPU time of each kind of step, and ratios of the same turn."""
    head, ordinary = start_head(case, ordinary=False), start_head(case, ordinary=True)
    turns = []
    for turn in range(case.turns + 1):
        with kept_apart():
            apart = seconds(head, case.steps)
        found = (seconds(head, case.steps), apart, seconds(ordinary, case.steps))
        if turn:  # the first fills caches
            turns.append(found)
    kinds = ("head", "product apart", "ordinary")
    return {
        "cpu_ms": {kind: round(1000 * median(column), 1) for kind, column in zip(kinds, zip(*turns, strict=True), strict=True)},
        "head_to_ordinary": spread([now / other for now, _, other in turns]),
        "head_to_product_apart": spread([now / apart for now, apart, _ in turns]),
    }


def main() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    figures = {}
    for number, (name, case) in enumerate(CASES.items(), 1):
        figures[name] = measure(case)
        progress(number, len(CASES), f"{name}: {figures[name]['cpu_ms']}")
    ratio = figures[MAIN]["head_to_ordinary"]["median"]
    report(
        "step_cost",
        limits={"main job": f"head to ordinary, median <= {LIMIT}"},
        met={"main job": ratio <= LIMIT},
        figures=figures,
    )


if __name__ == "__main__":
    main()

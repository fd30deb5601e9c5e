"""The in-process modes relative to plain LoRA, in samples/s of full training steps (forward, backward, AdamW).

ddp: 8 stacked heads of rank r, relative to one plain LoRA of rank 8r, on the same total batch. dmp: 8 heads with a copy of the
main weights each, relative to 8 plain LoRA models of rank r that train one after another, each on its part of the batch. The
model is a transformer on vectors without affine parameters in its norms, as the authors advise. Plain LoRA is the model of a
single head. virtual: 8 heads in one actor, relative to 8 actors, on the same 2 CPUs (`benchmarks.virtual`). The compared
variants alternate.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lte_ray
from benchmarks import virtual
from benchmarks.report import repeat, report, spread
from lte_ray.adapters import convert
from lte_ray.engine.process_tuning import keep_freed_memory
from workers.gpt import Block

HEADS, RANK, WIDTH, DEPTH, LENGTH, BATCH, CLASSES = 8, 16, 256, 4, 64, 64, 256
RUNS, STEPS, RAY_RUNS = 7, 4, 3


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), *(Block(WIDTH, 4) for _ in range(DEPTH)), nn.Linear(WIDTH, CLASSES))
    return lte_ray.misc.disable_norm_affine_parameters(model)


def plain(rank: int) -> nn.Module:
    """One LoRA of this rank on everything."""
    return convert(network(), lte_ray.LTEConfig(num_heads=1, lora_r=rank, lora_alpha=2.0 * rank, lora_bias="frozen")).model


def many(mode: str) -> nn.Module:
    config = lte_ray.LTEConfig.default(num_heads=HEADS, lora_r=RANK, lora_alpha=2.0 * RANK)
    return lte_ray.prepare_model_for_lte(network(), config, mode=mode, seed=0)


def trainer(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    for _ in range(STEPS):
        step()
    return (time.perf_counter() - started) / STEPS


def main() -> None:
    keep_freed_memory()
    torch.manual_seed(1)
    x, y = torch.randn(BATCH, LENGTH, WIDTH), torch.randint(0, CLASSES, (BATCH, LENGTH))
    parts = list(zip(x.chunk(HEADS), y.chunk(HEADS), strict=True))
    ddp, dmp = trainer(many("ddp"), x, y), trainer(many("dmp"), x, y)
    wide = trainer(plain(HEADS * RANK), x, y)
    single = [trainer(plain(RANK), *part) for part in parts]

    def sequential() -> None:
        for step in single:
            step()

    steps = {"ddp": ddp, "wide": wide, "dmp": dmp, "sequential": sequential}
    for step in steps.values():
        step()
    runs = repeat(
        RUNS,
        lambda: {name: seconds(step) for name, step in steps.items()},
        lambda run: ", ".join(f"{name} {BATCH / took:.0f} samples/s" for name, took in run.items()),
    )
    over_wide = spread([run["wide"] / run["ddp"] for run in runs])
    over_sequential = spread([run["sequential"] / run["dmp"] for run in runs])
    pairs = repeat(
        RAY_RUNS,
        lambda: (virtual.measure(HEADS), virtual.measure(1)),
        lambda pair: (
            f"virtual heads, ratio to actors: {pair[0][0] / pair[1][0]:.3f} speed, {pair[0][1] / pair[1][1]:.3f} memory"
        ),
    )
    speed = spread([ours[0] / theirs[0] for ours, theirs in pairs])
    memory = spread([ours[1] / theirs[1] for ours, theirs in pairs])
    report(
        "modes",
        limits={
            "ddp": "8 heads, samples/s, ratio to one LoRA of rank 8r, median >= 0.7",
            "dmp": "8 heads, samples/s, ratio to 8 LoRA models in turn, median >= 0.95",
            "virtual": "8 heads in one actor, samples/s, ratio to 8 actors, median >= 1.0",
            "virtual memory": "8 heads in one actor, memory, ratio to 8 actors, median <= 0.35",
        },
        met={
            "ddp": over_wide["median"] >= 0.7,
            "dmp": over_sequential["median"] >= 0.95,
            "virtual": speed["median"] >= 1.0,
            "virtual memory": memory["median"] <= 0.35,
        },
        figures={
            "ddp_over_wide": over_wide,
            "dmp_over_sequential": over_sequential,
            "virtual_over_actors": speed,
            "virtual_memory_over_actors": memory,
            "samples_per_second": {
                **{name: spread([BATCH / run[name] for run in runs]) for name in steps},
                "virtual": spread([ours[0] for ours, _ in pairs]),
                "actors": spread([theirs[0] for _, theirs in pairs]),
            },
            "MiB": {
                "virtual": spread([ours[1] / 2**20 for ours, _ in pairs]),
                "actors": spread([theirs[1] / 2**20 for _, theirs in pairs]),
            },
        },
    )


if __name__ == "__main__":
    main()

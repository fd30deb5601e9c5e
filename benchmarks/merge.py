"""One merge of 8 heads, r = 64, on GPT-2-124M's shapes, over a bare torch loop that does the same arithmetic.

Ours is everything from 8 contributions in hand to the new base: checks for NaN, the policy, products, replicas and new
references. The bare loop has no checks and no bookkeeping: for each layer and head it adds s B A and takes s B' A' away,
and adds the replicas' changes. Also: the bytes of a serialised contribution over its factors' and replicas' own size.
"""

from __future__ import annotations

import math
import pickle
import time
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.report import progress, report, spread
from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.engine.coordinator.coordinator import Coordinator
from lte_ray.engine.settings import Settings
from lte_ray.layout import Adapted, Plan, Replica
from lte_ray.merging import Average, ComposedPolicy
from lte_ray.merging.flat_buffer import factor_views, factors_part, replica_part, views
from lte_ray.messages import Contribution

HEADS, RANK, ALPHA, RUNS = 8, 64, 128.0, 5
WIDTH, DEPTH = 768, 12


def gpt2_plan() -> Plan:
    """What conversion makes of GPT-2 124M: 48 adapted matrices; embeddings (tied), norms and biases are replicas."""
    shapes = {"qkv": (3 * WIDTH, WIDTH), "out": (WIDTH, WIDTH), "up": (4 * WIDTH, WIDTH), "down": (WIDTH, 4 * WIDTH)}
    adapted, replicas = [], [Replica("wte.weight", (50257, WIDTH)), Replica("wpe.weight", (1024, WIDTH))]
    for block in range(DEPTH):
        for name, shape in shapes.items():
            adapted.append(Adapted(f"h.{block}.{name}.weight", shape, RANK, ALPHA / RANK))
            replicas.append(Replica(f"h.{block}.{name}.bias", shape[:1]))
        replicas += [Replica(f"h.{block}.norm{n}.{p}", (WIDTH,)) for n in (1, 2) for p in ("weight", "bias")]
    replicas += [Replica(f"norm.{p}", (WIDTH,)) for p in ("weight", "bias")]
    return Plan(tuple(adapted), tuple(replicas))


def bare(plan: Plan, base: Tensor, new: list[Tensor], old: list[Tensor]) -> None:
    """The same arithmetic in a plain torch loop."""
    weights = views(plan.base, base)
    parts = [factor_views(plan, factors_part(plan, c)) for c in new]
    references = [factor_views(plan, r) for r in old]
    for spec in plan.adapted:
        for part, reference in zip(parts, references, strict=True):
            weights[spec.name].addmm_(part[spec.b_name], part[spec.a_name], alpha=spec.scaling / HEADS)
            weights[spec.name].addmm_(reference[spec.b_name], reference[spec.a_name], alpha=-spec.scaling / HEADS)
    replicas = base[plan.base.size - (plan.contribution.size - plan.factors_size) :]
    for contribution in new:
        replicas.add_(replica_part(plan, contribution), alpha=1 / HEADS)


def main() -> None:
    plan = gpt2_plan()
    settings = Settings("bench", LTEConfig(HEADS, RANK, ALPHA), MergeConfig(), TrainConfig())
    generator = torch.Generator().manual_seed(0)

    def contribution() -> Tensor:
        return torch.randn(plan.contribution.size, generator=generator).mul_(0.02)

    buffers = [contribution() for _ in range(HEADS)]
    references = [factors_part(plan, contribution()).clone() for _ in range(HEADS)]
    start = torch.randn(plan.base.size, generator=generator).mul_(0.02)
    ours, theirs = [], []
    for run in range(RUNS + 1):  # the first of each is a warm-up
        base, copies = start.clone(), {head: reference.clone() for head, reference in enumerate(references)}
        coordinator = Coordinator(settings, plan, base, ComposedPolicy(Average()), references=copies)
        messages = [
            Contribution("bench", h, incarnation=0, sequence=1, version=0, step=1, steps=1, samples=1, loss=0.0)
            for h in range(HEADS)
        ]
        started = time.perf_counter()
        for message, buffer in zip(messages, buffers, strict=True):
            event_result = coordinator.receive(message, buffer)
        coordinator.base  # computes the products  # noqa: B018
        ours.append(time.perf_counter() - started)
        assert len(event_result.merges) == 1
        other = start.clone()
        started = time.perf_counter()
        bare(plan, other, buffers, references)
        theirs.append(time.perf_counter() - started)
        if run == 0:
            difference = float((base - other).norm() / (other - start).norm())
            assert difference < 1e-5, f"the two compute different weights: {difference}"
        else:
            progress(run, RUNS, f"{ours[-1]:.3f} s, bare {theirs[-1]:.3f} s, ratio {ours[-1] / theirs[-1]:.3f}")
    ratios = [a / b for a, b in zip(ours[1:], theirs[1:], strict=True)]

    message = replace(messages[0], buffer=buffers[0].numpy())
    sent = len(pickle.dumps(message, protocol=5))
    minimum = 4 * (sum(a.rank * sum(a.shape) for a in plan.adapted) + sum(math.prod(r.shape) for r in plan.replicas))
    ratio = spread(ratios)
    report(
        "merge",
        limits={
            "merge": "ratio to the bare loop, median <= 1.3",
            "bytes up": "ratio to the size of factors and replicas <= 1.02",
        },
        met={"merge": ratio["median"] <= 1.3, "bytes up": sent / minimum <= 1.02},
        figures={
            "parameters": plan.base.size,
            "heads": HEADS,
            "rank": RANK,
            "threads": torch.get_num_threads(),
            "merge_seconds": spread(ours[1:]),
            "bare_seconds": spread(theirs[1:]),
            "ratio": ratio,
            "relative_difference": difference,
            "bytes_up_per_head": sent,
            "bytes_up_ratio": round(sent / minimum, 6),
            "factors_over_dense_matrices": round(plan.factors_size / sum(math.prod(a.shape) for a in plan.adapted), 4),
        },
    )


if __name__ == "__main__":
    main()

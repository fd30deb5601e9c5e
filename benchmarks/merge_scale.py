"""One merge of 2 to 256 heads, r = 32, on GPT-2-124M's shapes and 1 to 8 shards, relative to the bare matrix products.

Ours is everything between the arrival of the contributions and the new base: checks, the policy, products, replicas and new
references, by the engine's coordinator, or by its shards and a coordinator that sees only numbers (without processes, so
messages between them don't count). Bare are the products alone: for each weight the concatenated factors of contributions and
references, and one product; the concatenation counts, since every way needs it. Each shard has one thread, as it has its own
process. They are measured one after another, and the slowest gives the latency, both of ours (with the decision) and of the
bare products. Seconds are CPU seconds of the process, which is the latency on a free core, since nothing waits.

Embeddings have factors (they are tied: one weight). That weight is a third of the work, so 8 shards aren't faster than 4. With
more than 16 heads several have the same tensors, so that these fit into memory; each is checked, multiplied and kept as if it
were different. Also: the merge of a single contribution, as `--when arrival` does with any number of heads.

    python -m benchmarks.merge_scale [--most HEADS]

With --most it measures up to that number of heads, and writes no results.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import progress, report, spread
from benchmarks.shapes import ALPHA, DISTINCT, RANK, Piece, gpt2_plan
from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.engine.coordinator.aggregator import BaseShard, MeasuredContribution
from lte_ray.engine.coordinator.coordinator import Coordinator
from lte_ray.engine.settings import Settings
from lte_ray.layout import Plan
from lte_ray.merging import Average, ComposedPolicy
from lte_ray.merging.flat_buffer import as_matrix, factor_views, views
from lte_ray.merging.policies.trigger import Arrival, Barrier
from lte_ray.messages import Contribution
from lte_ray.transfer.codec import Codec
from lte_ray.transfer.groups import make_groups

HEADS = (2, 8, 32, 128, 256)
SHARDS = (1, 2, 4, 8)
RUNS = {2: 5, 8: 3}
"""Repetitions by number of heads; larger merges, which take many seconds, are measured once."""


def coordinator_of(plan: Plan, base: Tensor | None, heads: int, alone: bool, references: dict[int, Tensor]) -> Coordinator:
    """A coordinator that averages all heads' contributions, or merges each alone."""
    settings = Settings("scale", LTEConfig(heads, RANK, ALPHA), MergeConfig(), TrainConfig())
    policy = ComposedPolicy(Average(), Arrival() if alone else Barrier())
    return Coordinator(settings, plan, base, policy, references=references)


def send_all(coordinator: Coordinator, contents: list[Any]) -> None:
    """Sends the coordinator a contribution of each of the first heads. It merges them when the last one arrives."""
    for head, what in enumerate(contents):
        event_result = coordinator.receive(Contribution("scale", head, 0, 1, 0, 1, 1, 1, 0.0), what)
    assert len(event_result.merges) == 1


def unsharded(piece: Piece, base: Tensor, heads: int, merged: int) -> float:
    """Seconds of one merge by a coordinator without shards; `base` is changed in place."""
    coordinator = coordinator_of(piece.plan, base, heads, merged < heads, piece.references_of(heads))
    started = time.process_time()
    send_all(coordinator, [piece.buffers[head % DISTINCT] for head in range(merged)])
    assert coordinator.base is base  # computes the products
    return time.process_time() - started


def decide(plan: Plan, heads: int, merged: int) -> float:
    """Seconds of a coordinator that gets measurements from shards."""
    coordinator = coordinator_of(plan, None, heads, merged < heads, {})
    started = time.process_time()
    send_all(coordinator, [MeasuredContribution(1.0)] * merged)
    return time.process_time() - started


def merge_shard(codec: Codec, pieces: dict[int, Piece], bases: dict[int, Tensor], heads: int, merged: int) -> float:
    """Seconds of one shard with these groups: checks, products, replicas and references."""
    references = {index: piece.references_of(heads) for index, piece in pieces.items()}
    shard = BaseShard([codec] * heads, bases, "none", references=references)
    sent = [{i: p.buffers[head % DISTINCT].view(torch.uint8) for i, p in pieces.items()} for head in range(merged)]
    started = time.process_time()
    for head, buffers in enumerate(sent):
        assert shard.receive(head, head, buffers) > 0
    shard.merge(1, dict.fromkeys(range(merged), 1 / heads))
    shard.catch_up()
    return time.process_time() - started


def bare(piece: Piece, base: Tensor, heads: int, merged: int) -> float:
    """Seconds of the products alone."""
    plan = piece.plan
    new = [views(plan.contribution, piece.buffers[head % DISTINCT]) for head in range(merged)]
    old = [factor_views(plan, piece.references[head % DISTINCT]) for head in range(merged)]
    started = time.process_time()
    weights = views(plan.base, base)
    for spec in plan.adapted:
        weight = as_matrix(spec, weights[spec.name])
        left = torch.cat([f[spec.b_name] for f in (*new, *old)], dim=1)
        right = torch.cat([f[spec.a_name] for f in (*new, *old)])
        right[right.shape[0] // 2 :].neg_()
        weight.addmm_(left, right, alpha=spec.scaling / heads)
    return time.process_time() - started


def shard_seconds(plan: Plan, heads: int, merged: int, shards: int, shard: int, runs: int) -> list[tuple[float, float]]:
    """For each run, the seconds of a shard and of the bare products."""
    merge = MergeConfig(shards=shards)
    codec = Codec(plan, make_groups([plan] * heads, merge), merge)
    mine = [index for index, group in enumerate(codec.groups) if group.shard == shard]
    pieces = {i: Piece.random(codec.group_plans[i], heads) for i in mine} if shards > 1 else {0: Piece.random(plan, heads)}
    bases, others = ({i: p.start.clone() for i, p in pieces.items()} for _ in range(2))
    seconds = []
    for _ in range(runs):
        for i, piece in pieces.items():
            bases[i].copy_(piece.start)
            others[i].copy_(piece.start)
        took = merge_shard(codec, pieces, bases, heads, merged) if shards > 1 else unsharded(pieces[0], bases[0], heads, merged)
        seconds.append((took, sum(bare(piece, others[i], heads, merged) for i, piece in pieces.items())))
    for i, piece in pieces.items():
        difference = piece.difference(bases[i], others[i])
        assert difference < 1e-4, f"the two compute different weights: {difference}"  # fp32, sums of up to 16,384 products
    return seconds


def point(plan: Plan, heads: int, shards: int, alone: bool = False) -> dict[str, Any]:
    """One row: the latency of merging all heads' contributions, or a single one."""
    merged, runs = (1, 5) if alone else (heads, RUNS.get(heads, 1))
    by_shard = [shard_seconds(plan, heads, merged, shards, shard, runs) for shard in range(shards)]
    decision = decide(plan, heads, merged) if shards > 1 else 0.0
    ours = [decision + max(took for took, _ in of_run) for of_run in zip(*by_shard, strict=True)]
    least = [max(took for _, took in of_run) for of_run in zip(*by_shard, strict=True)]
    seconds = spread(ours)["median"]
    return {
        "heads": heads,
        "shards": shards,
        "seconds": seconds,
        "bare_seconds": spread(least)["median"],
        "versions_per_second": round(1 / seconds, 3),
        "ratio": spread([a / b for a, b in zip(ours, least, strict=True)]),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--most", type=int, default=max(HEADS))
    most = parser.parse_args().most
    torch.set_num_threads(1)
    plan = gpt2_plan(embeddings=True)
    point(plan, 2, 1)  # warms up
    jobs = [(HEADS[1], shards, True) for shards in SHARDS]
    jobs += [(heads, shards, False) for heads in HEADS if heads <= most for shards in SHARDS]
    rows = []
    for number, job in enumerate(jobs, 1):
        rows.append(point(plan, *job))
        progress(number, len(jobs), str(rows[-1]))
    arrivals, points = rows[: len(SHARDS)], rows[len(SHARDS) :]
    if most < max(HEADS):
        return
    worst = max(row["ratio"]["median"] for row in [*arrivals, *points])
    report(
        "merge_scale",
        limits={"ratio": "latency, ratio to the bare matrix products, at every point <= 1.3"},
        met={"ratio": worst <= 1.3},
        figures={
            "parameters": plan.base.size,
            "rank": RANK,
            "threads_a_shard": 1,
            "worst_ratio": worst,
            "merges_of_all_heads": points,
            "merges_of_one_contribution": arrivals,
        },
    )


if __name__ == "__main__":
    main()

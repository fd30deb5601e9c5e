"""One merge of 2 to 256 heads, r = 32, on GPT-2-124M's shapes, over 1 to 8 shards, over the bare matrix products.

Ours is everything from the contributions in hand to the decision and the new base: checks, the policy, products, replicas and
new references; by the engine's coordinator, or by its shards and a coordinator that sees numbers alone (without processes:
what messages between them take isn't in it). Bare are the products alone: for each weight the concatenated factors of
contributions and references, one product, and nothing else; concatenation counts, for no way does without. Each shard has one
thread, as it has a process of its own; they are measured one after the other here, and the slowest is the latency, ours (with
the decision) and the bare one's. Seconds are the process's own, which is the latency on a free core: nothing waits.

Embeddings have factors (they are tied: one weight); it alone is a third of the work, so that 8 shards aren't faster than 4.
Of more than 16 heads several hold the same tensors, so that they fit into memory: each is checked, multiplied and kept as if
it were its own. Also: the merge of a single contribution, which `--when arrival` does however many heads there are.

    python -m benchmarks.merge_scale [--most HEADS]

With --most, only up to so many heads, and nothing is written to the results.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import report, spread
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
"""How often each is measured; once where a merge takes many seconds."""


def coordinator_of(plan: Plan, base: Tensor | None, heads: int, alone: bool, held: dict[int, Tensor]) -> Coordinator:
    """A coordinator that averages all heads' contributions, or each alone."""
    settings = Settings("scale", LTEConfig(heads, RANK, ALPHA), MergeConfig(), TrainConfig())
    policy = ComposedPolicy(Average(), Arrival() if alone else Barrier())
    return Coordinator(settings, plan, base, policy, references=held)


def received(coordinator: Coordinator, whats: list[Any]) -> None:
    """Gives the coordinator one contribution of each of the first heads, which it merges at the last."""
    for head, what in enumerate(whats):
        outcome = coordinator.receive(Contribution("scale", head, 0, 1, 0, 1, 1, 1, 0.0), what)
    assert len(outcome.merges) == 1


def unsharded(piece: Piece, base: Tensor, heads: int, merged: int) -> float:
    """Seconds of one merge by a coordinator that holds all; `base` is changed in place."""
    coordinator = coordinator_of(piece.plan, base, heads, merged < heads, piece.held(heads))
    begun = time.process_time()
    received(coordinator, [piece.buffers[head % DISTINCT] for head in range(merged)])
    assert coordinator.base is base  # computed now
    return time.process_time() - begun


def decided(plan: Plan, heads: int, merged: int) -> float:
    """Seconds of a coordinator that is told what shards have measured."""
    coordinator = coordinator_of(plan, None, heads, merged < heads, {})
    begun = time.process_time()
    received(coordinator, [MeasuredContribution(1.0)] * merged)
    return time.process_time() - begun


def of_shard(codec: Codec, pieces: dict[int, Piece], bases: dict[int, Tensor], heads: int, merged: int) -> float:
    """Seconds of one shard with these groups: checks, products, replicas and references."""
    references = {index: piece.held(heads) for index, piece in pieces.items()}
    shard = BaseShard([codec] * heads, bases, "none", references=references)
    sent = [{i: p.buffers[head % DISTINCT].view(torch.uint8) for i, p in pieces.items()} for head in range(merged)]
    begun = time.process_time()
    for head, buffers in enumerate(sent):
        assert shard.receive(head, head, buffers) > 0
    shard.merge(1, dict.fromkeys(range(merged), 1 / heads))
    shard.catch_up()
    return time.process_time() - begun


def bare(piece: Piece, base: Tensor, heads: int, merged: int) -> float:
    """Seconds of the products alone."""
    plan = piece.plan
    new = [views(plan.contribution, piece.buffers[head % DISTINCT]) for head in range(merged)]
    old = [factor_views(plan, piece.references[head % DISTINCT]) for head in range(merged)]
    begun = time.process_time()
    weights = views(plan.base, base)
    for spec in plan.adapted:
        weight = as_matrix(spec, weights[spec.name])
        left = torch.cat([f[spec.b_name] for f in (*new, *old)], dim=1)
        right = torch.cat([f[spec.a_name] for f in (*new, *old)])
        right[right.shape[0] // 2 :].neg_()
        weight.addmm_(left, right, alpha=spec.scaling / heads)
    return time.process_time() - begun


def shard_seconds(plan: Plan, heads: int, merged: int, shards: int, shard: int, runs: int) -> list[tuple[float, float]]:
    """Of each run: a shard's seconds, and the bare products'."""
    merge = MergeConfig(shards=shards)
    codec = Codec(plan, make_groups([plan] * heads, merge), merge)
    mine = [index for index, group in enumerate(codec.groups) if group.shard == shard]
    pieces = {i: Piece.of(codec.group_plans[i], heads) for i in mine} if shards > 1 else {0: Piece.of(plan, heads)}
    bases, others = ({i: p.start.clone() for i, p in pieces.items()} for _ in range(2))
    found = []
    for _ in range(runs):
        for i, piece in pieces.items():
            bases[i].copy_(piece.start)
            others[i].copy_(piece.start)
        took = of_shard(codec, pieces, bases, heads, merged) if shards > 1 else unsharded(pieces[0], bases[0], heads, merged)
        found.append((took, sum(bare(piece, others[i], heads, merged) for i, piece in pieces.items())))
    for i, piece in pieces.items():
        difference = piece.difference(bases[i], others[i])
        assert difference < 1e-4, f"the two compute different weights: {difference}"  # fp32, sums of up to 16,384 products
    return found


def point(plan: Plan, heads: int, shards: int, alone: bool = False) -> dict[str, Any]:
    """One row: the latencies of merging all heads' contributions, or one alone."""
    merged, runs = (1, 5) if alone else (heads, RUNS.get(heads, 1))
    found = [shard_seconds(plan, heads, merged, shards, shard, runs) for shard in range(shards)]
    decision = decided(plan, heads, merged) if shards > 1 else 0.0
    ours = [decision + max(took for took, _ in of_run) for of_run in zip(*found, strict=True)]
    least = [max(took for _, took in of_run) for of_run in zip(*found, strict=True)]
    seconds = spread(ours)["median"]
    row = {
        "heads": heads,
        "shards": shards,
        "seconds": seconds,
        "bare_seconds": spread(least)["median"],
        "versions_per_second": round(1 / seconds, 3),
        "ratio": spread([a / b for a, b in zip(ours, least, strict=True)]),
    }
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--most", type=int, default=max(HEADS))
    most = parser.parse_args().most
    torch.set_num_threads(1)
    plan = gpt2_plan(embeddings=True)
    point(plan, 2, 1)  # warms up
    arrivals = [point(plan, HEADS[1], shards, alone=True) for shards in SHARDS]
    points = [point(plan, heads, shards) for heads in HEADS if heads <= most for shards in SHARDS]
    if most < max(HEADS):
        return
    worst = max(row["ratio"]["median"] for row in [*arrivals, *points])
    report(
        "merge_scale",
        limits={"ratio": "latency over the bare matrix products, at every point <= 1.3"},
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

"""Bytes between hosts against the fewest possible, and the time to the first step and of merges; 2 to 16 heads on 1 to 4 hosts.

Links have the machine's speed, so that packets are large and their headers count little. A merge's bytes are the mean over the
merges from the second to the last: what all hosts had sent when each merge was recorded, while heads compute.
"""

from __future__ import annotations

import math
from typing import Any

from benchmarks.cluster_runs import Hosts, Paced, idle_bytes_per_second
from benchmarks.report import progress
from lte_ray import LTEConfig, MergeConfig, TrainConfig
from lte_ray.engine.prepare import prepare
from lte_ray.engine.settings import Settings
from lte_ray.layout import Plan

CASES = ((1, 2), (2, 2), (2, 4), (2, 8), (4, 16))
"""Hosts, and heads of all of them."""

ROUND, ROUNDS = 4, 8
WIDTH = 4


def fewest(plan: Plan, hosts: int, heads: int) -> int:
    """The fewest bytes between hosts in a merge: each layer's factors go to every other host once, or its dense values do after
    the factors have gone to the coordinator's host."""
    elsewhere = heads - heads // hosts  # heads that aren't on the coordinator's host
    total = 0
    layers = [(a.rank * sum(a.matrix), math.prod(a.shape)) for a in plan.adapted]
    for contribution, dense in layers + [(math.prod(r.shape), math.prod(r.shape)) for r in plan.replicas]:
        total += min((hosts - 1) * heads * contribution, elsewhere * contribution + (hosts - 1) * dense)
    return WIDTH * total


def traffic() -> tuple[dict[str, Any], dict[str, tuple[str, bool]]]:
    worker, figures = Paced(pause=0.05), dict[str, Any]()
    plan = prepare(worker, Settings("traffic", LTEConfig(), MergeConfig(), TrainConfig())).plan
    ratios = {}
    for number, (count, heads) in enumerate(CASES, 1):
        with Hosts(count, heads // count) as hosts:
            idle = idle_bytes_per_second(hosts) if count > 1 else 0.0
            flags = f"--steps {ROUND * ROUNDS} --merge-iter {ROUND} --policy average --checkpoint-every 0 --worker.pause 0.05"
            done = hosts.train("run", f"{flags} --num-heads {heads} --cpus-per-head 1")
        versions = sorted(version for version in done.carried if version > 1)
        each = (done.carried[versions[-1]] - done.carried[versions[0]]) / (versions[-1] - versions[0])
        least = fewest(plan, count, heads)
        ratios[count, heads] = each / least if least else 0.0
        case = {
            "bytes_between_hosts_a_merge": round(each), "fewest": least, "ratio": round(ratios[count, heads], 4),
            "seconds_to_the_first_merge": round(done.first_step, 1), "seconds_of_a_round": round(done.round_seconds(), 3),
            "seconds_of_a_merges_products": round(sum(m["merge_seconds"] for m in done.merges) / len(done.merges), 4),
            "idle_bytes_per_second": round(idle),
        }  # fmt: skip
        figures[f"{heads} heads, {count} host(s)"] = case
        progress(number, len(CASES), f"{heads} heads on {count} host(s): {case}")
    four = [ratio for (count, heads), ratio in ratios.items() if count > 1 and heads == 4 * count]
    return figures, {
        "traffic": ("four heads a host: bytes between hosts, ratio to the fewest possible <= 1.05", max(four) <= 1.05)
    }

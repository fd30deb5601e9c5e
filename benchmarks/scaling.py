"""Where the coordinator saturates: simulations of 4 to 10,000 heads on GPT-2-124M's shapes, with 1 and 8 shards.

A round is 100 local steps of 0.1 s. All other settings are `ClusterModel`'s defaults: links of 10 Gbit/s, and a coordinator
whose products and memory accesses are as fast as `benchmarks.simulator` measured. Prints the tables of docs/scaling.md.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks.report import progress, report
from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.config.cluster_model import ClusterModel
from lte_ray.engine.settings import Settings
from lte_ray.simulation import SimulationRecord, named_plan, simulate_time

HEADS, SHARDS = (4, 16, 64, 256, 1000, 10_000), (1, 8)
RANK, STEPS, ROUNDS = 32, 100, 5


def simulated(heads: int, merge: MergeConfig, rounds: int) -> tuple[SimulationRecord, float]:
    """The simulated run, and the seconds that the simulation took."""
    settings = Settings("scaling", LTEConfig(num_heads=heads), merge, TrainConfig(steps=STEPS * rounds))
    started = time.perf_counter()
    run = simulate_time([named_plan("gpt2-124m", RANK, 64.0)], settings, ClusterModel(jitter=0.1))
    return run, time.perf_counter() - started


def row(heads: int, shards: int, when: str, transfer: str) -> dict[str, Any]:
    """One line of a table."""
    wait = when == "barrier"
    merge = MergeConfig(
        merge_iter=STEPS,
        when=when,  # type: ignore[arg-type]
        wait=wait,
        max_lag=10**9,
        shards=shards,
        transfer=transfer,  # type: ignore[arg-type]
        replica_topk=1.0 if transfer == "fp32" else 0.01,
    )
    run, took = simulated(heads, merge, ROUNDS if wait else 3)
    return {
        "heads": heads,
        "shards": shards,
        "when": when,
        "transfer": transfer,
        "contributions_per_second": run.arrivals / run.seconds,
        "versions_per_second": run.versions / run.seconds,
        "versions": run.versions,
        "steps_per_contribution": run.steps / run.arrivals,
        "coordinator_busy": run.coordinator_busy,
        "link_in_busy": run.link_in_busy,
        "link_out_busy": run.link_out_busy,
        "utilisation": run.utilisation,
        "simulated_in_seconds": round(took, 2),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as in docs/scaling.md."""
    lines = [
        "| heads | shards | contributions/s | versions/s | merging | link in | link out | heads train |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        shares = " | ".join(f"{100 * r[k]:.0f}%" for k in ("coordinator_busy", "link_in_busy", "link_out_busy", "utilisation"))
        rates = f"{r['contributions_per_second']:.3g} | {r['versions_per_second']:.3g}"
        lines.append(f"| {r['heads']:,} | {r['shards']} | {rates} | {shares} |")
    return "\n".join(lines)


def main() -> None:
    figures: dict[str, Any] = {}
    longest = 0.0
    for when, transfer in (("barrier", "fp32"), ("barrier", "int8"), ("arrival", "int8")):
        rows = []
        for shards in SHARDS:
            for heads in HEADS:
                rows.append(row(heads, shards, when, transfer))
                progress(
                    len(rows),
                    len(SHARDS) * len(HEADS),
                    f"{when}, {transfer}: {heads:,} heads, {shards} shards, {rows[-1]['contributions_per_second']:.3g}/s",
                )
        figures[f"{when}, {transfer}"] = rows
        longest = max([longest, *(r["simulated_in_seconds"] for r in rows)])
        print(f"{when}, {transfer}\n\n{markdown(rows)}\n", flush=True)
    largest = [r for rows in figures.values() for r in rows if r["heads"] == max(HEADS)]
    enough = all(r["versions"] >= (5 if r["when"] == "barrier" else 20_000) for r in largest)
    report(
        "scaling",
        limits={"size": "10,000 heads: 5 versions of a barrier, 20,000 arrivals", "time": "of each simulation <= 180 s"},
        met={"size": enough, "time": longest <= 180},
        figures=figures,
    )


if __name__ == "__main__":
    main()

"""The soak's report: ``benchmarks/results/soak.json`` and a printed table."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from benchmarks.report import report
from benchmarks.soak_account import Fault, assign_heads, fit, next_merge, quantiles, rate, recovered_at, stretches
from benchmarks.soak_processes import CLASSES, Driver
from benchmarks.soak_watch import Watch
from lte_ray.audit import audit, read_rows

MIB = 2**20
WARM = 20.0
"""Seconds after which a coordinator's memory counts. Before, it is still loading."""
FLAT = 0.05
"""The fraction by which the memory of the coordinator, or of the object store, may grow during the run (or 4 MiB)."""


@dataclass
class SoakResult:
    """An observed run, from the moment when every head had been merged until it was stopped."""

    driver: Driver
    heads: int
    started: float
    ended: float
    watch: Watch
    faults: list[Fault]
    starts: list[float]
    strays: list[str]
    unexpected_ends: list[str]
    left: list[str]


def write_report(calm: SoakResult, faulty: SoakResult, flags: dict[str, Any]) -> None:
    """Prints and writes the report. Exits with 1 if a limit is missed."""
    figures = _figures(calm, faulty, flags)
    _table(figures)
    limits, met = _limits(figures)
    report("soak", limits=limits, met=met, figures=figures)


def _figures(calm: SoakResult, faulty: SoakResult, flags: dict[str, Any]) -> dict[str, Any]:
    merges, starts = faulty.watch.merges, faulty.starts
    assign_heads(faulty.faults, faulty.watch.events)
    returns = [recovered_at(fault, merges, starts, faulty.heads) for fault in faulty.faults]
    usual, _ = rate(stretches(calm.watch.merges, calm.starts), [(calm.started, calm.ended)])
    pieces = stretches(merges, starts)
    away = [(f, (f.at, end)) for f, end in zip(faulty.faults, returns, strict=True) if f.of_head and end is not None]
    coordinator_away = [
        (f.at, end) for f, end in zip(faulty.faults, returns, strict=True) if "coordinator" in f.kind and end is not None
    ]
    survivors, measured = rate(pieces, [span for _, span in away], [fault.head for fault, _ in away])
    others, _ = rate(pieces, coordinator_away)
    final = audit(read_rows(faulty.driver.metrics.read_text()))
    kept = {row["version"]: row["at"] for row in read_rows(faulty.driver.metrics.read_text()) if row["kind"] == "merge"}
    undone = [row for row in merges if kept.get(row["version"]) != row["at"]]
    seconds = merges[-1]["at"] - merges[0]["at"]
    by_kind = sorted({fault.kind for fault in faulty.faults})
    return {
        "asked": {name: value for name, value in flags.items() if value is not None},
        "run": " ".join(word.rpartition("/")[2] if "soak_worker" in word else word for word in faulty.driver.command[:-5]),
        "a_step": "sleeps 50 ms, for a step on the head's own GPU, and computes for some milliseconds",
        "minutes": {
            "fault_free": round((calm.ended - calm.started) / 60, 2),
            "faults": round((faulty.ended - faulty.started) / 60, 2),
        },
        "faults": {
            "number": len(faulty.faults),
            "an_hour": round(3600 * len(faulty.faults) / (faulty.ended - faulty.started), 1),
        },
        "faults_by_kind": dict(Counter(fault.kind for fault in faulty.faults)),
        "samples_per_second": {
            "fault_free": round(faulty.heads * usual, 1),
            "whole_run": round(final.samples / seconds, 1),
            "whole_run_over_fault_free": round(final.samples / seconds / (faulty.heads * usual), 4),
        },
        "survivors": {
            "over_fault_free": round(survivors / usual, 4),
            "head_seconds": round(measured),
            "while_the_coordinator_was_away": round(others / usual, 4),
        },
        "seconds_to_next_merge": quantiles(next_merge(fault, merges) for fault in faulty.faults),
        "seconds_to_next_merge_by_kind": {
            kind: quantiles(next_merge(fault, merges) for fault in faulty.faults if fault.kind == kind) for kind in by_kind
        },
        "seconds_to_full_strength_by_kind": {
            kind: quantiles(
                None if end is None else end - fault.at
                for fault, end in zip(faulty.faults, returns, strict=True)
                if fault.kind == kind
            )
            for kind in by_kind
            if not kind.startswith("evaluator")
        },
        "never_back": [fault.kind for fault, end in zip(faulty.faults, returns, strict=True) if end is None],
        "contributions": {
            "merged": final.contributions,
            "batches_lost": final.lost,
            "batches_doubled": final.doubled,
            "merges_without_rows": final.unlogged,
            "problems": final.described_problems,
            "steps_that_died_with_heads_and_were_taken_again": final.reissued,
            "merges_that_died_with_the_driver_and_were_made_again": len(undone),
        },
        "left_over": {
            "processes_at_the_end": faulty.left,
            "placement_groups": _groups(faulty),
            "ended_for_dead_drivers": dict(Counter(name.split(" ")[0] for name in faulty.strays)),
        },
        "unasked_ends_of_the_driver": faulty.unexpected_ends,
        "events": dict(Counter(event["event"] for event in faulty.watch.events)),
        "memory_MiB": {name: _memory(each) for name, each in (("fault_free", calm), ("faults", faulty))},
    }


def _memory(result: SoakResult) -> dict[str, Any]:
    first: dict[int, float] = {}
    for sample in result.watch.memory:
        first.setdefault(sample.pid, sample.at)
    warm = [s for s in result.watch.memory if s.at - first[s.pid] >= WARM and result.started <= s.at <= result.ended]
    store = [s for s in result.watch.memory if s.store is not None and result.started <= s.at <= result.ended]
    return {
        "coordinator": fit([(s.at, s.coordinator / MIB) for s in warm]),
        "object_store": fit([(s.at, (s.store or 0) / MIB) for s in store]),
    }


def _groups(result: SoakResult) -> int | None:
    """Placement groups at the end in addition to the run's one; None if they couldn't be counted."""
    known = [sample.groups for sample in result.watch.memory if sample.groups is not None]
    return max(0, known[-1] - 1) if known else None


def _flat(memory: dict[str, float]) -> bool:
    return "over_the_run" in memory and memory["over_the_run"] <= max(4.0, FLAT * memory["start"])


def _limits(figures: dict[str, Any]) -> tuple[dict[str, str], dict[str, bool]]:
    contributions, left, memory = figures["contributions"], figures["left_over"], figures["memory_MiB"]["faults"]
    ours = [name for name in left["ended_for_dead_drivers"] if any(kind in name for kind in CLASSES.values())]
    flat = f"growth over the run, by a straight line, at most 4 MiB or {FLAT:.0%}"
    checks = {
        "survivors": ("samples/s of the other heads while one is away, ratio to fault-free: >= 0.977",
                      figures["survivors"]["over_fault_free"] >= 0.977),
        "next_merge": ("seconds from a fault to the next merge, median: <= 5",
                       figures["seconds_to_next_merge"].get("median", math.inf) <= 5),
        "nothing_lost": ("batches lost: 0, and no other problem of the audit",
                         not contributions["batches_lost"] and not contributions["problems"]),
        "nothing_doubled": ("batches merged twice: 0", not contributions["batches_doubled"]),
        "nothing_left": ("processes and placement groups left over: 0, nor any of our actors when a driver was killed",
                         not left["processes_at_the_end"] and left["placement_groups"] == 0 and not ours),
        "always_back": ("every fault was recovered from, and the driver ended only when it was made to",
                        not figures["never_back"] and not figures["unasked_ends_of_the_driver"]),
        "coordinator_flat": (f"the coordinator's memory: {flat}", _flat(memory["coordinator"])),
        "object_store_flat": (f"the object store: {flat}", _flat(memory["object_store"])),
    }  # fmt: skip
    return {name: text for name, (text, _) in checks.items()}, {name: bool(good) for name, (_, good) in checks.items()}


def _table(figures: dict[str, Any]) -> None:
    """Prints, by kind of fault, the number and the times until the next merge and until all heads merged again."""
    merge, full = figures["seconds_to_next_merge_by_kind"], figures["seconds_to_full_strength_by_kind"]
    print(f"\n{'fault':22} {'number':>6}  {'next merge, s':>20}  {'full strength, s':>20}")
    for kind, number in sorted(figures["faults_by_kind"].items()):
        print(f"{kind:22} {number:>6}  {_short(merge.get(kind)):>20}  {_short(full.get(kind)):>20}")
    print()


def _short(values: dict[str, Any] | None) -> str:
    return f"{values['median']:g} (max {values['max']:g})" if values and values["number"] else "-"

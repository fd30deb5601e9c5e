"""Thousands of schedules of faults in one process, without Ray: is anything lost, merged twice, or does a run stand still?

The world is that of `tests/chaos/world.py`: real heads, coordinator, snapshots and recovery in float64; deaths, late, lost and
repeated messages, poison, checkpoints, resumes with another number of heads, heads that come and go. Every schedule is drawn
from its number, so that one that breaks something can be run again alone (`--first`).
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from typing import Any

import torch

from benchmarks.report import report
from tests.chaos.parts import MODES
from tests.chaos.traffic import CALM
from tests.chaos.world import World

FAULTS = (
    ("kill", "notice", "restart"),
    ("kill", "drop"),
    ("kill_ended",),
    ("admit",),
    ("kill_hub", "recover"),
    ("crash", "cut", "cut", "ask"),
    ("cut", "ask"),
    ("lose_answer", "repeat", "echo"),
    ("poison",),
)
"""What may go wrong, or is asked for meanwhile: kinds of events that belong together."""

LONGEST = 60
"""Events of a schedule at most, `go` counting as one."""

SHOWN = 5
"""Violations that are written out."""

Schedule = list[tuple[str, int, int]]


def drawn(number: int) -> tuple[str, Schedule]:
    """The mode and the events of schedule `number`: some kinds of faults, each time others, so that each meets all others."""
    rng = random.Random(number)
    mode = sorted(MODES)[number % len(MODES)]
    faults = [kind for group in FAULTS if rng.random() < 0.4 for kind in group]
    kinds = (*CALM, *faults * 2, *["go"] * rng.choice((4, 12, 24)))
    return mode, [(rng.choice(kinds), rng.randrange(64), rng.randint(1, 6)) for _ in range(rng.randint(5, LONGEST))]


def violation(mode: str, events: Schedule, happened: Counter[str]) -> str:
    """What a schedule broke; empty if nothing."""
    world = World(MODES[mode])
    try:
        for event in events:
            world.do(*event)
        world.settle()
    except Exception as error:  # whatever it is: no schedule may raise
        return f"{type(error).__name__}: {error}"
    finally:
        happened += world.happened
    return ""


def shortest(mode: str, events: Schedule, broken: str) -> Schedule:
    """Fewer events that break the same, by leaving out ever shorter pieces."""
    kind, piece = broken[:40], len(events)
    while piece:
        at = 0
        while at < len(events):
            fewer = events[:at] + events[at + piece :]
            if violation(mode, fewer, Counter())[:40] == kind:
                events = fewer
            else:
                at += piece
        piece //= 2
    return events


def main() -> None:
    """Runs them and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schedules", type=int, default=5000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    options = parser.parse_args()
    torch.set_num_threads(1)
    happened, modes, broken = Counter[str](), Counter[str](), list[dict[str, Any]]()
    begun = time.perf_counter()
    for number in range(options.first, options.first + options.schedules):
        mode, events = drawn(number)
        modes[mode] += 1
        found = violation(mode, events, happened)
        if found:
            print(f"schedule {number} ({mode}): {found}", file=sys.stderr)
            few = shortest(mode, events, found) if len(broken) < SHOWN else []
            broken.append({"schedule": number, "mode": mode, "what": found.splitlines()[0], "events": few})
    report(
        "chaos",
        limits={"violations": "0 schedules in which anything is lost, merged twice, or stands still"},
        met={"violations": not broken},
        figures={
            "schedules": options.schedules,
            "by_mode": dict(sorted(modes.items())),
            "events": sum(happened.values()),
            "events_by_kind": dict(happened.most_common()),
            "violations": len(broken),
            "broken": broken[:SHOWN],
            "seconds": round(time.perf_counter() - begun, 1),
        },
    )


if __name__ == "__main__":
    main()

"""Thousands of random fault schedules in one process, without Ray: is anything lost or merged twice, or does a run stop moving?

The world is that of `tests/chaos/world.py`: real heads, coordinator, snapshots and recovery in float64, with deaths, late, lost
and repeated messages, harmful contributions, checkpoints, resumes with another number of heads, and heads that join and leave.
Every schedule is drawn from its number, so that one that breaks something can be repeated alone (`--first`).
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from typing import Any

import torch

from benchmarks.report import progress, report
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
    ("drain", "move", "restart"),
)
"""Faults and requests: kinds of events that belong together."""

MAX_EVENTS = 60
"""Events of a schedule, at most."""

MAX_REPORTED = 5
"""Violations that are reported with their events."""

PROGRESS_EVERY = 100
"""Schedules between two progress lines."""

Schedule = list[tuple[str, int, int]]


def draw(number: int) -> tuple[str, Schedule]:
    """Draws the mode and the events of schedule `number`, with some kinds of faults: in time each kind meets the others."""
    rng = random.Random(number)
    mode = sorted(MODES)[number % len(MODES)]
    faults = [kind for group in FAULTS if rng.random() < 0.4 for kind in group]
    kinds = (*CALM, *faults * 2, *["go"] * rng.choice((4, 12, 24)))
    return mode, [(rng.choice(kinds), rng.randrange(64), rng.randint(1, 6)) for _ in range(rng.randint(5, MAX_EVENTS))]


def violation(mode: str, events: Schedule, happened: Counter[str]) -> str:
    """Runs a schedule, and returns what it broke, or ''."""
    world = World(MODES[mode])
    try:
        for event in events:
            world.do(*event)
        world.settle()
    except Exception as error:  # no schedule may raise anything
        return f"{type(error).__name__}: {error}"
    finally:
        happened += world.happened
    return ""


def shortest(mode: str, events: Schedule, broken: str) -> Schedule:
    """Shortens a schedule that breaks something by leaving out smaller and smaller pieces."""
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
    """Runs the schedules and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schedules", type=int, default=5000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    options = parser.parse_args()
    torch.set_num_threads(1)
    happened, modes, broken = Counter[str](), Counter[str](), list[dict[str, Any]]()
    started = time.perf_counter()
    for number in range(options.first, options.first + options.schedules):
        mode, events = draw(number)
        modes[mode] += 1
        broke = violation(mode, events, happened)
        if broke:
            print(f"schedule {number} ({mode}): {broke}", file=sys.stderr)
            few = shortest(mode, events, broke) if len(broken) < MAX_REPORTED else []
            broken.append({"schedule": number, "mode": mode, "what": broke.splitlines()[0], "events": few})
        done = number - options.first + 1
        if done % PROGRESS_EVERY == 0:
            progress(done, options.schedules, f"{sum(happened.values()):,} events, {len(broken)} violations")
    report(
        "chaos",
        limits={"violations": "0 schedules in which anything is lost, merged twice, or stops moving"},
        met={"violations": not broken},
        figures={
            "schedules": options.schedules,
            "by_mode": dict(sorted(modes.items())),
            "events": sum(happened.values()),
            "events_by_kind": dict(happened.most_common()),
            "violations": len(broken),
            "broken": broken[:MAX_REPORTED],
            "seconds": round(time.perf_counter() - started, 1),
        },
    )


if __name__ == "__main__":
    main()

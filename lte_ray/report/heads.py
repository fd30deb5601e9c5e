"""How heads have spent their time: in single merges, and in a timeline of equal slices.

Rows say when a contribution was merged, and for how long merging had kept its head from training before, but not when that was.
It mostly waits before a merge, so the timeline draws its waiting up to the merge before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lte_ray.report.clock import RunClock
from lte_ray.report.columns import RunRows
from lte_ray.report.thinning import Numbers
from lte_ray.run.newest_rows import to_number

SLICES = 480
"""Slices of time of a timeline."""

MAX_ROWS = 64
"""Heads that a timeline shows."""

LOST = ("head_lost", "head_moves", "head_dropped", "head_quarantined")
BACK = ("head_restarts", "head_added")
"""Events after which heads don't train, and after which they begin again."""

KINDS = ("training", "waiting", "merging", "starting", "dead")
"""What a row of a timeline does. "merging" is the coordinator's; "starting" is the time before a head's first contribution."""


def utilisation(rows: RunRows, seconds: Numbers, starts: Numbers) -> Numbers:
    """For each contribution, the share of the time since its head's contribution before in which merging left it training.

    NaN where there was none before in the same start of the run, or the stall isn't known.

    Args:
        seconds, starts: of the run at each merge, and the number of the start, for each row of merges.
    """
    _, _, passed, same = _since_before(rows, seconds, starts)
    stall = rows.contributions[:, 2]
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.clip(1.0 - stall / passed, 0.0, 1.0)
    share[~same | (passed <= 0)] = np.nan
    return share


def total_utilisation(rows: RunRows, seconds: Numbers, starts: Numbers) -> float:
    """The share of all heads' time between contributions in which they trained; NaN if it isn't known."""
    _, _, passed, same = _since_before(rows, seconds, starts)
    stall = rows.contributions[:, 2]
    counts = same & np.isfinite(stall) & (passed > 0)
    whole = float(passed[counts].sum())
    return 1.0 - float(np.minimum(stall[counts], passed[counts]).sum()) / whole if whole else float("nan")


def _since_before(rows: RunRows, seconds: Numbers, starts: Numbers) -> tuple[Any, Any, Numbers, Any]:
    """For each contribution: its row, its head, the seconds since its head's before, and whether that was in the same start."""
    index, head = rows.contributions[:, 0].astype(np.int64), rows.contributions[:, 1].astype(np.int64)
    order = np.lexsort((index, head))
    at, start = seconds[index][order], starts[index][order]
    same = np.zeros(len(order), dtype=bool)
    passed = np.full(len(order), np.nan)
    if len(order) > 1:
        same[1:] = (head[order][1:] == head[order][:-1]) & (start[1:] == start[:-1])
        passed[1:] = np.diff(at)
    back = np.argsort(order)
    return index, head, np.where(same, passed, np.nan)[back], same[back]


def make_timeline(
    rows: RunRows, clock: RunClock, seconds: Numbers, starts: Numbers, merge_seconds: Numbers | None
) -> dict[str, Any] | None:
    """The timeline of a run as JSON has it; None if nothing was merged or times aren't known.

    Returns:
        "end", in seconds; "rows", each with "name" and the slices' shares of each kind, in per cent; "hidden", the number of
        heads that aren't shown; "exact", whether it is known when heads waited.
    """
    if not len(rows.contributions) or clock.end <= 0 or not np.isfinite(seconds).all():
        return None
    heads = np.unique(rows.contributions[:, 1]).astype(np.int64)
    index, head, _, _ = _since_before(rows, seconds, starts)
    gone = _absences(rows.events, clock)
    shown = []
    for number in heads[:MAX_ROWS]:
        mine = head == number
        shares = _head_shares(
            seconds[index[mine]], starts[index[mine]], rows.contributions[mine, 2], gone.get(int(number), []), clock
        )
        shown.append({"name": f"head {number}", "shares": per_cent(shares)})
    if merge_seconds is not None:
        merging = np.zeros(SLICES)
        add_spans(merging, seconds - np.nan_to_num(merge_seconds), seconds, clock.end)
        shown.append({"name": "coordinator", "shares": per_cent({"merging": np.minimum(merging, 1.0)})})
    return {"end": clock.end, "rows": shown, "hidden": max(0, len(heads) - MAX_ROWS), "exact": False}


def _head_shares(
    at: Numbers, starts: Numbers, stalls: Numbers, absences: Sequence[tuple[float, float]], clock: RunClock
) -> dict[str, Numbers]:
    """The shares of each slice that a head spent with each kind."""
    begins = np.append(True, starts[1:] != starts[:-1])
    before = np.where(begins, clock.offsets[starts.astype(np.int64)], np.append(0.0, at[:-1]))
    dead, starting, waiting, training = (np.zeros(SLICES) for _ in range(4))
    add_spans(starting, before[begins], at[begins], clock.end)
    add_spans(training, before[~begins], at[~begins], clock.end)
    waits = ~begins & np.isfinite(stalls)
    previous = np.append(0.0, before[:-1])
    length = np.minimum(stalls[waits], np.maximum(before[waits] - previous[waits], at[waits] - before[waits]))
    add_spans(waiting, np.maximum(before[waits] - length, 0.0), before[waits], clock.end)
    if absences:
        add_spans(dead, np.array([a for a, _ in absences]), np.array([b for _, b in absences]), clock.end)
    dead = np.minimum(dead, 1.0)
    waiting = np.minimum(waiting, 1.0 - dead)
    starting = np.minimum(starting, 1.0 - dead - waiting)
    training = np.minimum(training, 1.0 - dead - waiting - starting)
    return {"training": training, "waiting": waiting, "starting": starting, "dead": dead}


def add_spans(slices: Numbers, begin: Numbers, end: Numbers, until: float) -> None:
    """Adds to each slice of [0, `until`] the share of it that the spans cover."""
    scale = len(slices) / until
    edges = np.arange(len(slices) + 1, dtype=np.float64)
    begins, ends = np.sort(begin * scale), np.sort(end * scale)

    def covered(points: Numbers) -> Numbers:
        """The length of [points, x) in all, for each edge x."""
        count = np.searchsorted(points, edges, side="right")
        sums = np.concatenate([[0.0], np.cumsum(points)])
        lengths: Numbers = count * edges - sums[count]
        return lengths

    slices += np.diff(covered(begins) - covered(ends))


def _absences(events: Sequence[Mapping[str, Any]], clock: RunClock) -> dict[int, list[tuple[float, float]]]:
    """By head, when it was lost and when it came back, in seconds of the run."""
    since: dict[int, float] = {}
    absences: dict[int, list[tuple[float, float]]] = {}
    for row in events:
        name, at = row.get("event"), to_number(row.get("at"))
        if at is None or (name not in LOST and name not in BACK and name != "resumed"):
            continue
        now = float(clock.seconds(np.array([at]))[0])
        named = row.get("heads", [row.get("head")])
        concerned = list(since) if name == "resumed" else named if isinstance(named, list) else []
        for head in concerned:
            if not isinstance(head, int):
                continue
            if name in LOST:
                since.setdefault(head, now)
            elif head in since:
                absences.setdefault(head, []).append((since.pop(head), now))
    for head, begin in since.items():
        absences.setdefault(head, []).append((begin, clock.end))
    return absences


def per_cent(shares: Mapping[str, Numbers]) -> dict[str, list[int]]:
    """Whole per cent; of a short death at least 1."""
    round_of = {"dead": np.ceil}
    rounded = {
        kind: round_of.get(kind, np.round)(100 * np.clip(share, 0.0, 1.0)).astype(int).tolist()
        for kind, share in shares.items()
    }
    return {kind: values for kind, values in rounded.items() if any(values)}

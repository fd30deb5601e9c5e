"""The audit as a whole: versions, contributions by their numbers, and the data (`audit.data`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lte_ray.audit.batches import check_data
from lte_ray.audit.reader import Audit, Happening, Resumed, Stand, happenings
from lte_ray.config.validation import is_integer


def audit(rows: Sequence[Mapping[str, Any]]) -> Audit:
    """Judges the rows of one run, in the order in which they are in the file.

    Asks nobody and believes only the rows.

    Returns:
        What was found; rows that lack what is needed are problems, too.
    """
    found = Audit()
    history: list[Happening] = []
    known: dict[int, tuple[int, int]] = {}  # by head, incarnation and sequence of what was merged last
    versions: list[int] = []
    for row, stays in zip(rows, _undone_after(rows), strict=True):
        try:
            for each in happenings(row):
                if isinstance(each, Stand):
                    said = known.get(each.head) == (each.incarnation, each.sequence) or each.version > stays
                    if each.steps is None and said:
                        continue  # by a row; or it was undone later, as rows of merges are then removed
                    known[each.head] = each.incarnation, each.sequence
                history.append(each)
            if row.get("kind") == "merge":
                versions.append(int(row["version"]))
        except (KeyError, TypeError, ValueError) as error:
            what = f"version {row.get('version')}" if row.get("kind") == "merge" else f"the event {row.get('event')}"
            found.problems.append(f"the row of {what} lacks what an audit needs ({type(error).__name__}: {error})")
    _check_versions(found, versions)
    flat = [each for each in history if isinstance(each, Stand)]
    found.merges, found.contributions = len(versions), sum(stand.steps is not None for stand in flat)
    _check_numbers(found, history)
    newest = {stand.head: stand for stand in flat}.values()
    found.samples, found.batches = sum(stand.samples for stand in newest), sum(stand.batches for stand in newest)
    check_data(found, history)
    found.reissued = _reissued(rows)
    return found


def _undone_after(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """For each row the version after which everything was undone later: the run went on, or back, from there."""
    found, least = [], math.inf
    for row in reversed(rows):
        found.append(least)
        if is_integer(row.get("version")):
            if row.get("event") in ("resumed", "rolled_back", "coordinator_restarts"):
                least = min(least, row["version"])
            elif row.get("kind") == "merge":
                least = min(least, row["version"] - 1)
    return found[::-1]


def _check_versions(found: Audit, versions: Sequence[int]) -> None:
    before = 0
    for version in versions:
        if version <= before:
            found.problems.append(f"version {version} comes after version {before}: it was made twice in one history")
        found.unlogged += max(0, version - before - 1)
        before = max(before, version)


def _check_numbers(found: Audit, history: Iterable[Happening]) -> None:
    """A head's contributions are numbered upward through all its processes, but from 1 where one starts with fresh factors."""
    last: dict[int, Stand] = {}
    for stand in history:
        if isinstance(stand, Resumed):
            for head in stand.anew:
                last.pop(head, None)
        if not isinstance(stand, Stand):
            continue
        before = last.get(stand.head)
        if before is not None and stand.sequence <= before.sequence and stand.incarnation <= before.incarnation:
            now, then = (f"{s.sequence} (incarnation {s.incarnation})" for s in (stand, before))
            found.problems.append(
                f"version {stand.version} merges contribution {now} of head {stand.head}, but {before.version} held {then}"
            )
        last[stand.head] = stand


def _reissued(rows: Iterable[Mapping[str, Any]]) -> int:
    merged: dict[int, int] = {}
    total = 0
    for row in rows:
        if row.get("kind") == "merge":
            merged |= {int(head): int(held.get("step", 0)) for head, held in row.get("held", {}).items()}
        elif row.get("event") in ("head_lost", "head_hung"):
            total += sum(max(0, int(row.get("step", 0)) - merged.get(head, 0)) for head in row.get("heads", []))
    return total

"""The audit as a whole: versions, contributions by their numbers, and the data (`audit.data`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lte_ray.audit.data import check_data
from lte_ray.audit.found import Audit
from lte_ray.audit.rows import Stand, stands


def audit(rows: Sequence[Mapping[str, Any]]) -> Audit:
    """Judges the rows of one run, in the order in which they are in the file.

    Asks nobody and believes only the rows.

    Returns:
        What was found; rows that lack what is needed are problems, too.
    """
    found = Audit()
    merges: list[list[Stand]] = []
    gone: dict[int, int] = {}  # by head that was dropped, the version then
    for row in rows:
        if row.get("event") in ("head_dropped", "head_quarantined"):
            version = merges[-1][0].version if merges else 0
            gone |= {int(head): version for head in row.get("heads", [row.get("head", -1)])}
        if row.get("kind") == "merge":
            try:
                merges.append(stands(row))
            except (KeyError, TypeError, ValueError) as error:
                said = f"the row of version {row.get('version')} lacks what an audit needs ({type(error).__name__}: {error})"
                found.problems.append(said)
    _check_versions(found, [each[0].version for each in merges])
    flat = [stand for each in merges for stand in each]
    found.merges, found.contributions = len(merges), len(flat)
    _check_numbers(found, flat)
    check_data(found, flat, gone)
    newest = {stand.head: stand for stand in flat}.values()
    found.samples, found.batches = sum(stand.samples for stand in newest), sum(stand.batches for stand in newest)
    found.reissued = _reissued(rows)
    return found


def _check_versions(found: Audit, versions: Sequence[int]) -> None:
    before = 0
    for version in versions:
        if version <= before:
            found.problems.append(f"version {version} comes after version {before}: it was made twice in one history")
        found.unlogged += max(0, version - before - 1)
        before = max(before, version)


def _check_numbers(found: Audit, flat: Iterable[Stand]) -> None:
    """A head's contributions are numbered upward through all its processes, but from 1 where one starts with fresh factors."""
    last: dict[int, Stand] = {}
    for stand in flat:
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

"""The audit of a run: its versions, its contributions by their numbers, and its data (`audit.batches`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lte_ray.audit.batches import check_data
from lte_ray.audit.reader import Audit, AuditEvent, HeadPosition, Resumed, parse_events
from lte_ray.config.validation import is_integer


def audit(rows: Sequence[Mapping[str, Any]]) -> Audit:
    """Audits the rows of one run, in the order of the file. The rows are the only evidence.

    Returns:
        The result. Rows that lack what the audit needs are among the problems.
    """
    result = Audit()
    history: list[AuditEvent] = []
    last_merged: dict[int, tuple[int, int]] = {}  # by head, incarnation and sequence
    versions: list[int] = []
    for row, kept_version in zip(rows, _kept_versions(rows), strict=True):
        try:
            for event in parse_events(row):
                if isinstance(event, HeadPosition):
                    known = last_merged.get(event.head) == (event.incarnation, event.sequence)
                    if event.steps is None and (known or event.version > kept_version):
                        continue  # a row of a merge has said it, or it was undone later, when rows of merges are removed
                    last_merged[event.head] = event.incarnation, event.sequence
                history.append(event)
            if row.get("event") == "data":
                result.problems.append(str(row["why"]))
            if row.get("kind") == "merge":
                versions.append(int(row["version"]))
        except (KeyError, TypeError, ValueError) as error:
            what = f"version {row.get('version')}" if row.get("kind") == "merge" else f"the event {row.get('event')}"
            result.problems.append(f"the row of {what} lacks what an audit needs ({type(error).__name__}: {error})")
    _check_versions(result, versions)
    positions = [event for event in history if isinstance(event, HeadPosition)]
    result.merges, result.contributions = len(versions), sum(position.steps is not None for position in positions)
    _check_sequences(result, history)
    newest = {position.head: position for position in positions}.values()
    result.samples, result.batches = sum(p.samples for p in newest), sum(p.batches for p in newest)
    check_data(result, history)
    result.reissued = _count_reissued(rows)
    return result


def _kept_versions(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """For each row the version after which everything was undone later, since the run was resumed or rolled back to it."""
    kept, lowest = [], math.inf
    for row in reversed(rows):
        kept.append(lowest)
        if is_integer(row.get("version")):
            if row.get("event") in ("resumed", "rolled_back", "coordinator_restarts"):
                lowest = min(lowest, row["version"])
            elif row.get("kind") == "merge":
                lowest = min(lowest, row["version"] - 1)
    return kept[::-1]


def _check_versions(result: Audit, versions: Sequence[int]) -> None:
    before = 0
    for version in versions:
        if version <= before:
            result.problems.append(f"version {version} comes after version {before}: it was made twice in one history")
        result.unlogged += max(0, version - before - 1)
        before = max(before, version)


def _check_sequences(result: Audit, history: Iterable[AuditEvent]) -> None:
    """Checks that a head's contributions are numbered upward through all its processes, and from 1 after a fresh start."""
    last: dict[int, HeadPosition] = {}
    for event in history:
        if isinstance(event, Resumed):
            for head in event.anew:
                last.pop(head, None)
        if not isinstance(event, HeadPosition):
            continue
        before = last.get(event.head)
        if before is not None and event.sequence <= before.sequence and event.incarnation <= before.incarnation:
            now, then = (f"{p.sequence} (incarnation {p.incarnation})" for p in (event, before))
            result.problems.append(
                f"version {event.version} merges contribution {now} of head {event.head}, but {before.version} held {then}"
            )
        last[event.head] = event


def _count_reissued(rows: Iterable[Mapping[str, Any]]) -> int:
    merged_steps: dict[int, int] = {}
    total = 0
    for row in rows:
        if row.get("kind") == "merge":
            merged_steps |= {int(head): int(values.get("step", 0)) for head, values in row.get("held", {}).items()}
        elif row.get("event") in ("head_lost", "head_hung"):
            step = int(row.get("step", 0))
            total += sum(max(0, step - merged_steps.get(head, 0)) for head in row.get("heads", []))
    return total

"""The input and the result of an audit: events read from the rows of ``metrics.jsonl``, and what the audit concludes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lte_ray.data.partition import Partitions, to_partitions

MAX_DESCRIBED = 20
"""Problems that are described; further ones are counted."""


@dataclass(frozen=True)
class HeadPosition:
    """The position of one head after the merge of one version (`messages.CommittedPosition`).

    `steps` are those of its contribution, or None where the row of that merge was lost with the coordinator and the next
    coordinator stated the position.
    """

    version: int
    head: int
    incarnation: int
    sequence: int
    step: int
    samples: int
    batches: int
    partitions: Partitions
    steps: int | None


@dataclass(frozen=True)
class LostHeads:
    """Heads were dropped or quarantined. From then on others have their partitions."""

    heads: tuple[int, ...]


@dataclass(frozen=True)
class Resumed:
    """The run was resumed from a checkpoint. The heads in `anew` start again; earlier heads may have had their numbers."""

    anew: tuple[int, ...]


@dataclass(frozen=True)
class Refused:
    """A contribution was refused as harmful. Its head drops what it has trained since its last merge."""

    head: int
    sequence: int


@dataclass(frozen=True)
class Rollback:
    """The run went back to `version`, and skips the batches that were merged after it."""

    version: int
    skipped: int


AuditEvent = HeadPosition | LostHeads | Resumed | Refused | Rollback
"""What rows say about which head has trained which batches."""


@dataclass
class Audit:
    """The result of an audit.

    Attributes:
        merges: merges in the file.
        unlogged: versions that aren't in the file, since their rows were lost with the driver or the coordinator. Later merges
            account for what they held.
        contributions: contributions in the merges that are in the file.
        samples, batches: what the newest version holds, of all heads.
        lost: batches that are in no merge though later ones of their partition are.
        doubled: batches that are in two merges.
        dropped: batches that are in no merge on purpose, since their contribution was refused as harmful.
        skipped: batches that are in no merge on purpose, since the run went back after a loss spike. Both count only as far as
            the rows confirm them; the others are lost.
        reissued: local steps that no merge holds since their heads' processes died. Their successors, or the heads that got
            their data, took these steps again. The driver's figures, up to a second old.
        problems: everything that is wrong, in words.
    """

    merges: int = 0
    unlogged: int = 0
    contributions: int = 0
    samples: int = 0
    batches: int = 0
    lost: int = 0
    doubled: int = 0
    dropped: int = 0
    skipped: int = 0
    reissued: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether each contribution and each batch was merged exactly once, except those left out on purpose."""
        return not (self.lost or self.doubled or self.problems)

    @property
    def described_problems(self) -> list[str]:
        """The problems, only the first of them if there are many."""
        more = len(self.problems) - MAX_DESCRIBED
        return [*self.problems[:MAX_DESCRIBED], *([f"... and {more:,} more"] if more > 0 else [])]


def read_rows(text: str | bytes) -> list[dict[str, Any]]:
    """Parses the rows of a ``metrics.jsonl``. A torn last row is left out, even if it is cut within a character.

    Raises:
        ValueError: another row can't be read.
    """
    rows = []
    lines: Sequence[str | bytes] = text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line if isinstance(line, str) else line.decode())
            if not isinstance(row, dict):
                raise TypeError(f"it is a {type(row).__name__}")
        except (TypeError, ValueError, RecursionError) as error:
            if number < len(lines):
                raise ValueError(f"row {number} can't be read: {error}") from error
            break
        rows.append(row)
    return rows


def parse_events(row: Mapping[str, Any]) -> list[AuditEvent]:
    """Returns what a row says about batches: nothing, if it is of another kind.

    Raises:
        KeyError, TypeError, ValueError: it lacks what such a row must say.
    """
    event = row.get("event")
    if row.get("kind") == "merge":
        return [*parse_positions(row)]
    if event in ("head_dropped", "head_quarantined"):
        return [LostHeads(tuple(map(int, row["heads"] if "heads" in row else [row["head"]])))]
    if event == "coordinator_restarts":  # an older release didn't state positions there
        positions = [_position(head, values, int(values["version"]), None) for head, values in row.get("held", {}).items()]
        return [*sorted(positions, key=lambda position: (position.version, position.head))]
    if event == "resumed":
        return [Resumed(tuple(map(int, row["anew"])))]
    if event == "refused" and row.get("poison"):
        return [Refused(int(row["head"]), int(row["sequence"]))]
    if event == "rolled_back":
        return [Rollback(int(row["version"]), int(row["skipped_batches"]))]
    return []


def parse_positions(row: Mapping[str, Any]) -> list[HeadPosition]:
    """Returns the positions of the heads in a row of kind "merge".

    Raises:
        KeyError, TypeError, ValueError: it lacks them.
    """
    version, held = int(row["version"]), row["held"]
    if not row["heads"] or {str(head) for head in row["heads"]} != set(held):
        raise ValueError(f"version {version} merges heads {row['heads']}, but says where it left heads {sorted(held)}")
    return [_position(head, values, version, int(row["head_steps"][head])) for head, values in held.items()]


def _position(head: str, values: Mapping[str, Any], version: int, steps: int | None) -> HeadPosition:
    return HeadPosition(
        version=version,
        head=int(head),
        incarnation=int(values["incarnation"]),
        sequence=int(values["sequence"]),
        step=int(values["step"]),
        samples=int(values["samples"]),
        batches=int(values["batches"]),
        partitions=to_partitions(values["lanes"]),
        steps=steps,
    )

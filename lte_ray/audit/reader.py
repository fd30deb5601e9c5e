"""Rows of ``metrics.jsonl``, read for an audit.

The result of an audit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lte_ray.data.partition import Partitions, to_partitions


@dataclass(frozen=True)
class Stand:
    """Where the merge of one version left one head (`messages.CommittedPosition`); `steps` are those of its contribution.

    None where the row of that merge died with the coordinator: the next one said where it had left the head.
    """

    version: int
    head: int
    incarnation: int
    sequence: int
    step: int
    samples: int
    batches: int
    lanes: Partitions
    steps: int | None


@dataclass(frozen=True)
class LostHead:
    """Heads that were dropped or quarantined: others have their lanes from then on."""

    heads: tuple[int, ...]


@dataclass(frozen=True)
class Resumed:
    """The run goes on from a checkpoint. These heads begin anew, though others may have had their numbers before."""

    anew: tuple[int, ...]


@dataclass(frozen=True)
class Refused:
    """A contribution that was refused as poison: its head drops what it has trained since its last merge."""

    head: int
    sequence: int


@dataclass(frozen=True)
class Rollback:
    """The run went back to `version`, and skips the batches that were merged after it."""

    version: int
    skipped: int


Happening = Stand | LostHead | Resumed | Refused | Rollback
"""What rows say that bears on who has trained which batches."""


def read_rows(text: str | bytes) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; the last one is left out if it is torn, wherever a character of it was cut.

    Raises:
        ValueError: another one can't be read.
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


def happenings(row: Mapping[str, Any]) -> list[Happening]:
    """What a row says of batches; nothing if it is of another kind.

    Raises:
        KeyError, TypeError, ValueError: it lacks what such a row must say.
    """
    event = row.get("event")
    if row.get("kind") == "merge":
        return [*stands(row)]
    if event in ("head_dropped", "head_quarantined"):
        return [LostHead(tuple(map(int, row["heads"] if "heads" in row else [row["head"]])))]
    if event == "coordinator_restarts":  # an older release didn't say
        found = [_stand(head, of, int(of["version"]), None) for head, of in row.get("held", {}).items()]
        return [*sorted(found, key=lambda stand: (stand.version, stand.head))]
    if event == "resumed":
        return [Resumed(tuple(map(int, row["anew"])))]
    if event == "refused" and row.get("poison"):
        return [Refused(int(row["head"]), int(row["sequence"]))]
    if event == "rolled_back":
        return [Rollback(int(row["version"]), int(row["skipped_batches"]))]
    return []


def stands(row: Mapping[str, Any]) -> list[Stand]:
    """Where a row of kind "merge" says that its heads are left.

    Raises:
        KeyError, TypeError, ValueError: it doesn't say.
    """
    version, held = int(row["version"]), row["held"]
    if not row["heads"] or {str(head) for head in row["heads"]} != set(held):
        raise ValueError(f"version {version} merges heads {row['heads']}, but says where it left heads {sorted(held)}")
    return [_stand(head, of, version, int(row["head_steps"][head])) for head, of in held.items()]


def _stand(head: str, of: Mapping[str, Any], version: int, steps: int | None) -> Stand:
    return Stand(
        version=version,
        head=int(head),
        incarnation=int(of["incarnation"]),
        sequence=int(of["sequence"]),
        step=int(of["step"]),
        samples=int(of["samples"]),
        batches=int(of["batches"]),
        lanes=to_partitions(of["lanes"]),
        steps=steps,
    )


MOST_SAID = 20
"""Problems that are described; of more only the number is given."""


@dataclass
class Audit:
    """What the rows of a run's merges say.

    Attributes:
        merges: how many are in the file, and `unlogged` versions that aren't: their rows were lost with the driver or the
            coordinator; what they held is judged by the merges after them.
        contributions: in the merges that are in the file.
        samples, batches: that the newest version holds, of all heads.
        lost, doubled: batches that are in no merge though later ones of their lane are, and batches that are in two.
        dropped, skipped: batches that are in no merge on purpose: their contribution was refused as poison, and the run went
            back after a loss spike. Only as far as the rows bear it out; what they don't is lost.
        reissued: local steps that heads had taken when their processes were lost, and that no merge holds: their
            successors, or who got their data, took them again. As the driver saw them, up to a second before.
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
        """Whether each contribution and each batch was merged exactly once, but for what was left out on purpose."""
        return not (self.lost or self.doubled or self.problems)

    @property
    def described_problems(self) -> list[str]:
        """The problems, the first of them if there are many."""
        more = len(self.problems) - MOST_SAID
        return [*self.problems[:MOST_SAID], *([f"... and {more:,} more"] if more > 0 else [])]

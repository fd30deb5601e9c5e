"""The result of an audit."""

from __future__ import annotations

from dataclasses import dataclass, field

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
    def said(self) -> list[str]:
        """The problems, the first of them if there are many."""
        more = len(self.problems) - MOST_SAID
        return [*self.problems[:MOST_SAID], *([f"... and {more:,} more"] if more > 0 else [])]

"""What a sink is, and what it is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

Status = Literal["finished", "failed", "interrupted"]
"""How a run ended."""


@dataclass(frozen=True)
class RunInfo:
    """The run that a sink is told about.

    Attributes:
        name: of the run.
        id: stays the same when the run is resumed, and is another one when it is replaced (``--overwrite``).
        path: the run directory, as people write it.
        folder: a folder of the sink's own, which exists. In a run directory on a local disk it is there; otherwise it is a
            temporary folder that is copied there while the run goes on.
        resumed: whether the run continues from a checkpoint.
        step, version: where it starts: 0, or those of that checkpoint. Rows of later versions come again.
        config: all settings, as in ``run.toml``: without secrets.
        environment: versions, git commit, host and command line, as in ``environment.json``.
    """

    name: str
    id: str
    path: str
    folder: Path = Path()
    resumed: bool = False
    step: int = 0
    version: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LogRow:
    """One row of ``metrics.jsonl`` with the names that figures have in sinks.

    Attributes:
        kind: "merge", "evaluation" or "event"; "rewind" if the run goes back to an earlier version: what was logged after
            `step` doesn't count any more, and comes again.
        step: local steps, the x axis: the furthest that a merged head had reached. An event has that of the last merge.
        samples: what all heads had trained up to there, together.
        version: of the base.
        at: Unix time in seconds.
        figures: finite numbers by name, such as ``train/loss`` and ``eval/accuracy``. An event has none.
        text: an event in words; empty for other kinds.
        raw: the row of ``metrics.jsonl``.
    """

    kind: str
    step: int
    samples: int
    version: int
    at: float
    figures: Mapping[str, float] = field(default_factory=dict)
    text: str = ""
    raw: Mapping[str, Any] = field(default_factory=dict)


class Sink(Protocol):
    """Receives the figures of a run. All three methods are called in the driver, in one thread of the sink's own.

    What a method raises is reported once and never ends the run. A sink whose `open` raises gets nothing more; one whose `row`
    raises gets the next row.
    """

    def open(self, run: RunInfo) -> None:
        """The run begins, or continues."""

    def row(self, row: LogRow) -> None:
        """A row was added to ``metrics.jsonl``."""

    def close(self, status: Status) -> None:
        """The run has ended, and no row follows. The run waits for this for a limited time."""

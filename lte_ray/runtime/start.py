"""From what the merging side of a run starts: version 0, a checkpoint, or what the heads know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lte_ray.engine.recovery import Recovered
from lte_ray.messages import Standing
from lte_ray.runtime.transport import Handle


@dataclass(frozen=True)
class Start:
    """A version of the base, and all that belongs to it.

    Attributes:
        version: of the base.
        base: the whole, flat.
        references: the factors that it holds of each head, flat; none where B' = 0.
        standings: what it holds of each head; empty: nothing.
        ledger: whose which batches are (`engine.ledger`); empty at the start.
        taken, granted: local steps that heads have taken, and up to which they may.
        saved: the newest complete checkpoint, whose policy state is used.
        exact: heads that go on exactly from their states in it.
        states: heads whose states it holds.
        guard: what the guard has seen.
        members: the heads of the run, where some have left it or come to it since its start.
        epoch: how many coordinators there were before.
    """

    version: int
    base: Handle
    references: Mapping[int, Handle] = field(default_factory=dict)
    standings: Mapping[int, Standing] = field(default_factory=dict)
    ledger: Mapping[str, Any] = field(default_factory=dict)
    taken: Mapping[int, int] = field(default_factory=dict)
    granted: Mapping[int, int] = field(default_factory=dict)
    saved: int | None = None
    exact: frozenset[int] = frozenset()
    states: frozenset[int] = frozenset()
    guard: Mapping[str, Any] = field(default_factory=dict)
    members: frozenset[int] | None = None
    epoch: int = 0

    def standing(self, head: int) -> Standing:
        """What it holds of a head; nothing if it doesn't know of it."""
        return self.standings.get(head, Standing())

    @classmethod
    def after(cls, found: Recovered, references: Mapping[int, Handle], **more: Any) -> Start:
        """What the heads know, with the factors of those that are alive and of others (`references`)."""
        return cls(
            version=found.version,
            base=found.base,
            references=references,
            standings=found.held,
            ledger=found.ledger,
            taken={head: held.step for head, held in found.held.items()},
            granted=found.granted,
            **more,
        )

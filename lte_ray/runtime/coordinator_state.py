"""From what the merging side of a run starts: version 0, a checkpoint, or what the heads know.

From a checkpoint to where a run starts: with the same heads exactly where they were, or with more or fewer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from lte_ray import checkpoint
from lte_ray.config.validation import is_integer
from lte_ray.data.assignment import PartitionAssignor
from lte_ray.data.partition import advance
from lte_ray.data.partition import initial_partitions as first_lanes
from lte_ray.engine.coordinator.recovery import Recovered
from lte_ray.engine.prepare import Initial
from lte_ray.errors import StorageError
from lte_ray.messages import CommittedPosition
from lte_ray.runtime.context import RunContext
from lte_ray.runtime.object_store import Handle


@dataclass(frozen=True)
class CoordinatorState:
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
    positions: Mapping[int, CommittedPosition] = field(default_factory=dict)
    assignments: Mapping[str, Any] = field(default_factory=dict)
    steps_taken: Mapping[int, int] = field(default_factory=dict)
    step_limits: Mapping[int, int] = field(default_factory=dict)
    checkpoint_version: int | None = None
    exact_heads: frozenset[int] = frozenset()
    saved_heads: frozenset[int] = frozenset()
    outlier_filter: Mapping[str, Any] = field(default_factory=dict)
    members: frozenset[int] | None = None
    epoch: int = 0

    def position(self, head: int) -> CommittedPosition:
        """What it holds of a head; nothing if it doesn't know of it."""
        return self.positions.get(head, CommittedPosition())

    @classmethod
    def from_recovered(cls, found: Recovered, references: Mapping[int, Handle], **more: Any) -> CoordinatorState:
        """What the heads know, with the factors of those that are alive and of others (`references`)."""
        return cls(
            version=found.version,
            base=found.base,
            references=references,
            positions=found.positions,
            assignments=found.assignment_state,
            steps_taken={head: held.step for head, held in found.positions.items()},
            step_limits=found.granted,
            **more,
        )


def load_checkpoint(context: RunContext, initial: Initial, version: int, num_heads: int) -> CoordinatorState:
    """The start from the checkpoint of that version.

    With another number of heads than it was written with, the data is dealt out anew, from what was merged on. Heads that are
    still there go on from their merged factors and their optimizers' states; those that are new start with B = 0; what those
    that are gone have contributed stays in the base. All count as having taken as many steps.

    Raises:
        StorageError: it is damaged.
    """
    directory = context.directory
    manifest = checkpoint.read_manifest(directory, version)
    states = {head: checkpoint.read_head(directory, manifest, head)[1] for head in manifest.heads}
    try:
        before = int(manifest.facts["lte"]["num_heads"])
        standings = _standings(manifest, states, before)
        stepped = {head: int(state["step"]) for head, state in states.items()}
        ledger = dict(manifest.facts.get("ledger") or PartitionAssignor({h: s.lanes for h, s in standings.items()}).state())
        PartitionAssignor.from_state(ledger)  # so that what is wrong with it is said here
        guard = dict(manifest.facts.get("guard") or {})
        same = set(standings) == set(range(num_heads))
        if not same:
            ledger = PartitionAssignor.repartitioned(ledger, num_heads).state()
            mean = round(sum(held.step for held in standings.values()) / max(1, len(standings)))
            standings = {h: _at(standings.get(h), mean, version) for h in range(num_heads)}
    except (KeyError, ValueError, TypeError, AttributeError) as error:  # whoever wrote it, it isn't what a run writes
        where = directory.path_to(checkpoint.version_folder(version))
        raise StorageError(f"{where} can't be continued: {type(error).__name__}: {error}.") from error
    base = checkpoint.read_base(directory, manifest, initial.plan)
    factors = checkpoint.read_references(directory, manifest, initial.plans)
    references = {h: f for h, f in factors.items() if h in standings and standings[h].sequence}  # not of one before a new head
    exact = frozenset(states) if same else frozenset()
    return CoordinatorState(
        version=version,
        base=context.transport.publish(base),
        references={head: context.transport.publish(factors) for head, factors in references.items()},
        positions=standings,
        assignments=ledger,
        steps_taken={head: stepped[head] if head in exact else held.step for head, held in standings.items()},
        checkpoint_version=version,
        exact_heads=exact,
        saved_heads=frozenset(head for head in states if head in standings),
        outlier_filter=guard,
    )


def _standings(manifest: checkpoint.Manifest, states: dict[int, dict[str, Any]], before: int) -> dict[int, CommittedPosition]:
    """What the base holds of each head. An older release noted it in the heads' states alone."""
    noted = manifest.facts.get("standings")
    if noted is not None:
        return {int(head): _standing(held) for head, held in noted.items()}
    found = {}
    for head, meta in states.items():
        batches = meta.get("batches", meta["step"])
        step, samples = meta["since"]
        lanes = advance(first_lanes(head, before), batches)
        found[head] = CommittedPosition(0, meta["sequence"], manifest.version, step, samples, batches, lanes)
    return found


def _standing(noted: dict[str, Any]) -> CommittedPosition:
    """As a manifest notes it. Raises KeyError, ValueError or TypeError if that isn't what a run writes."""
    held = CommittedPosition(**{**noted, "lanes": tuple((n, s) for n, s in noted["lanes"])})
    numbers = {f.name: getattr(held, f.name) for f in fields(held) if f.name != "lanes"}
    wrong = {name: number for name, number in numbers.items() if not is_integer(number) or number < 0}
    if wrong:
        raise ValueError(f"the standing of a head has {wrong!r:.80}")
    return held


def _at(held: CommittedPosition | None, step: int, version: int) -> CommittedPosition:
    return CommittedPosition(step=step, version=version) if held is None else replace(held, step=step)

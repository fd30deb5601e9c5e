"""Checkpoints of the chaos world while they are made: what `runtime.coordinator.checkpointing` does, as values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lte_ray.engine.coordinator.coordinator import Coordinator
from lte_ray.engine.settings import Settings
from lte_ray.messages import CheckpointRequest
from lte_ray.runtime.coordinator_state import CoordinatorState
from tests.chaos.account import Account
from tests.chaos.parts import Disk, StoredCheckpoint, through_json

MAX_OPEN = 3
"""As `runtime.coordinator.checkpointing.MAX_OPEN`."""


class ChaosCheckpoints:
    """The part of `ChaosCoordinator` that makes checkpoints."""

    settings: Settings
    start: CoordinatorState
    account: Account
    disk: Disk
    engine: Coordinator
    reachable_heads: set[int]
    checkpoints: dict[int, StoredCheckpoint]
    newest: int | None
    heads_saved: frozenset[int]
    begins_at_next_merge: bool

    def begin_checkpoint(self) -> None:
        """Begins a checkpoint of the newest version; `CheckpointManager.begin_checkpoint`."""
        engine, self.begins_at_next_merge = self.engine, False
        request = CheckpointRequest(
            engine.version, {h: engine.positions[h].sequence for h in sorted(self.reachable_heads & engine.members)}
        )
        facts = {"lte": {"num_heads": self.settings.lte.num_heads}, **engine.checkpoint_facts()}
        base, references = engine.base_weights.read(lambda newest: (newest.base.clone(), _cloned(newest.references)))
        self.checkpoints[request.version] = StoredCheckpoint(
            request.version,
            through_json(facts),
            base,
            references,
            self.momentum(),
            _cloned(engine.policy_state()),
            self.account.copy(),
            request,
            set(request.sequences),
        )

    def momentum(self) -> Tensor | None:
        """Returns a copy of the newest version's momentum."""
        return self.engine.base_weights.read(lambda newest: None if newest.momentum is None else newest.momentum.clone())

    @property
    def may_begin(self) -> bool:
        """Whether a checkpoint may be begun now."""
        return (
            self.engine.version not in (*self.checkpoints, self.newest, self.start.version) and len(self.checkpoints) < MAX_OPEN
        )

    def freeze(self) -> None:
        """The run ends: nothing more is merged, and the last version is saved; `CoordinatorActor.freeze`."""
        complete = self.newest == self.engine.version and self.heads_saved >= self.reachable_heads
        if self.engine.version > self.start.version and not complete and self.engine.version not in self.checkpoints:
            self.begin_checkpoint()

    def add_part(self, version: int, head: int, part: Any) -> None:
        """A head's part of a checkpoint has arrived, or won't; `CheckpointManager.add_part`."""
        stored = self.checkpoints.get(version)
        if stored is None or head not in stored.missing:
            return
        stored.missing.discard(head)
        if part is not None:
            stored.parts[head] = part
        self.commit(version)

    def commit(self, version: int) -> None:
        """Commits a complete checkpoint; `CheckpointManager._commit_if_complete`."""
        stored = self.checkpoints.get(version)
        if stored is None or stored.missing or not stored.base_written:
            return
        self.disk.commit(stored)
        if self.newest is None or version > self.newest:
            self.newest, self.heads_saved = version, frozenset(stored.parts)
        del self.checkpoints[version]
        for older in [v for v in self.checkpoints if v < version and self.checkpoints[v].missing]:
            del self.checkpoints[older]


def _cloned(tensors: Mapping[Any, Tensor | None]) -> dict[Any, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}

"""Checkpoints of the chaos world while they are made: what `runtime.records` and `runtime.cuts` do, as values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lte_ray.engine.coordinator.coordinator import Coordinator
from lte_ray.engine.settings import Settings
from lte_ray.messages import CheckpointRequest
from lte_ray.runtime.coordinator_state import CoordinatorState
from tests.chaos.account import Account
from tests.chaos.parts import Disk, Kept, as_json

MOST_OPEN = 3
"""As `runtime.cuts.MOST_OPEN`."""


class Cuts:
    """The part of a coordinator's process that makes checkpoints (`Hub`)."""

    settings: Settings
    start: CoordinatorState
    account: Account
    disk: Disk
    engine: Coordinator
    present: set[int]
    cuts: dict[int, Kept]
    saved: int | None
    states: frozenset[int]
    cuts_next: bool

    def cut(self) -> None:
        """Begins a checkpoint of the newest version; `CheckpointManager.begin`."""
        engine, self.cuts_next = self.engine, False
        save = CheckpointRequest(
            engine.version, {h: engine.positions[h].sequence for h in sorted(self.present & engine.members)}
        )
        facts = {"lte": {"num_heads": self.settings.lte.num_heads}, **engine.checkpoint_facts()}
        base, held = engine.base_weights.read(lambda version, base, held: (base.clone(), _cloned(held)))
        policy = _cloned(engine.policy_state())
        heads = set(save.sequences)
        self.cuts[save.version] = Kept(
            save.version, as_json(facts), base, held, policy, self.account.copy(), save, set(heads), heads
        )

    @property
    def may_cut(self) -> bool:
        """Whether a checkpoint may be begun now."""
        return self.engine.version not in (*self.cuts, self.saved, self.start.version) and len(self.cuts) < MOST_OPEN

    def freeze(self) -> None:
        """The run ends: nothing is merged any more, and the last version is saved; `CoordinatorActor.freeze`."""
        there = self.saved == self.engine.version and self.states >= self.present
        if self.engine.version > self.start.version and not there and self.engine.version not in self.cuts:
            self.cut()

    def add(self, version: int, head: int, part: Any) -> None:
        """A head's part of a checkpoint has come, or won't; `CheckpointManager.add`."""
        kept = self.cuts.get(version)
        if kept is None or head not in kept.missing:
            return
        kept.missing.discard(head)
        if part is not None:
            kept.parts[head] = part
        self.commit(version)

    def commit(self, version: int) -> None:
        """`CheckpointManager._commit`."""
        kept = self.cuts.get(version)
        if kept is None or kept.missing or not kept.own:
            return
        self.disk.commit(kept)
        if self.saved is None or version > self.saved:
            self.saved, self.states = version, frozenset(kept.parts)
        del self.cuts[version]
        for older in [v for v in self.cuts if v < version and self.cuts[v].missing]:
            del self.cuts[older]


def _cloned(tensors: Mapping[Any, Tensor | None]) -> dict[Any, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}

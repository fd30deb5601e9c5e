"""Parts of the chaos world: a tiny worker that records its batches, settings of runs, calls, and stored checkpoints."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.data import Shard
from lte_ray.engine.settings import Settings
from lte_ray.messages import CheckpointRequest, CoordinatorReply

MOST_HEADS = 5
"""Heads up to which a world grows."""


class LinearFit:
    """Learns a linear map. Batch g depends on its slot g only. `trained` lists the slots whose loss was computed."""

    def __init__(self) -> None:
        self.trained: list[int] = []

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 2)).double()

    def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor, int]]:
        for slot in shard.slots():
            inputs = torch.sin((slot + 1) * torch.tensor([[1.3, 2.1, 0.7]], dtype=torch.float64))
            yield inputs, torch.cos(inputs[:, :2] + inputs[:, 2:]), slot

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor, int]) -> Tensor:
        inputs, targets, slot = batch
        self.trained.append(slot)
        return F.mse_loss(model(inputs), targets)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {}

    def build_optimizer(self, params: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.02, momentum=0.5)


@dataclass(frozen=True)
class Mode:
    """How a world merges.

    `cached`: replies describe a version as the first reply with that version did. `redo`: heads know the momentum of outer
    steps, as those do that redo merges.
    """

    when: str = "barrier"
    wait: bool = True
    policy: str = "average"
    heads: int = 3
    steps: int = 6
    merge_iter: int = 2
    quorum: int = 0
    reset: str = "none"
    rejoin: str = "merged"
    cached: bool = True
    redo: bool = False
    max_lag: int = 1

    def settings(self, heads: int | None = None) -> Settings:
        heads = heads or self.heads
        merge = MergeConfig(
            self.merge_iter,
            policy=self.policy,
            when=self.when,  # type: ignore[arg-type]
            quorum=min(self.quorum, heads),
            wait=self.wait,
            max_lag=self.max_lag,
        )
        lte = LTEConfig(num_heads=heads, lora_r=1, lora_alpha=2.0, reset=self.reset)  # type: ignore[arg-type]
        return Settings("chaos", lte, merge, TrainConfig(steps=self.steps, seed=1))


MODES = {
    "barrier": Mode(),
    "barrier momentum": Mode(policy="momentum", cached=False),
    "barrier momentum redone": Mode(policy="momentum", redo=True),
    "barrier reset": Mode(reset="B", heads=2),
    "barrier fresh": Mode(rejoin="fresh"),
    "quorum": Mode(when="quorum", quorum=2),
    "quorum no-wait": Mode(when="quorum", quorum=2, wait=False, cached=False),
    "arrival": Mode(when="arrival", cached=False),
    "arrival no-wait": Mode(when="arrival", wait=False),
    "arrival momentum no-wait": Mode(when="arrival", policy="momentum", wait=False, heads=2),
}


@dataclass(eq=False)
class Call:
    """A call of a head's process, made again until it is answered.

    Attributes:
        process: the caller.
        kind: submit, newer, join, leave or saved; `payload` is its argument.
        place: "wire": on its way to the coordinator; "held": the coordinator has it.
        answers: replies on their way back, with their coordinators' epochs.
    """

    process: Any
    kind: str
    payload: Any = None
    place: str = "wire"
    answers: list[tuple[int, CoordinatorReply]] = field(default_factory=list)


@dataclass
class HeadPart:
    """A head's part of a checkpoint, and what it contains beyond that version, by the account."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    unmerged: Tensor
    slots: list[tuple[int, bool]]


@dataclass
class StoredCheckpoint:
    """A checkpoint, as values.

    `missing` are the heads whose parts aren't there yet; `asked_in_reply` and `asked_by_driver` as in `CheckpointManager`.
    `account` is a copy from when it was begun.
    """

    version: int
    facts: dict[str, Any]
    base: Tensor
    references: dict[int, Tensor]
    momentum: Tensor | None
    policy: dict[str, Tensor]
    account: Any
    request: CheckpointRequest
    missing: set[int]
    base_written: bool = False
    asked_in_reply: set[int] = field(default_factory=set)
    asked_by_driver: set[int] = field(default_factory=set)
    parts: dict[int, HeadPart] = field(default_factory=dict)

    @property
    def heads(self) -> tuple[int, ...]:
        """The heads whose states it contains."""
        return tuple(sorted(self.parts))


class Disk:
    """Complete checkpoints by version; replaces `lte_ray.checkpoint` for `runtime.coordinator_state`."""

    def __init__(self) -> None:
        self.checkpoints: dict[int, StoredCheckpoint] = {}

    def commit(self, stored: StoredCheckpoint) -> None:
        self.checkpoints[stored.version] = stored

    def read_manifest(self, directory: Any, version: int) -> StoredCheckpoint:
        return self.checkpoints[version]

    def read_head(self, directory: Any, stored: StoredCheckpoint, head: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        part = stored.parts[head]
        return {name: t.clone() for name, t in part.tensors.items()}, json.loads(json.dumps(part.meta))

    def read_base(self, directory: Any, stored: StoredCheckpoint, plan: Any) -> Tensor:
        return stored.base.clone()

    def read_references(self, directory: Any, stored: StoredCheckpoint, *shape: Any) -> dict[int, Tensor]:
        return {head: factors.clone() for head, factors in stored.references.items()}

    def read_momentum(self, directory: Any, stored: StoredCheckpoint, *of_run: Any) -> Tensor | None:
        return None if stored.momentum is None else stored.momentum.clone()

    def read_residual(self, directory: Any, stored: StoredCheckpoint, plan: Any) -> None:
        """These runs send whole bases or factors, so nothing is rounded away."""

    def read_policy(self, directory: Any, stored: StoredCheckpoint, name: str) -> dict[str, Tensor]:
        return stored.policy

    def version_folder(self, version: int) -> str:
        return f"{version:06d}"


class LocalTransport:
    """A transport within one process: handles are copies."""

    def publish(self, buffer: Tensor) -> Tensor:
        return buffer.detach().clone()

    def fetch(self, handle: Tensor) -> Tensor:
        return handle

    def path_to(self, name: str) -> str:
        """Where something is, for errors; so that it can replace a run directory."""
        return name


def through_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the value as JSON preserves it."""
    loaded: dict[str, Any] = json.loads(json.dumps(value))
    return loaded


def copy_reply(reply: CoordinatorReply) -> CoordinatorReply:
    """Returns a reply as another process gets it: later changes of its contents don't reach it."""
    return copy.deepcopy(reply)

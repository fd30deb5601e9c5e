"""The chaos world's account of what was trained and merged: dense, in float64, from the changes of heads' weights.

It knows no references and no factors. A contribution adds the change of s B A and of the replicas that its head's steps made
since the contribution before it, as measured during the steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lte_ray.data.assignment import PartitionAssignor
from lte_ray.engine.head.head import Head
from lte_ray.merging.flat_buffer import views
from lte_ray.messages import CommittedPosition, MergeRecord

TOLERANCE = 1e-11
"""Of numbers around 1 to 10 that some hundred operations in float64 made."""


class InvariantBroken(AssertionError):
    """An invariant doesn't hold."""


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    """Raises InvariantBroken unless they are equal up to the rounding of float64."""
    error = float((actual - expected).abs().max())
    if not error <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise InvariantBroken(f"{what}: off by {error:.3g}\n{actual}\n{expected}")


def trained_weights(head: Head) -> Tensor:
    """Returns s B A of each layer and the replicas, flat in the base layout."""
    plan, flat = head.plan, torch.zeros(head.plan.base.size, dtype=torch.float64)
    into = views(plan.base, flat)
    with torch.no_grad():
        for spec in plan.adapted:
            into[spec.name].copy_(spec.scaling * head.state.factors[spec.b_name] @ head.state.factors[spec.a_name])
        for name, value in head.state.replicas.items():
            into[name].copy_(value)
    return flat


def effective_weights(head: Head) -> Tensor:
    """Returns the weights that the model computes with, from its outputs: W from those for unit vectors, b from that for 0."""
    with torch.no_grad():
        bias = head.model(torch.zeros(1, 3, dtype=torch.float64))
        weight = (head.model(torch.eye(3, dtype=torch.float64)) - bias).t()
    return torch.cat([weight.reshape(-1), bias.reshape(-1)])


@dataclass(eq=False)
class Track:
    """What one process of a head has trained, and where its contributions were made.

    Attributes:
        total: the change of the weights by all its steps.
        slots: the batches it took, and whether their progress was dropped as poison.
        at: by the number of a contribution, `total` and the number of slots then.
    """

    total: Tensor
    slots: list[tuple[int, bool]]
    at: dict[int, tuple[Tensor, int]] = field(default_factory=dict)

    def step(self, change: Tensor, slots: Iterable[int]) -> None:
        self.total = self.total + change
        self.slots += [(slot, False) for slot in slots]

    def record_contribution(self, sequence: int) -> None:
        self.at[sequence] = (self.total, len(self.slots))

    def unmerged(self, sequence: int) -> tuple[Tensor, list[tuple[int, bool]]]:
        """Returns what is neither in the contribution of that number nor in those before."""
        total, slots = self.at[sequence]
        return self.total - total, self.slots[slots:]

    def drop(self, sequence: int) -> None:
        """What was trained since that contribution is poison."""
        total, slots = self.at[sequence]
        self.total = total
        self.slots[slots:] = [(slot, True) for slot, _ in self.slots[slots:]]


@dataclass
class Account:
    """The surviving history: weights and what they hold, by version.

    Attributes:
        weights: by version, flat in the base layout.
        held: by version and head, the process of its last merged contribution, and the contribution's number.
        keys: by version, what was merged into it: processes, and the numbers of their contributions.
        merged, dropped: by slot, the version whose merge contains it, or skips it as poison.
        momentum: by version, that of the outer steps, as `weights`; a version without it has none.
    """

    weights: dict[int, Tensor]
    held: dict[int, dict[int, tuple[Track | None, int]]]
    keys: dict[int, list[tuple[Track, int]]] = field(default_factory=dict)
    merged: dict[int, int] = field(default_factory=dict)
    dropped: dict[int, int] = field(default_factory=dict)
    momentum: dict[int, Tensor] = field(default_factory=dict)

    def copy(self) -> Account:
        """Returns a copy."""
        of_version = (dict(self.weights), {v: dict(held) for v, held in self.held.items()}, dict(self.keys))
        return Account(*of_version, dict(self.merged), dict(self.dropped), dict(self.momentum))

    def merge(self, record: MergeRecord, tracks: Mapping[int, Track], members: int) -> None:
        """Records a version that contains the contributions in `record.positions`; `tracks` are those of their processes."""
        version, before = record.version, self.held[record.version - 1]
        if version in self.weights:
            raise InvariantBroken(f"version {version} was made twice")
        total, held = torch.zeros_like(self.weights[version - 1]), dict(before)
        for head in record.heads:
            position, track = record.positions[head], tracks[head]
            self._once(track, position, head)
            start, end = self.start(head, track, version - 1), track.at[position.sequence]
            total += (end[0] - start[0]) / members
            held[head] = (track, position.sequence)
            for slot, poison in track.slots[start[1] : end[1]]:
                if slot in self.merged or slot in self.dropped:
                    raise InvariantBroken(f"batch {slot} of head {head} is merged twice: {self.merged.get(slot)} and {version}")
                (self.dropped if poison else self.merged)[slot] = version
            self.keys.setdefault(version, []).append((track, position.sequence))
            if abs(record.weights[head] - 1 / members) > 0:
                raise InvariantBroken(f"head {head} counts {record.weights[head]} in a run of {members}")
        if record.outer_step is not None:
            step = record.outer_step.factors
            before_it = self.momentum.get(version - 1, torch.zeros_like(total))
            self.momentum[version] = step.keep * before_it + step.add * total
            total = step.change * total + step.momentum * self.momentum[version]
        self.weights[version], self.held[version] = self.weights[version - 1] + total, held

    def start(self, head: int, track: Track, version: int) -> tuple[Tensor, int]:
        """Returns where a version has a process: at its last merged contribution; at its start if that is another process's."""
        of, sequence = self.held[version].get(head, (None, 0))
        return track.at[sequence] if of is track else (torch.zeros_like(track.total), 0)

    def _once(self, track: Track, position: CommittedPosition, head: int) -> None:
        if any(of is track and number == position.sequence for keys in self.keys.values() for of, number in keys):
            raise InvariantBroken(f"contribution {position.incarnation}.{position.sequence} of head {head} is merged twice")

    def rollback(self, version: int, keeps_momentum: bool) -> None:
        """The run continues from that version: later ones are void, and perhaps its momentum is lost."""
        if version not in self.weights:
            raise InvariantBroken(f"version {version} never was")
        for of_version in (self.weights, self.held, self.keys, self.momentum):
            for newer in [v for v in of_version if v > version]:
                del of_version[newer]
        for slots in (self.merged, self.dropped):
            for slot in [slot for slot, at in slots.items() if at > version]:
                del slots[slot]
        if not keeps_momentum:
            self.momentum.pop(version, None)

    def check_slots(self, ledger: PartitionAssignor) -> None:
        """Checks that each batch is merged, dropped as poison, or owned: exactly one of these."""
        gone = self.merged.keys() | self.dropped.keys()
        ledger.validate()
        owned = [*ledger.unassigned, *(p for partitions in ledger.owners().values() for p in partitions)]
        for slot in range(max(gone, default=0) + 40):
            inside = any(slot >= n and (slot - n) % s == 0 for n, s in owned)
            if inside == (slot in gone):
                raise InvariantBroken(
                    f"batch {slot} is {'still owned though merged' if inside else 'neither merged nor owned'}"
                )

"""The tensors of merging: the base, and the changes that merges add to it.

The coordinator decides by numbers. The tensors are in its own process (`LocalTensors`), or spread over coordinator shards
(`BaseShard`), and it knows only their numbers (`RemoteTensors`). Either way each entry goes through the same operations in the
same order. `BaseWeights` computes the products when a reader needs them, or in another thread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Protocol, TypeVar

import torch
from torch import Tensor

from lte_ray.engine.coordinator.base_weights import BaseReader, BaseWeights, MergeOp
from lte_ray.engine.coordinator.rounding import make_rounding
from lte_ray.layout import Plan
from lte_ray.merging.alignment import measure_changes
from lte_ray.merging.flat_buffer import views
from lte_ray.merging.low_rank import Share, dense_part, new_reference, squared_norm
from lte_ray.messages import OuterStep
from lte_ray.transfer.codec import Codec

T = TypeVar("T")

# -- what the coordinator sees of the tensors --------------------------------------------------------------------------


@dataclass(frozen=True)
class MeasuredContribution:
    """A contribution that every shard has decoded: the sum of squares of all its elements."""

    sum_of_squares: float


class NeedsTensors(Exception):
    """A policy read the tensors of a contribution, which are in other processes."""


class RemoteShare(Share):
    """Stands for the share of a contribution whose tensors are in shards: reading it raises NeedsTensors."""

    def __init__(self) -> None:
        """It has no fields."""

    def _missing(self) -> NoReturn:
        raise NeedsTensors

    @property
    def weight(self) -> float:
        self._missing()

    @property
    def contribution(self) -> Tensor:
        self._missing()

    @property
    def reference(self) -> Tensor | None:
        self._missing()

    @property
    def plan(self) -> NoReturn:
        self._missing()


@dataclass(frozen=True)
class DecidedMerge:
    """What the next version adds to the base: the shares by weight, or `change` instead.

    Attributes:
        version: the next one.
        shares: of the merged heads, in the order in which they are added.
        weights: by head; empty where there is a `change`, or where nothing is merged and only the references change.
        change: flat, in the base layout.
        num_heads: N.
        step: what is done with the sum of the shares; None: it is added.
        ema_keep: the share of the moving average that stays; None if there is none.
    """

    version: int
    shares: Mapping[int, Share]
    weights: Mapping[int, float]
    change: Tensor | None
    num_heads: int
    step: OuterStep | None = None
    ema_keep: float | None = None


class MergeTensors(Protocol):
    """What the coordinator asks of the tensors: `LocalTensors`, or `RemoteTensors` where shards hold them.

    Attributes:
        dtype: of all merging.
        local: whether they are in this process, so that policies may read them.
    """

    dtype: torch.dtype
    local: bool

    def check_shape(self, head: int, buffer: Any) -> str:
        """Why a buffer isn't a flat contribution of the head's plan; empty if it is."""
        ...

    def sum_of_squares(self, buffer: Any) -> float:
        """Over all elements of a contribution: NaN or infinity if it holds such."""
        ...

    def share(self, head: int, buffer: Any) -> Share:
        """What a contribution adds to the base at weight 1."""
        ...

    def norm(self, share: Share) -> float | None:
        """The Euclidean norm of a contribution's whole change; None where only its head can tell it."""
        ...

    def measure(self, merge: DecidedMerge) -> dict[str, Any]:
        """How the changes relate (`ChangeMeasures`), as fields of the merge's record; nothing where they aren't here."""
        ...

    def merge(self, merge: DecidedMerge) -> None:
        """Makes the next version."""
        ...

    def preview(self, merge: DecidedMerge) -> Tensor:
        """The base that `merge` would make, as a new tensor."""
        ...

    def forget_head(self, head: int) -> None:
        """What the base holds of a head stays in it as ordinary weights."""
        ...


class LocalTensors:
    """The tensors in the coordinator's own process.

    Args:
        plan: what is trained.
        plans: each head's.
        base: flat, in the base layout; taken over and changed in place. Its type is that of all merging.
        version: of `base`.
        references: the factors that `base` holds of each head, flat; None where B' = 0.
        reset: as `LTEConfig.reset`.
        momentum: of the outer steps, as `base`; None if it is 0.
        send_down: as `MergeConfig.send_down`.
        residual: what rounded changes have left out so far, as `base`; None if it is 0.
        ema: the moving average of the bases up to this one, as `base`; None if there is none.
    """

    local = True

    def __init__(
        self,
        plan: Plan,
        plans: Sequence[Plan],
        base: Tensor,
        version: int,
        references: Mapping[int, Tensor | None],
        reset: str,
        momentum: Tensor | None = None,
        send_down: str = "dense",
        residual: Tensor | None = None,
        ema: Tensor | None = None,
    ) -> None:
        self._plan, self._plans, self._reset = plan, plans, reset
        self._buffers = {replica.name for replica in plan.replicas if replica.buffer}
        self.dtype = base.dtype
        self.references = dict(references)
        rounding = make_rounding(plan, send_down, base, residual)
        self.base_weights = BaseWeights(base, version, references, momentum, rounding, ema)

    def check_shape(self, head: int, buffer: Tensor) -> str:
        expected = (self._plans[head].contribution.size,)
        if buffer.shape == expected and buffer.dtype == self.dtype:
            return ""
        return f"it has the shape {tuple(buffer.shape)} and the type {buffer.dtype}, expected {expected} and {self.dtype}"

    def sum_of_squares(self, buffer: Tensor) -> float:
        return float(torch.dot(buffer, buffer))

    def share(self, head: int, buffer: Tensor) -> Share:
        return Share(1.0, self._plans[head], buffer, self.references.get(head))

    def norm(self, share: Share) -> float | None:
        return math.sqrt(squared_norm(share))

    def measure(self, merge: DecidedMerge) -> dict[str, Any]:
        return vars(measure_changes(merge.shares))

    def merge(self, merge: DecidedMerge) -> None:
        references = {head: new_reference(share, self._reset) for head, share in merge.shares.items()}
        self.base_weights.enqueue(replace(self._operation(merge), references=references))
        self.references.update(references)

    def preview(self, merge: DecidedMerge) -> Tensor:
        return self.base_weights.preview(self._operation(merge))

    def forget_head(self, head: int) -> None:
        self.references.pop(head, None)
        self.base_weights.forget_head(head)

    def _operation(self, merge: DecidedMerge) -> MergeOp:
        if merge.change is None:
            shares = [replace(merge.shares[head], weight=w) for head, w in merge.weights.items()]
            return MergeOp(merge.version, shares, step=merge.step, ema_keep=merge.ema_keep)
        return MergeOp(merge.version, (), self._with_mean_buffers(merge), ema_keep=merge.ema_keep)

    def _with_mean_buffers(self, merge: DecidedMerge) -> Tensor:
        """The change, with that of running statistics replaced by their mean: an extrapolated variance may be negative."""
        assert merge.change is not None
        if not self._buffers:
            return merge.change
        change = merge.change.clone()
        for name, part in views(self._plan.base, change).items():
            if name in self._buffers:
                part.copy_(torch.stack([dense_part(share, name) for share in merge.shares.values()]).sum(0) / merge.num_heads)
        return change


class RemoteTensors:
    """Stands for tensors in coordinator shards: the runtime sends them the merges, and policies must decide by weights."""

    dtype = torch.float32
    local = False

    def check_shape(self, head: int, buffer: MeasuredContribution) -> str:
        return ""  # shards check their parts when they decode them

    def sum_of_squares(self, buffer: MeasuredContribution) -> float:
        return buffer.sum_of_squares

    def share(self, head: int, buffer: MeasuredContribution) -> Share:
        return RemoteShare()

    def norm(self, share: Share) -> float | None:
        return None

    def measure(self, merge: DecidedMerge) -> dict[str, Any]:
        return {}

    def merge(self, merge: DecidedMerge) -> None:
        """The runtime has the shards do it."""

    def preview(self, merge: DecidedMerge) -> Tensor:
        raise NeedsTensors

    def forget_head(self, head: int) -> None:
        """The runtime has the shards do it."""


# -- one shard ---------------------------------------------------------------------------------------------------------


class BaseShard:
    """One coordinator shard: some groups' part of the base, of every head's reference, and of the undecided contributions.

    It decodes, checks and merges its own groups' part of every contribution. Call `receive`, `merge`, `discard` and
    `schedule_read` in one thread; `catch_up`, which computes, may run in another.

    Args:
        codecs: each head's; all have the same groups.
        parts: each group's part of the base by its number, flat, in the layout `Codec.group_plans[number].base`. Taken over.
        reset: as `LTEConfig.reset`.
        version: of the base.
        references: the factors that it holds of each head, by group, flat (`Codec.slice_factors`).
        momentum: of the outer steps, by group, as `parts`; empty if it is 0.
        send_down: as `MergeConfig.send_down`.
        residual: what rounded changes have left out so far, by group, as `parts`; empty if it is 0.
        ema: the moving average of the bases up to this one, by group, as `parts`; empty if there is none. Taken over.
    """

    def __init__(
        self,
        codecs: Sequence[Codec],
        parts: Mapping[int, Tensor],
        reset: str,
        *,
        version: int = 0,
        references: Mapping[int, Mapping[int, Tensor]] | None = None,
        momentum: Mapping[int, Tensor] | None = None,
        send_down: str = "dense",
        residual: Mapping[int, Tensor] | None = None,
        ema: Mapping[int, Tensor] | None = None,
    ) -> None:
        self._codecs, self._reset = codecs, reset
        self._references: dict[int, dict[int, Tensor | None]] = {i: dict((references or {}).get(i, {})) for i in parts}
        self._weights = {
            index: BaseWeights(
                part,
                version,
                self._references[index],
                (momentum or {}).get(index),
                make_rounding(codecs[0].group_plans[index], send_down, part, (residual or {}).get(index)),
                (ema or {}).get(index),
            )
            for index, part in parts.items()
        }
        self._received: dict[int, tuple[int, dict[int, Share]]] = {}  # by ticket: the head, and its share of each group

    @property
    def groups(self) -> tuple[int, ...]:
        """The numbers of its groups."""
        return tuple(self._weights)

    @property
    def redone_groups(self) -> tuple[int, ...]:
        """The numbers of its groups that heads redo."""
        return tuple(index for index in self._weights if self._codecs[0].groups[index].redone)

    @property
    def undecided(self) -> int:
        """How many contributions it keeps."""
        return len(self._received)

    def receive(self, ticket: int, head: int, buffers: Mapping[int, Tensor]) -> float:
        """Decodes a contribution's buffers. They are only read, and kept until it is merged or discarded.

        Args:
            ticket: the contribution's own number; faulty or restarted heads repeat sequence numbers.
            head: whose it is.
            buffers: by group.

        Returns:
            The sum of squares of its elements here: NaN or infinity if it holds such.

        Raises:
            ValueError: a buffer is malformed; nothing is kept.
        """
        codec, shares = self._codecs[head], {}
        for index, references in self._references.items():
            reference = references.get(head)
            flat = codec.decode_group(index, buffers[index], reference)
            shares[index] = Share(1.0, codec.group_plans[index], flat, reference)
        self._received[ticket] = (head, shares)
        return sum(float(torch.dot(share.contribution, share.contribution)) for share in shares.values())

    def discard(self, ticket: int) -> None:
        """Drops a contribution that was refused, here or in another shard, or discarded. Its head's reference stays."""
        self._received.pop(ticket, None)

    def forget_head(self, head: int) -> None:
        """A head begins with B = 0: versions from here on hold no factors of that number."""
        for index, weights in self._weights.items():
            self._references[index].pop(head, None)
            weights.forget_head(head)

    def merge(
        self,
        version: int,
        weights: Mapping[int, float],
        step: OuterStep | None = None,
        ema_keep: float | None = None,
    ) -> None:
        """Queues the next version: by the sum of weight x change over these tickets, in their order, and the outer `step`.

        Of the moving average, the share `ema_keep` stays.
        """
        for index, base_weights in self._weights.items():
            shares = {}
            for ticket, weight in weights.items():
                head, received = self._received[ticket]
                shares[head] = replace(received[index], weight=weight)
            references = {head: new_reference(share, self._reset) for head, share in shares.items()}
            operation = MergeOp(version, list(shares.values()), references=references, step=step, ema_keep=ema_keep)
            base_weights.enqueue(operation)
            self._references[index].update(references)
        for ticket in weights:
            del self._received[ticket]

    def schedule_read(self, group: int, read: BaseReader[T]) -> Future[T]:
        """Queues a read of one group's part of the version that is the newest now; see `BaseWeights.schedule_read`."""
        return self._weights[group].schedule_read(read)

    def catch_up(self) -> None:
        """Carries out all that is queued."""
        for weights in self._weights.values():
            weights.catch_up()

    def pop_seconds(self, version: int) -> float:
        """Seconds that a version's products took, which are forgotten here."""
        return sum(weights.pop_seconds(version) for weights in self._weights.values())

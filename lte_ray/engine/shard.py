"""The tensors of merging for some groups of entries: the work of one of several coordinator shards.

The coordinator decides by numbers (`Measured`); each shard decodes, checks and merges its own groups' part of every
contribution: the same operations on each entry, in the same order, as one process for all would do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from lte_ray.engine.master import Master, Operation, Use
from lte_ray.merging.products import Share, new_reference
from lte_ray.merging.transfer import Codec

T = TypeVar("T")


class Shard:
    """Some groups' part of the base, of every head's reference, and of the contributions that aren't decided.

    `receive`, `merge`, `forget` and `at` are called in one thread; `catch_up`, which computes, may be called in another.

    Args:
        codecs: each head's; all have the same groups.
        parts: each group's part of the base by its number, flat, in the layout `Codec.parts[number].base`. Taken over.
        reset: as `LTEConfig.reset`.
        version: of the base.
        references: the factors that it holds of each head, by group, flat (`Codec.take_factors`).
    """

    def __init__(
        self,
        codecs: Sequence[Codec],
        parts: Mapping[int, Tensor],
        reset: str,
        *,
        version: int = 0,
        references: Mapping[int, Mapping[int, Tensor]] | None = None,
    ) -> None:
        self._codecs, self._reset = codecs, reset
        self._held: dict[int, dict[int, Tensor | None]] = {index: dict((references or {}).get(index, {})) for index in parts}
        self._masters = {index: Master(part, version, self._held[index]) for index, part in parts.items()}
        self._received: dict[int, tuple[int, dict[int, Share]]] = {}  # by ticket: the head, and its share of each group

    @property
    def groups(self) -> tuple[int, ...]:
        """The numbers of its groups."""
        return tuple(self._masters)

    @property
    def factored(self) -> tuple[int, ...]:
        """The numbers of those that heads redo from factors."""
        return tuple(index for index in self._masters if self._codecs[0].groups[index].by_factors)

    @property
    def undecided(self) -> int:
        """How many contributions it keeps."""
        return len(self._received)

    def receive(self, ticket: int, head: int, buffers: Mapping[int, Tensor]) -> float:
        """A contribution's buffers of this shard's groups. They are only read, and kept until it is merged or forgotten.

        Args:
            ticket: the contribution's own number; heads' sequence numbers are repeated by mistaken or restarted heads.

        Returns:
            The sum of squares of its elements here: NaN or infinity if it holds such.

        Raises:
            ValueError: a buffer is malformed; nothing is kept.
        """
        codec, shares = self._codecs[head], {}
        for index, held in self._held.items():
            old = held.get(head)
            flat = codec.decode_group(index, buffers[index], old)
            shares[index] = Share(1.0, codec.parts[index], flat, old)
        self._received[ticket] = (head, shares)
        return sum(float(torch.dot(share.contribution, share.contribution)) for share in shares.values())

    def forget(self, ticket: int) -> None:
        """A contribution was refused, here or elsewhere, or discarded: its head's reference stays as it is."""
        self._received.pop(ticket, None)

    def renew(self, head: int) -> None:
        """A head begins with B = 0: from here on no version holds factors of that number."""
        for index, master in self._masters.items():
            self._held[index].pop(head, None)
            master.forget(head)

    def merge(self, version: int, weights: Mapping[int, float]) -> None:
        """The next version: base += sum of weight x change over these tickets, in their order; computed by `catch_up`."""
        for index, master in self._masters.items():
            shares = {}
            for ticket, weight in weights.items():
                head, received = self._received[ticket]
                shares[head] = replace(received[index], weight=weight)
            references = {head: new_reference(share, self._reset) for head, share in shares.items()}
            master.queue(Operation(version, list(shares.values()), references=references))
            self._held[index].update(references)
        for ticket in weights:
            del self._received[ticket]

    def at(self, group: int, use: Use[T]) -> Future[T]:
        """What `use` will make of a group's part at the version that is the newest now; see `Master.at`."""
        return self._masters[group].at(use)

    def catch_up(self) -> None:
        """Carries out all that is queued."""
        for master in self._masters.values():
            master.catch_up()

    def seconds(self, version: int) -> float:
        """How long a version's products took, which is forgotten here."""
        return sum(master.seconds(version) for master in self._masters.values())

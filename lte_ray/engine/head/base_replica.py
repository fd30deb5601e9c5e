"""A head process's own copy of the newest base, which it keeps by redoing the merges from their factors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor

from lte_ray.engine.process_tuning import torch_threads
from lte_ray.merging.flat_buffer import views
from lte_ray.merging.low_rank import Share, add_contributions, new_reference
from lte_ray.messages import CHECKSUM_INTERVAL, CoordinatorReply, MergeDelta
from lte_ray.transfer.checksum import base_checksum
from lte_ray.transfer.codec import Codec

T = TypeVar("T")


@dataclass(frozen=True)
class _Fetched:
    """What an update refers to: parts of a base by group, references by head, merges with their buffers by group and head."""

    parts: dict[int, Tensor]
    references: dict[int, Tensor] = field(default_factory=dict)
    chain: list[tuple[MergeDelta, dict[int, dict[int, Tensor]]]] = field(default_factory=list)


@dataclass
class _GroupPart:
    """A group's part of the base, flat, and each head's reference in it."""

    base: Tensor
    references: dict[int, Tensor | None]


class CannotRedoMerges(Exception):
    """The merges of an update don't follow the version that this process has: it needs the whole base."""


class BaseReplica:
    """Follows the coordinator's base version by version.

    Groups that travel by factors are redone here: the same products in the same order as the coordinator's. The rest is
    copied from what it publishes.

    Args:
        codecs: each head's; all have the same groups.
        reset: as `LTEConfig.reset`.
        fetch: gives the buffer behind a handle.
        own: the heads of this process, whose contributions don't come from elsewhere.
        threads: that torch redoes merges with; as many as the coordinator merges with, since results depend on it.
    """

    def __init__(
        self,
        codecs: Sequence[Codec],
        reset: str,
        fetch: Callable[[Any], Tensor],
        own_heads: Collection[int] = (),
        threads: int = 1,
    ) -> None:
        self._codecs, self._reset, self._fetch, self._own_heads = codecs, reset, fetch, frozenset(own_heads)
        self._parts: dict[int, _GroupPart] = {}
        self._base: Tensor | None = None
        self._checksums: dict[int, int] = {}  # checksum by version
        self._base_in_use, self._writing, self._threads = Lock(), Lock(), threads
        self.version = -1
        self.bytes_fetched = 0  # fetched from elsewhere
        self.resyncs = 0
        """How often the copy had drifted from the coordinator's, and was fetched anew."""

    @property
    def redo_from(self) -> int:
        """The version to ask from: -1 where the whole base is to be sent."""
        return self.version if self._parts else -1

    def acquire(self, reply: CoordinatorReply, on_fetched: Callable[[], object] = lambda: None) -> Tensor | None:
        """Follows to the update's version and gives that base, flat; None if this process has it or a newer one.

        The base is the mirror's own, to be read only, and stays as it is until `release`, which has to follow: whoever comes
        meanwhile waits.

        Args:
            update: from the coordinator.
            note: called when the base is here; if it raises, the update doesn't count.

        Raises:
            CannotRedoMerges: merges are missing between this process's version and the update's.
        """
        self._base_in_use.acquire()
        taken = changing = False
        try:
            fetched = self._fetch_reply(reply) if reply.version > self.version else None
            base = None
            with self._writing:
                on_fetched()  # before anything is changed: if it raises, this process still has the version that it had
                if fetched is not None:
                    changing = True
                    base = self._follow(reply, fetched)
                    self._base, self.version, taken = base, reply.version, True
        except BaseException:
            if changing:  # parts may be half done, and what was made of them: the next update brings all
                self._parts, self._base = {}, None
            raise
        finally:
            if not taken:
                self._base_in_use.release()
        return base

    def read(self, use: Callable[[Tensor | None], T]) -> T:
        """What `use` makes of the newest base, which nobody writes to meanwhile; None before there is one."""
        with self._writing:
            return use(self._base)

    def release(self) -> None:
        """The base that `take` gave isn't needed any more."""
        self._base_in_use.release()

    def _fetch_reply(self, update: CoordinatorReply) -> _Fetched:
        """All that an update refers to, so that what follows can't be cut off."""
        groups = self._codecs[0].groups
        if len(groups) == 1 and not groups[0].by_factors:
            return _Fetched({0: self._get(update.base_parts[0])})
        chain = [merged for merged in update.deltas if merged.version > self.version]
        whole = update.base_parts.keys() >= {i for i, group in enumerate(groups) if group.by_factors}
        if not whole and (not self._parts or self.version + len(chain) != update.version):
            raise CannotRedoMerges
        indices = update.base_parts.keys() if whole else self._parts.keys()
        factored = [i for i in indices if groups[i].by_factors]
        return _Fetched(
            {index: self._get(handle) for index, handle in update.base_parts.items()},
            {head: self._get(handle) for head, handle in update.references.items()},
            [
                (merged, {i: {h: self._buffer(h, merged.buffers[h][i]) for h in merged.weights} for i in factored})
                for merged in chain
            ],
        )

    def _buffer(self, head: int, handle: Any) -> Tensor:
        return self._fetch(handle) if head in self._own_heads else self._get(handle)

    def _follow(self, update: CoordinatorReply, fetched: _Fetched) -> Tensor:
        groups = self._codecs[0].groups
        if len(groups) == 1 and not groups[0].by_factors:
            return fetched.parts[0]
        plan, base = self._codecs[0].plan, self._base
        for index, part in fetched.parts.items():
            base = torch.empty(plan.base.size, dtype=part.dtype) if base is None else base
            if groups[index].by_factors:
                self._parts[index] = _GroupPart(part.clone(), {})
            else:
                self._copy(base, index, part)
        for head, factors in fetched.references.items():
            for index, part_ in self._parts.items():
                part_.references[head] = self._codecs[head].slice_factors(index, factors).clone()
        for merged, buffers in fetched.chain:
            self._redo(merged, buffers)
        assert base is not None
        for index, part_ in self._parts.items():
            self._copy(base, index, part_.base)
        self._compare(update)
        return base

    def _redo(self, merged: MergeDelta, buffers: Mapping[int, Mapping[int, Tensor]]) -> None:
        for index, part in self._parts.items():
            shares = []
            for head, weight in merged.weights.items():
                codec, old = self._codecs[head], None if head in merged.fresh else part.references.get(head)
                flat = codec.decode_group(index, buffers[index][head], old)
                shares.append((head, Share(weight, codec.group_plans[index], flat, old)))
            with torch_threads(self._threads):
                add_contributions(part.base, [share for _, share in shares])
            for head, share in shares:
                part.references[head] = new_reference(share, self._reset)
        if merged.version % CHECKSUM_INTERVAL == 0:
            self._checksums = {merged.version: sum(base_checksum(part.base) for part in self._parts.values()) % 2**64}

    def _compare(self, update: CoordinatorReply) -> None:
        """Forgets the copy if it isn't the coordinator's any more; the next update then brings the whole base."""
        if update.checksum is not None and self._checksums.get(update.checksum[0], update.checksum[1]) != update.checksum[1]:
            self._parts, self._checksums = {}, {}
            self.resyncs += 1

    def _copy(self, base: Tensor, index: int, part: Tensor) -> None:
        into = views(self._codecs[0].plan.base, base)
        for name, value in views(self._codecs[0].group_plans[index].base, part).items():
            into[name].copy_(value)

    def _get(self, handle: Any) -> Tensor:
        buffer = self._fetch(handle)
        self.bytes_fetched += buffer.nbytes
        return buffer

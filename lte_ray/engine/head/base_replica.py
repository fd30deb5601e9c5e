"""A head process's own copy of the newest base, which it keeps by redoing the merges, from factors or by changes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor

from lte_ray.engine.process_tuning import torch_threads
from lte_ray.merging.flat_buffer import views
from lte_ray.merging.low_rank import Share, new_reference
from lte_ray.merging.outer_step import merge_shares
from lte_ray.messages import CHECKSUM_INTERVAL, CoordinatorReply, MergeDelta
from lte_ray.transfer.checksum import base_checksum
from lte_ray.transfer.codec import Codec

T = TypeVar("T")


@dataclass(frozen=True)
class _Fetched:
    """What a reply refers to.

    Attributes:
        parts, momentum: of a base, by group.
        references: by head.
        deltas: merges with their buffers by group and head, and with their changes of the base by group.
    """

    parts: dict[int, Tensor]
    momentum: dict[int, Tensor] = field(default_factory=dict)
    references: dict[int, Tensor] = field(default_factory=dict)
    deltas: list[tuple[MergeDelta, dict[int, dict[int, Tensor]], dict[int, Tensor]]] = field(default_factory=list)


@dataclass
class _GroupPart:
    """A group's part of the base and of the momentum, flat, and each head's reference in it; no momentum is one of 0."""

    base: Tensor
    momentum: Tensor | None = None
    references: dict[int, Tensor | None] = field(default_factory=dict)

    @property
    def checksum(self) -> int:
        """Of base and momentum."""
        return base_checksum(self.base) + (0 if self.momentum is None else base_checksum(self.momentum))


class CannotRedoMerges(Exception):
    """The merges of a reply don't follow the version that this process has: it needs the complete base."""


class BaseReplica:
    """Follows the coordinator's base version by version.

    Groups that travel by factors are redone here, with the same products and outer steps in the same order as the
    coordinator's. To groups that travel as rounded changes, the same changes are added. The other groups are copied from what
    the coordinator publishes.

    Args:
        codecs: each head's; all have the same groups.
        reset: as `LTEConfig.reset`.
        fetch: returns the buffer behind a handle.
        own_heads: the heads of this process, whose contributions don't come from other processes.
        threads: torch's, for redoing merges; as many as the coordinator merges with, since results depend on it.

    Attributes:
        version: of the copy; -1 before there is one.
        bytes_fetched: from other processes.
        resyncs: how often the copy had drifted from the coordinator's base, and was fetched again.
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
        self._threads = threads
        self._parts: dict[int, _GroupPart] = {}  # of the groups that are redone
        self._base: Tensor | None = None
        self._checksums: dict[int, int] = {}  # by version
        self._base_in_use, self._changing = Lock(), Lock()
        self.version = -1
        self.bytes_fetched = 0
        self.resyncs = 0

    @property
    def redo_from(self) -> int:
        """The version from which this process can redo merges; -1 if it needs the complete base."""
        return self.version if self._parts else -1

    def acquire(self, reply: CoordinatorReply, on_fetched: Callable[[], object] = lambda: None) -> Tensor | None:
        """Follows to the reply's version; returns that base, flat, or None if this process has it or a newer one.

        The returned base is the replica's own. It is read-only, and doesn't change until `release`, which must follow: other
        callers wait for that.

        Args:
            reply: the coordinator's.
            on_fetched: called when the base is here; if it raises, the reply is ignored.

        Raises:
            CannotRedoMerges: merges are missing between this process's version and the reply's.
        """
        self._base_in_use.acquire()
        acquired = changing = False
        try:
            fetched = self._fetch_reply(reply) if reply.version > self.version else None
            base = None
            with self._changing:
                on_fetched()  # before anything is changed: if it raises, this process still has the version that it had
                if fetched is not None:
                    changing = True
                    base = self._follow(reply, fetched)
                    self._base, self.version, acquired = base, reply.version, True
        except BaseException:
            if changing:  # the parts may be half done, and the base too: the next reply brings the complete base
                self._parts, self._base = {}, None
            raise
        finally:
            if not acquired:
                self._base_in_use.release()
        return base

    def read(self, use: Callable[[Tensor | None, Tensor | None], T]) -> T:
        """Applies `use` to the newest base (None before there is one) and its momentum, which aren't changed meanwhile.

        The momentum is flat, and 0 in the groups that are sent as the base, where this process can't know it. It is None if it
        is 0 everywhere, or not known at all.
        """
        with self._changing:
            return use(self._base, self._momentum())

    def _momentum(self) -> Tensor | None:
        if self._base is None or all(part.momentum is None for part in self._parts.values()):
            return None
        momentum = torch.zeros_like(self._base)
        for index, part in self._parts.items():
            if part.momentum is not None:
                self._copy_group(momentum, index, part.momentum)
        return momentum

    def release(self) -> None:
        """Says that the base which `acquire` returned isn't needed any more."""
        self._base_in_use.release()

    def _fetch_reply(self, reply: CoordinatorReply) -> _Fetched:
        """Fetches all that a reply refers to, so that following it can't be interrupted."""
        groups = self._codecs[0].groups
        if len(groups) == 1 and not groups[0].redone:
            return _Fetched({0: self._get(reply.base_parts[0])})
        deltas = [delta for delta in reply.deltas if delta.version > self.version]
        is_complete = reply.base_parts.keys() >= {i for i, group in enumerate(groups) if group.redone}
        if not is_complete and (not self._parts or self.version + len(deltas) != reply.version):
            raise CannotRedoMerges
        indices = reply.base_parts.keys() if is_complete else self._parts.keys()
        by_factors = [i for i in indices if groups[i].by_factors]
        return _Fetched(
            {index: self._get(handle) for index, handle in reply.base_parts.items()},
            {index: self._get(handle) for index, handle in reply.momentum.items()},
            {head: self._get(handle) for head, handle in reply.references.items()},
            [
                (
                    delta,
                    {i: {h: self._get_contribution(h, delta.buffers[h][i]) for h in delta.weights} for i in by_factors},
                    {i: self._get(handle) for i, handle in delta.changes.items()},
                )
                for delta in deltas
            ],
        )

    def _get_contribution(self, head: int, handle: Any) -> Tensor:
        return self._fetch(handle) if head in self._own_heads else self._get(handle)

    def _follow(self, reply: CoordinatorReply, fetched: _Fetched) -> Tensor:
        groups = self._codecs[0].groups
        if len(groups) == 1 and not groups[0].redone:
            return fetched.parts[0]
        plan, base = self._codecs[0].plan, self._base
        for index, new in fetched.parts.items():
            base = torch.empty(plan.base.size, dtype=new.dtype) if base is None else base
            if groups[index].redone:
                momentum = fetched.momentum.get(index)
                self._parts[index] = _GroupPart(new.clone(), None if momentum is None else momentum.clone())
            else:
                self._copy_group(base, index, new)
        for head, factors in fetched.references.items():
            for index, part in self._parts.items():
                part.references[head] = self._codecs[head].slice_factors(index, factors).clone()
        for delta, buffers, changes in fetched.deltas:
            self._redo(delta, buffers, changes)
        assert base is not None
        for index, part in self._parts.items():
            self._copy_group(base, index, part.base)
        self._compare_checksum(reply)
        return base

    def _redo(self, delta: MergeDelta, buffers: Mapping[int, Mapping[int, Tensor]], changes: Mapping[int, Tensor]) -> None:
        for index, part in self._parts.items():
            if index in changes:
                part.base += self._codecs[0].change_packings[index].decode(changes[index])
                continue
            shares = []
            for head, weight in delta.weights.items():
                codec, old = self._codecs[head], None if head in delta.fresh else part.references.get(head)
                flat = codec.decode_group(index, buffers[index][head], old)
                shares.append((head, Share(weight, codec.group_plans[index], flat, old)))
            with torch_threads(self._threads):
                part.momentum = merge_shares(part.base, part.momentum, [share for _, share in shares], delta.outer_step)
            for head, share in shares:
                part.references[head] = new_reference(share, self._reset)
        if delta.version % CHECKSUM_INTERVAL == 0:
            self._checksums = {delta.version: sum(part.checksum for part in self._parts.values()) % 2**64}

    def _compare_checksum(self, reply: CoordinatorReply) -> None:
        """Drops a copy that differs from the coordinator's base; the next reply then brings the complete base."""
        if reply.checksum is not None and self._checksums.get(reply.checksum[0], reply.checksum[1]) != reply.checksum[1]:
            self._parts, self._checksums = {}, {}
            self.resyncs += 1

    def _copy_group(self, base: Tensor, index: int, part: Tensor) -> None:
        into = views(self._codecs[0].plan.base, base)
        for name, value in views(self._codecs[0].group_plans[index].base, part).items():
            into[name].copy_(value)

    def _get(self, handle: Any) -> Tensor:
        buffer = self._fetch(handle)
        self.bytes_fetched += buffer.nbytes
        return buffer

"""How flat buffers travel between processes: by reference, apart from the messages that name them.

One small interface, so that a faster way than Ray's object store can take its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray
import torch
from torch import Tensor

from lte_ray.errors import LTEError
from lte_ray.runtime.ray_errors import PROCESS_DIED

Handle = Any


class ObjectLost(LTEError):
    """A published buffer can't be had any more: the process that held it is gone."""


class Transport(Protocol):
    """Publishes flat tensors and fetches them elsewhere by handle."""

    def publish(self, buffer: Tensor) -> Handle:
        """Makes a copy of `buffer` (1-D, any device) available to other processes, as long as the handle is held."""
        ...

    def fetch(self, handle: Handle) -> Tensor:
        """The published buffer on the CPU: read-only, and to be let go soon, since it pins shared memory.

        Raises:
            ObjectLost: its owner has died.
        """
        ...

    async def fetch_async(self, handle: Handle) -> Tensor:
        """As `fetch`, without blocking the event loop while it travels."""
        ...


@dataclass(frozen=True)
class StoredRef:
    """A handle of the object store. The reference is wrapped, since Ray replaces bare ones in calls by their values."""

    reference: Any


@dataclass(frozen=True)
class AssembledRef:
    """A flat buffer of `size` elements whose pieces were published apart: each one's handle, and where it lies in the whole.

    A piece may lie there in several places: [begin, end) each, in its own order.
    """

    size: int
    pieces: tuple[tuple[Handle, tuple[tuple[int, int], ...]], ...]

    def assemble(self, pieces: Sequence[Tensor]) -> Tensor:
        """The whole, from the pieces in their order."""
        whole = torch.empty(self.size, dtype=pieces[0].dtype)
        for piece, (_, places) in zip(pieces, self.pieces, strict=True):
            taken = 0
            for begin, end in places:
                whole[begin:end] = piece[taken : taken + end - begin]
                taken += end - begin
        return whole


class ObjectStore:
    """Ray's object store. Buffers travel as flat numpy arrays, which it hands out without a copy (0.3-0.6 ms)."""

    def publish(self, buffer: Tensor) -> Handle:
        return StoredRef(ray.put(_on_host(buffer.detach()).numpy()))

    def fetch(self, handle: Handle) -> Tensor:
        if isinstance(handle, AssembledRef):
            return handle.assemble([self.fetch(piece) for piece, _ in handle.pieces])
        try:
            return _read_only(ray.get(handle.reference))
        except LOST as error:
            raise ObjectLost(f"{type(error).__name__}: {error}") from None

    async def fetch_async(self, handle: Handle) -> Tensor:
        if isinstance(handle, AssembledRef):
            pieces = [await self.fetch_async(piece) for piece, _ in handle.pieces]
            return await asyncio.to_thread(handle.assemble, pieces)
        try:
            return _read_only(await handle.reference)
        except LOST as error:
            raise ObjectLost(f"{type(error).__name__}: {error}") from None


LOST = (*PROCESS_DIED, ray.exceptions.ObjectLostError, ray.exceptions.WorkerCrashedError)
"""What Ray raises for an object whose owner has died; ObjectLostError is the root of several."""


@contextlib.contextmanager
def at_construction() -> Iterator[None]:
    """Within the block an asyncio actor's constructor may fetch: Ray warns of it, but nothing else runs on its loop yet."""
    logger = logging.getLogger("ray._private.worker")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


_staging = threading.local()


def _on_host(buffer: Tensor) -> Tensor:
    """The buffer on the CPU. From a GPU through page-locked memory, which is used again and again: each thread has its own."""
    if buffer.device.type != "cuda":
        return buffer.cpu()
    kept: dict[tuple[int, torch.dtype], Tensor] = _staging.__dict__.setdefault("kept", {})
    key = (buffer.numel(), buffer.dtype)
    if key not in kept:
        kept[key] = torch.empty(buffer.numel(), dtype=buffer.dtype, pin_memory=True)
    kept[key].copy_(buffer, non_blocking=True)
    torch.cuda.current_stream(buffer.device).synchronize()  # of this thread, not of the one that trains
    return kept[key]


def _read_only(array: Any) -> Tensor:
    with warnings.catch_warnings():  # torch warns of arrays that it can't write; nobody writes to this one
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)

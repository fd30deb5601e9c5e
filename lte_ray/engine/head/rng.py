"""A head's own random number generators, so that each of several heads in a process draws what it would draw alone."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lte_ray.worker import seed_everything


def head_seed(seed: int, head: int, incarnation: int = 0) -> int:
    """The seed of one head's generators, below 2**63; it differs between heads and between restarts."""
    again = f"/{incarnation}" if incarnation else ""
    return int.from_bytes(hashlib.sha256(f"{seed}/{head}/rng{again}".encode()).digest()[:8], "little") >> 1


class Generators:
    """Saved states of Python's, NumPy's and torch's global generators; `swapped_in` makes them current."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device
        self._state: tuple[Any, ...] = ()
        with preserve_generators(device):
            seed_everything(seed)
            self._state = _capture(device)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the block the global generators continue from the saved states; their own states are restored after it."""
        with preserve_generators(self._device):
            _restore(self._state, self._device)
            try:
                yield
            finally:
                self._state = _capture(self._device)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The states as tensors and JSON values."""
        cpu, cuda, (kind, keys, *rest), python = self._state
        tensors = {"rng.torch": cpu, "rng.numpy": torch.from_numpy(keys.astype(np.int64))}
        if cuda is not None:
            tensors["rng.cuda"] = cuda
        return tensors, {"numpy": [kind, *rest], "python": [python[0], list(python[1]), python[2]]}

    def load_state(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Takes over what `state` returned."""
        kind, *rest = meta["numpy"]
        keys = tensors["rng.numpy"].numpy().astype(np.uint32)
        version, internal, gauss = meta["python"]
        cuda = tensors.get("rng.cuda", self._state[1])
        self._state = (tensors["rng.torch"], cuda, (kind, keys, *rest), (version, tuple(internal), gauss))


def _capture(device: torch.device) -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()


def _restore(state: tuple[Any, ...], device: torch.device) -> None:
    cpu, cuda, numpy_state, python_state = state
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda, device)
    np.random.set_state(numpy_state)
    random.setstate(python_state)


@contextmanager
def watch_draws(device: torch.device) -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether the global generators have drawn since the block began."""
    before = _capture(device)
    yield lambda: not _states_equal(before, _capture(device))


def _states_equal(one: Any, other: Any) -> bool:
    if isinstance(one, tuple):
        return all(map(_states_equal, one, other))
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return bool(np.array_equal(one, other))


@contextmanager
def rewind_generators(error: type[BaseException], device: torch.device) -> Iterator[None]:
    """If the block raises `error`, restores the states that the global generators had before it."""
    before = _capture(device)
    try:
        yield
    except error:
        _restore(before, device)
        raise


@contextmanager
def preserve_generators(device: torch.device) -> Iterator[None]:
    """Restores the states of the global generators after the block."""
    before = _capture(device)
    try:
        yield
    finally:
        _restore(before, device)

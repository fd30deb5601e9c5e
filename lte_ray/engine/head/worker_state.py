"""What a worker keeps for itself (counters, curricula, replay buffers), as named tensors and JSON values of a checkpoint.

A worker with `state_dict` and `load_state_dict` has a copy of its own in each head.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lte_ray.errors import WorkerError
from lte_ray.worker import Worker

PREFIX = "worker."
TENSOR, ARRAY, TUPLE = "$tensor", "$array", "$tuple"
"""Keys of the JSON objects that stand for a tensor, an array, and a tuple."""


def has_state(worker: Worker) -> bool:
    """Whether the worker has a state of its own.

    Raises:
        WorkerError: it has only one of the two methods.
    """
    saves, loads = (callable(getattr(worker, name, None)) for name in ("state_dict", "load_state_dict"))
    if saves != loads:
        given, missing = ("state_dict", "load_state_dict") if saves else ("load_state_dict", "state_dict")
        raise WorkerError(f"{type(worker).__name__} has {given}() but no {missing}(): its state needs both, or neither.")
    return saves


def own_worker(worker: Worker) -> Worker:
    """The worker for one head: a copy, if it has a state."""
    return copy.deepcopy(worker) if has_state(worker) else worker


def worker_state(worker: Worker) -> tuple[dict[str, Tensor], Any]:
    """What `state_dict` returns, as tensors whose names begin with "worker.", and a JSON value; none and None without a state.

    Raises:
        WorkerError: it holds something else.
    """
    if not has_state(worker):
        return {}, None
    tensors: dict[str, Tensor] = {}
    value = _split(worker.state_dict(), "", tensors, type(worker).__name__)  # type: ignore[attr-defined]
    return tensors, json.loads(json.dumps(value))


def load_worker_state(worker: Worker, tensors: Mapping[str, Tensor], value: Any) -> None:
    """Gives the worker what `worker_state` returned of it."""
    if value is not None and has_state(worker):
        worker.load_state_dict(_join(value, tensors))  # type: ignore[attr-defined]


def _split(value: Any, where: str, tensors: dict[str, Tensor], name: str) -> Any:
    if isinstance(value, Tensor):
        tensors[PREFIX + where] = value.detach().clone()
        return {TENSOR: where}
    if isinstance(value, np.ndarray):
        tensors[PREFIX + where] = torch.from_numpy(value.copy())
        return {ARRAY: where}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        if any(not isinstance(key, str) for key in value):
            raise WorkerError(f"{name}.state_dict() has a key in {where or 'it'} that isn't text, so it can't be saved.")
        return {key: _split(item, f"{where}.{key}".lstrip("."), tensors, name) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_split(item, f"{where}.{n}".lstrip("."), tensors, name) for n, item in enumerate(value)]
        return {TUPLE: items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise WorkerError(
        f"{name}.state_dict() can't be saved: {where} has the type {type(value).__name__}. Keep numbers, text, tensors and "
        "arrays in it, in dictionaries, lists and tuples."
    )


def _join(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_join(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    match list(value.items()):
        case [(kind, where)] if kind == TENSOR:
            return tensors[PREFIX + where].clone()
        case [(kind, where)] if kind == ARRAY:
            return tensors[PREFIX + where].numpy().copy()
        case [(kind, items)] if kind == TUPLE:
            return tuple(_join(item, tensors) for item in items)
    return {key: _join(item, tensors) for key, item in value.items()}

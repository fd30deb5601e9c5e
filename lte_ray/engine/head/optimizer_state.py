"""An optimizer and its schedule as named tensors and JSON values, so that no checkpoint needs pickle."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, optim

from lte_ray.errors import WorkerError
from lte_ray.optim import Muon

ELEMENTWISE = (
    optim.Adadelta, optim.Adagrad, optim.Adam, optim.Adamax, optim.AdamW, optim.ASGD, optim.NAdam, optim.RAdam, optim.RMSprop,
    optim.Rprop, optim.SGD, Muon,
)  # fmt: skip
"""Optimizers whose state has a value for each element of a parameter, except `SCALARS`. Others may keep anything."""

SCALARS = {"eta", "mu", "mu_product", "step"}
"""State entries of `ELEMENTWISE` optimizers that are one value for a parameter."""


def optimizer_state(optimizer: torch.optim.Optimizer, schedule: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The states of the optimizer and its schedule, as tensors named ``optimizer.<parameter index>.<key>`` and JSON values.

    Raises:
        WorkerError: the state holds something that is neither a tensor nor JSON.
    """
    full = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, entries in full["state"].items():
        plain[str(index)] = {}
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value.detach()
            else:
                plain[str(index)][key] = value
    groups = [{k: v.item() if isinstance(v, Tensor) else v for k, v in group.items()} for group in full["param_groups"]]
    meta = {"state": plain, "param_groups": groups, "schedule": None if schedule is None else schedule.state_dict()}
    try:
        return tensors, json.loads(json.dumps(meta))
    except (TypeError, ValueError) as error:
        where, kind = _find_unsavable(meta) or ("?", str(error))
        raise WorkerError(
            f"The optimizer's or schedule's state can't be saved: {where} has the type {kind}. Keep numbers, text and tensors "
            "in it, and make anything else in the constructor (or leave it out of state_dict())."
        ) from error


def _find_unsavable(value: Any, where: str = "") -> tuple[str, str] | None:
    """The place and the type of the first value that JSON can't hold."""
    if isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(value, dict) and not isinstance(key, str | int | float | bool | None):
                return f"{where}[{key!r}]".lstrip("."), f"key of type {type(key).__name__}"
            if found := _find_unsavable(item, f"{where}.{key}" if isinstance(value, dict) else f"{where}[{key}]"):
                return found
        return None
    return None if value is None or isinstance(value, str | int | float | bool) else (where.lstrip("."), type(value).__name__)


def check_shapes(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], names: Mapping[int, str]) -> None:
    """Checks that a saved state fits the parameters: a wrong shape would fail, or be broadcast, only in the next step.

    Args:
        optimizer: of the parameters.
        tensors: that `optimizer_state` returned.
        names: of the parameters, by their ids.

    Raises:
        ValueError: it doesn't fit; names the parameter and both shapes.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entries in _group_by_parameter(tensors).items():
        if index >= len(parameters):
            raise ValueError(f"it has a state of the optimizer's parameter {index}, but there are {len(parameters)}")
        parameter = parameters[index]
        for key, tensor in entries.items() if isinstance(optimizer, ELEMENTWISE) else ():
            shape = torch.Size() if key in SCALARS else parameter.shape
            if tensor.shape != shape:
                raise ValueError(
                    f"the optimizer's {key} of {names.get(id(parameter), f'parameter {index}')} has the shape "
                    f"{tuple(tensor.shape)}, expected {tuple(shape)}"
                )


SCHEDULED = ("lr", "initial_lr", "max_lr", "min_lr", "momentum", "base_momentum", "max_momentum", "betas")
"""Settings of a parameter group that schedules set."""


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    tensors: dict[str, Tensor],
    meta: dict[str, Any],
    advance: int | None = None,
) -> None:
    """Takes over what `optimizer_state` returned; parameters are matched by their order.

    Args:
        optimizer, schedule: as they were built.
        tensors, meta: the saved state.
        advance: how many steps the schedule stands after its start, where it was built for another number of steps than the
            one whose state was saved. Then its own state and the settings that it makes aren't taken over: it is a function of
            the new number.
    """
    state: dict[int, dict[str, Any]] = {int(index): dict(entries) for index, entries in meta["state"].items()}
    for index, entries in _group_by_parameter(tensors).items():
        state.setdefault(index, {}).update({key: tensor.clone() for key, tensor in entries.items()})
    fresh = optimizer.state_dict()["param_groups"]
    groups = _cast_like(fresh, meta["param_groups"])
    if schedule is not None and advance is not None:
        groups = [saved | {k: v for k, v in own.items() if k in SCHEDULED} for saved, own in zip(groups, fresh, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    if schedule is not None and advance is not None:
        with warnings.catch_warnings():  # the optimizer's own steps were taken before
            warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step", UserWarning)
            for _ in range(advance):
                schedule.step()
    elif schedule is not None and meta["schedule"] is not None:
        schedule.load_state_dict(_cast_like(schedule.state_dict(), meta["schedule"]))


def _group_by_parameter(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """The optimizer's tensors by its parameters' indices, and by key."""
    grouped: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            index, _, key = rest.partition(".")
            grouped.setdefault(int(index), {})[key] = tensor
    return grouped


def _cast_like(fresh: Any, saved: Any) -> Any:
    """Casts `saved` to the types of `fresh`, the same state of a new object: JSON has no tuples and no integer keys."""
    if isinstance(fresh, Counter):
        return Counter({int(key): value for key, value in saved.items()})
    if isinstance(fresh, dict) and isinstance(saved, dict):
        keys = {str(key): key for key in fresh}
        return {keys.get(k, k): _cast_like(fresh.get(keys.get(k, k)), v) for k, v in saved.items()}
    if isinstance(fresh, list | tuple) and isinstance(saved, list):
        like = [*fresh, *[None] * (len(saved) - len(fresh))]
        return type(fresh)(_cast_like(f, s) for f, s in zip(like, saved, strict=False))
    return saved

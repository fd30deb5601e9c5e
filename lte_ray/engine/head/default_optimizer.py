"""The optimizer and schedule of a worker that builds none, as --optimizer and --schedule say."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch

from lte_ray.config import TrainConfig
from lte_ray.errors import ConfigError
from lte_ray.optim import LoRAMuon, Muon, lora_plus, warmup_constant, warmup_cosine, warmup_linear
from lte_ray.worker import Worker

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"lora-plus": lora_plus, "lora-muon": LoRAMuon, "muon": Muon}

SCHEDULES: dict[str, Callable[..., torch.optim.lr_scheduler.LRScheduler]] = {
    "constant": warmup_constant,
    "cosine": warmup_cosine,
    "linear": warmup_linear,
}

NEEDED = {
    "lora-muon": ({"lora", "weight"}, "is for factors and whole weights, but --adapt none leaves neither. Use adamw."),
    "lora-plus": ({"lora"}, "has rates for A and B, but in full rank there are no factors. Use adamw or muon."),
    "muon": ({"weight"}, "is for weights that train in full, but here factors train. Use lora-muon."),
}
"""For each optimizer, the groups of which it needs at least one, and what to say if there is none."""


def check_optimizer_settings(worker: Worker, train: TrainConfig) -> None:
    """Raises ConfigError if the settings of the optimizer or schedule have no effect, since the worker builds its own."""
    for method, names in {
        "build_optimizer": ("optimizer", "lr", "replica_lr", "weight_decay"),
        "build_schedule": ("schedule", "warmup"),
    }.items():
        given = {name: getattr(train, name) for name in names if getattr(train, name) not in ("auto", None)}
        if given and getattr(worker, method, None):
            flags = " and ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items())
            raise ConfigError(
                f"{flags} would have no effect, because {type(worker).__name__} has a {method}() of its own. Leave it out and "
                f"set what the worker offers (its flags are in --help), or remove {method}() from the worker."
            )
    if train.warmup is not None and not has_schedule(worker, train):
        raise ConfigError(
            f"--warmup is {train.warmup}, but {type(worker).__name__} has a build_optimizer() but no build_schedule(), so "
            "there is no schedule to begin with it. Give --schedule, too: constant, cosine or linear."
        )


def has_schedule(worker: Worker, train: TrainConfig) -> bool:
    """Returns whether `make_schedule` makes the schedule: it is named, or "auto" and the optimizer isn't the worker's own."""
    if getattr(worker, "build_schedule", None):
        return False
    return train.schedule != "auto" or not getattr(worker, "build_optimizer", None)


def make_optimizer(train: TrainConfig, groups: list[dict[str, Any]], factor: float = 1.0) -> torch.optim.Optimizer:
    """Returns the optimizer that the settings name. `factor` multiplies the default rates, not those that are given.

    "auto" means LoRA-Muon for factors, Muon for weights that train in full, and AdamW for ordinary training (``--baseline``).
    AdamW has rate 1e-3 by default, betas 0.9 and 0.95. Weight decay is for factors and for weights that would have some: the
    usual exceptions, biases and norms, are replicas.

    Raises:
        ConfigError: the optimizer is for parameters that don't train in this run.
    """
    rates = {name: getattr(train, name) for name in ("lr", "replica_lr") if getattr(train, name) is not None}
    chosen = resolve_optimizer(train, {group["name"] for group in groups})
    for group in groups if train.weight_decay else ():
        group["weight_decay"] = train.weight_decay if group["name"] in ("lora", "weight") else 0.0
    if chosen == "adamw":
        for group in groups:
            if group["name"] == "replica" and "replica_lr" in rates:
                group["lr"] = rates["replica_lr"]
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            groups, lr=rates.get("lr", 1e-3), betas=(0.9, 0.95), weight_decay=0.0
        )
    else:
        needed, reason = NEEDED[chosen]
        if not needed & {group["name"] for group in groups}:
            raise ConfigError(f"--optimizer {chosen} {reason}")
        optimizer = OPTIMIZERS[chosen](groups, **rates)
    given = {"replica": "replica_lr" in rates or (chosen == "adamw" and "lr" in rates)}
    for group in optimizer.param_groups:
        if not given.get(group["name"], "lr" in rates):
            group["lr"] = group["lr"] * factor
    return optimizer


def resolve_optimizer(train: TrainConfig, groups: Collection[str]) -> str:
    """Returns the name of the optimizer, if "auto" by the names of the groups."""
    if train.optimizer != "auto":
        return train.optimizer
    if train.baseline or not {"lora", "weight"} & set(groups):
        return "adamw"
    return "lora-muon" if "lora" in groups else "muon"


def make_schedule(train: TrainConfig, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Returns the schedule that the settings name; "auto" is a cosine."""
    warmup = {} if train.warmup is None else {"warmup": train.warmup}
    return SCHEDULES["cosine" if train.schedule == "auto" else train.schedule](optimizer, train.steps, **warmup)

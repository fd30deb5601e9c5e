"""Checks of what an optimizer is given: the parameter groups of `build_optimizer`, and numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lte_ray.errors import ConfigError

NAMES = {"lora", "replica", "weight"}
"""Names of the parameter groups that `build_optimizer` gets."""

Scaling = float | list[float]
"""s of a pair of factors, or of each head if the pair is stacked."""


def check_groups(optimizer: str, params: Iterable[Any]) -> list[dict[str, Any]]:
    """Returns the groups. Raises ConfigError unless each has a name, and one of them a name of `NAMES`."""
    groups = list(params)
    names = [group.get("name") if isinstance(group, dict) else None for group in groups]
    if None in names or not NAMES.intersection(names):
        given = "a group without a name" if None in names else f"{', '.join(map(repr, names)) or 'none'}"
        given = "parameters" if groups and not isinstance(groups[0], dict) else given
        raise ConfigError(
            f'{optimizer} needs parameter groups named "lora", "replica" or "weight", but it was given {given}. Pass on the '
            "groups that build_optimizer(params) is given, or copy each with its keys: {**group, 'lr': ...}."
        )
    return groups


def check_pairs(optimizer: str, group: dict[str, Any]) -> None:
    """Raises ConfigError unless a group has factors A, B, A, B, ... that fit, and a scaling for each pair."""
    factors: list[Tensor] = group["params"]
    scalings = group.get("scalings")
    if scalings is None or len(factors) != 2 * len(scalings):
        present = "no scalings" if scalings is None else f"{len(scalings)} scalings"
        raise ConfigError(
            f"{optimizer} needs the pairs A, B and their scalings, but the group 'lora' has {len(factors)} parameters and "
            f"{present}. Pass on the groups that build_optimizer(params) is given, or copy each with its keys: "
            "{**group, 'lr': ...}."
        )
    for a, b, scaling in zip(factors[::2], factors[1::2], scalings, strict=True):
        if a.ndim < 2 or a.shape[:-2] != b.shape[:-2] or a.shape[-2] != b.shape[-1]:
            raise ConfigError(
                f"{optimizer} needs the pairs A (r x in), B (out x r), but the group 'lora' has shapes {tuple(a.shape)} and "
                f"{tuple(b.shape)}. Keep the order of the factors that build_optimizer(params) is given."
            )
        each, heads = scaling if isinstance(scaling, list) else [scaling], a.shape[:-2].numel()
        if not all(math.isfinite(s) and s for s in each) or (isinstance(scaling, list) and len(scaling) != heads):
            raise ConfigError(
                f"{optimizer} needs a scaling other than 0 of each pair, or a list of each stacked head's, but the group "
                f"'lora' has {scaling!r} for A of shape {tuple(a.shape)}."
            )


def check_range(name: str, value: float, lowest: float, below: float = math.inf) -> None:
    """Raises ConfigError unless lowest <= value < below."""
    if not lowest <= value < below:
        limit = f" and below {below:g}" if below < math.inf else ""
        raise ConfigError(f"The optimizer's {name} is {value!r}, but it must be at least {lowest:g}{limit}.")

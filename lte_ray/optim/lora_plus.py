"""LoRA+: AdamW with separate rates for A, B and everything else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from lte_ray.optim.groups import check_groups, check_pairs, check_range


def lora_plus(
    params: Iterable[dict[str, Any]],
    lr: float = 1e-3,
    *,
    ratio: float = 4.0,
    replica_lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> torch.optim.AdamW:
    """Returns AdamW with rate lr for A, ratio lr for B, and replica_lr for all other parameters (LoRA+, arXiv 2402.12354).

    B starts at zero, and in wide layers it must move more than A for both to learn alike. Each group named "lora" becomes two,
    "lora_A" and "lora_B", with the keys of the first. The group's own "lr", if it has one, comes before `lr`.

    Args:
        params: parameter groups, as `build_optimizer` gets them.
        lr: rate of A.
        ratio: of B's rate to A's.
        replica_lr: rate of all other groups that bring none.
        betas, eps, weight_decay: of AdamW.

    Raises:
        ConfigError: the groups have no names, or a group of factors isn't one of pairs.
    """
    check_range("lr", lr, 0)
    check_range("ratio", ratio, 0)
    check_range("replica_lr", replica_lr, 0)
    split: list[dict[str, Any]] = []
    for group in check_groups("lora_plus", params):
        if group["name"] != "lora":
            split.append({"lr": replica_lr, **group})
            continue
        check_pairs("lora_plus", group)
        rate, factors = group.get("lr", lr), group["params"]
        split.append({**group, "params": factors[::2], "name": "lora_A", "lr": rate})
        split.append({**group, "params": factors[1::2], "name": "lora_B", "lr": rate * ratio})
    return torch.optim.AdamW(split, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

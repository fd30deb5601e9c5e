"""LoRA+ splits the groups of factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lte_ray.errors import ConfigError
from lte_ray.optim import lora_plus


def make_groups(**more: Any) -> list[dict[str, Any]]:
    """Two pairs of factors of rank 1, and a replica."""
    factors = [nn.Parameter(torch.ones(*shape)) for shape in [(1, 3), (4, 1), (1, 5), (6, 1)]]
    replicas = [nn.Parameter(torch.ones(7))]
    return [
        {"params": factors, "name": "lora", "scalings": [1.0, 2.0], **more},
        {"params": replicas, "name": "replica", **more},
    ]


def test_a_b_and_replicas_have_their_own_rates() -> None:
    """B's is `ratio` times A's. Other keys of the groups stay, among them the multiplier."""
    optimizer = lora_plus(make_groups(lr_multiplier=2.0), lr=0.01, ratio=8.0, replica_lr=0.5)
    assert isinstance(optimizer, torch.optim.AdamW)
    shapes = [(g["name"], g["lr"], [tuple(p.shape) for p in g["params"]]) for g in optimizer.param_groups]
    assert shapes == [
        ("lora_A", 0.01, [(1, 3), (1, 5)]),
        ("lora_B", 0.08, [(4, 1), (6, 1)]),
        ("replica", 0.5, [(7,)]),
    ]
    assert [g["lr_multiplier"] for g in optimizer.param_groups] == [2.0] * 3


def test_a_groups_own_rate_comes_first() -> None:
    """For factors it is that of A."""
    optimizer = lora_plus(make_groups(lr=0.25), ratio=2.0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.5, 0.25]


def test_what_does_not_fit_is_refused() -> None:
    """As by LoRAMuon: factors without pairs, groups without names, rates below 0."""
    with pytest.raises(ConfigError, match="lora_plus needs the pairs A, B"):
        lora_plus([{**make_groups()[0], "scalings": None}])
    with pytest.raises(ConfigError, match="lora_plus needs parameter groups named"):
        lora_plus(nn.Linear(2, 2).parameters())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="ratio is -1"):
        lora_plus(make_groups(), ratio=-1)

"""The merge policy that a run gets if it names none."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lte_ray.config import MergeConfig
from lte_ray.engine import default_policy
from lte_ray.engine.prepare import prepare
from tests.support.tiny_worker import Tiny, make_settings


@pytest.mark.parametrize(
    ("heads", "merge", "optimizer", "expected"),
    [
        (2, {}, "lora-muon", ("orthogonal", None)),
        (2, {"when": "arrival"}, "lora-muon", ("orthogonal", {"momentum": 0.5, "replica_momentum": 0.5})),
        (2, {"when": "quorum"}, "lora-muon", ("orthogonal", {"momentum": 0.5, "replica_momentum": 0.5})),
        (2, {"shards": 2}, "lora-muon", ("nesterov", {"lr": 0.7, "momentum": 0.7})),
        (2, {"shards": 2, "when": "arrival"}, "lora-muon", ("average", None)),
        (1, {}, "lora-muon", ("average", None)),
        (2, {}, "adamw", ("average", None)),
        (2, {"policy": "median"}, "lora-muon", ("median", None)),
    ],
)
def test_the_policy_suits_the_optimizer(heads: int, merge: dict[str, Any], optimizer: str, expected: Any) -> None:
    """A policy that is named stays."""
    found = choose(heads, merge, optimizer)
    assert (found.policy, found.policy_args) == expected


def test_orthogonal_steps_must_be_affordable(monkeypatch: pytest.MonkeyPatch) -> None:
    """For models above the limit, Nesterov with a barrier, and the average without."""
    monkeypatch.setattr(default_policy, "AFFORDABLE_MULTIPLICATIONS", 10.0)
    assert choose(2, {}).policy == "nesterov"
    assert choose(2, {"when": "arrival"}).policy == "average"


@pytest.mark.parametrize(
    ("heads", "merge", "expected"),
    [
        (2, {"policy": "orthogonal"}, 1),
        (16, {"policy": "orthogonal"}, 4),
        (16, {"policy": "average"}, 4),
        (2, {"policy": "average"}, 4),
        (16, {"policy": "orthogonal", "max_lag": 0}, 0),
    ],
)
def test_the_lag_that_is_allowed_follows_the_policy(heads: int, merge: dict[str, Any], expected: int) -> None:
    """A quarter of the heads for orthogonal steps, otherwise 4; a limit that is given stays."""
    assert dataclasses.replace(make_settings(heads=heads), merge=MergeConfig(**merge)).max_lag == expected


def choose(heads: int, merge: dict[str, Any], optimizer: str = "lora-muon") -> MergeConfig:
    """The settings of merging that a small worker gets."""
    settings = dataclasses.replace(make_settings(heads=heads), merge=MergeConfig(**merge))
    return default_policy.choose_policy(settings, prepare(Tiny(optimizer=optimizer), settings))

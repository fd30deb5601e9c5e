"""What heads get where nothing is asked for, from what a cluster says that it has."""

from __future__ import annotations

import re

import pytest

from lte_ray.config import PlacementConfig
from lte_ray.runtime import placement


@pytest.mark.parametrize(
    ("gpus", "heads", "each", "found", "told"),
    [
        (1.0, 4, 1, 0.0, "has 1 GPU for 4 processes of heads, .*--gpus-per-head 0.25.*--heads-per-actor 4"),
        (2.0, 3, 1, 0.0, "has 2 GPU for 3 processes of heads, .*--gpus-per-head 0.5.*--heads-per-actor 2"),
        (1.0, 4, 4, 1.0, ""),
        (4.0, 4, 1, 1.0, ""),
        (0.0, 4, 1, 0.0, ""),
    ],
)
def test_gpus_that_are_not_used_are_told(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    gpus: float,
    heads: int,
    each: int,
    found: float,
    told: str,
) -> None:
    """By default a head gets a whole GPU or none; where there are too few, a warning says how to share them."""
    monkeypatch.setattr(placement.ray, "cluster_resources", lambda: {"CPU": 16.0, "GPU": gpus})
    assert placement.resolve(PlacementConfig(heads_per_actor=each), heads).gpus == found
    assert len(caplog.messages) == bool(told)
    if told:
        assert re.search(told, caplog.messages[0])

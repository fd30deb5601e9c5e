"""What heads get by default, from what a cluster has."""

from __future__ import annotations

import re

import pytest

from lte_ray.config import PlacementConfig
from lte_ray.runtime import placement


@pytest.mark.parametrize(
    ("gpus", "heads", "each", "expected", "warning"),
    [
        (1.0, 4, 1, 0.0, "has 1 GPU for 4 processes of heads, .*--gpus-per-head 0.25.*--heads-per-actor 4"),
        (2.0, 3, 1, 0.0, "has 2 GPU for 3 processes of heads, .*--gpus-per-head 0.5.*--heads-per-actor 2"),
        (1.0, 4, 4, 1.0, ""),
        (4.0, 4, 1, 1.0, ""),
        (0.0, 4, 1, 0.0, ""),
    ],
)
def test_a_warning_says_how_to_use_idle_gpus(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    gpus: float,
    heads: int,
    each: int,
    expected: float,
    warning: str,
) -> None:
    """By default a process of heads gets one GPU, or none if there are too few: a warning then says how to share them."""
    monkeypatch.setattr(placement.ray, "cluster_resources", lambda: {"CPU": 16.0, "GPU": gpus})
    assert placement.resolve(PlacementConfig(heads_per_actor=each), heads).gpus == expected
    assert len(caplog.messages) == bool(warning)
    if warning:
        assert re.search(warning, caplog.messages[0])


@pytest.mark.parametrize(("timeout", "first", "last"), [(0.0, 30.0, 1800.0), (60.0, 60.0, 60.0), (5.0, 30.0, 30.0)])
def test_the_last_heads_are_waited_for_half_an_hour_unless_a_timeout_is_given(
    timeout: float, first: float, last: float
) -> None:
    """--resource-timeout is how long any head is waited for, at least half a minute."""
    reservation = placement.Reservation(placement.Placement(1.0, 0.0, timeout=timeout), [(0,)], None)
    assert (reservation.patience, reservation.last_patience) == (first, last)

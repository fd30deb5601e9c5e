"""Ray's errors, as the library's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, OutOfMemoryError

from lte_ray.errors import CoordinatorLost
from lte_ray.runtime.head.client import ReconnectingStub
from lte_ray.runtime.ray_errors import to_lte_error


class Actor:
    """A process that takes any call."""

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *args: (name, args))


def test_a_coordinator_that_rays_memory_monitor_killed_is_lost_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's error has another type: calls wait for the next coordinator, and the error becomes `CoordinatorLost`."""
    error = OutOfMemoryError("the node was short of memory")
    assert isinstance(to_lte_error(error, "the coordinator"), CoordinatorLost)
    answers: list[Any] = [error, ActorDiedError(), 7]

    def get(ref: Any) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            line.connect(Actor(), line.epoch + 1)  # as the driver does
            raise answer
        return answer

    monkeypatch.setattr(ray, "get", get)
    line = ReconnectingStub(Actor(), 0)
    assert line.call("contribute") == (2, 7)

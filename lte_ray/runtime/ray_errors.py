"""Converts Ray's errors to the library's."""

from __future__ import annotations

from typing import Any

import ray

from lte_ray.errors import CoordinatorLost, HeadLost, LTEError, RunError, UserError
from lte_ray.messages import HeadStatus

PROCESS_DIED = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)
"""What Ray raises for a call to an actor whose process is gone; the second, if Ray's memory monitor killed it."""


def ray_get(ref: Any, who: str, status: HeadStatus | None = None) -> Any:
    """Returns the result of a call to an actor.

    Args:
        ref: of the result.
        who: the actor, for people.
        status: the newest of its head, if it hosts one.

    Raises:
        LTEError: the call failed.
    """
    try:
        return ray.get(ref)
    except ray.exceptions.RayError as error:
        raise to_lte_error(error, who, status) from error


def to_lte_error(error: Exception, who: str, status: HeadStatus | None = None) -> LTEError:
    """Returns the error that was raised inside the actor, or one that says that the process is gone."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, UserError):
        return RunError(f"{who}: {cause}")
    if isinstance(cause, LTEError):
        return cause
    if isinstance(error, PROCESS_DIED):
        at = f" at local step {status.step}" if status is not None and status.step else ""
        kind = CoordinatorLost if who == "the coordinator" else HeadLost
        return kind(f"The process of {who} died{at}: {error}")
    return RunError(f"{who} failed: {error}")

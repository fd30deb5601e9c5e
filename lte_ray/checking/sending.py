"""Whether a worker and a merge policy reach other processes, and copies of the worker as these processes get it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lte_ray.checking.report import Findings
from lte_ray.config import MergeConfig
from lte_ray.merging.registry import make_policy
from lte_ray.run.display import format_bytes
from lte_ray.runtime.context import PickledObject
from lte_ray.worker import Worker

PART = "sending"

LARGE = 20e6
"""Bytes of a pickled worker from which on it is worth a warning: every process of the run gets them."""


def check_sending(worker: Worker, merge: MergeConfig, findings: Findings) -> Callable[[], Worker]:
    """Pickles worker and policy, as a run does to send them.

    Returns:
        A function that returns the worker as another process gets it; the worker itself, if it can't be sent.
    """
    name = type(worker).__name__
    with findings.looking_at("merge"):
        PickledObject.pickle(make_policy(merge))
    try:
        pickled = PickledObject.pickle(worker)
    except Exception as error:
        findings.fail_with(PART, error)
        return lambda: worker
    try:
        received: Any = pickled.load()
    except Exception as error:
        findings.fail(
            PART,
            f"{name} can be sent to other processes, but can't be made there: {type(error).__name__}: {error}. Keep settings "
            "only in its attributes.",
        )
        return lambda: worker
    if type(received).__name__ != name:
        findings.fail(PART, f"Other processes get a {type(received).__name__} instead of a {name}: correct its __reduce__().")
        return lambda: worker
    size = len(pickled.pickled)
    if size >= LARGE:
        findings.warn(
            PART,
            f"{name} has {format_bytes(size)}, which every process gets. Keep settings only in its attributes; make models and "
            "data in the methods that use them.",
        )
    else:
        findings.ok(PART, f"{name} reaches other processes ({format_bytes(size)}).")
    return pickled.load

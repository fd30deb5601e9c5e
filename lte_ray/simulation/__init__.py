"""Simulations: a run on a modeled cluster, under a virtual clock, with the real coordinator and merge policies.

Each name is loaded when it is first used, so that a record can be shown without torch. Type checkers read ``__init__.pyi``.
"""

from __future__ import annotations

import importlib
from typing import Any

_DEFINED_IN = {
    "KINDS": "record",
    "CostModel": "cost_model",
    "SimulatedTraining": "api",
    "SimulationRecord": "record",
    "named_plan": "cost_model",
    "simulate_time": "api",
    "simulate_training": "api",
}

__all__ = list(_DEFINED_IN)


def __getattr__(name: str) -> Any:
    if name not in _DEFINED_IN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_DEFINED_IN[name]}"), name)

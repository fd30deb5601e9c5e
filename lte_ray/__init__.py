"""lte-ray: train networks with many parallel LoRA heads (LoRA-the-Explorer) on Ray.

Importing it loads neither Ray nor the command line: each public name is loaded when it is first used. Type checkers read
``__init__.pyi``, which imports the same names.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "lte_ray.adapters.layer": ("LTELayer",),
    "lte_ray.checking": ("CheckReport", "check"),
    "lte_ray.config": ("FailureConfig", "LTEConfig", "MergeConfig", "TrainConfig"),
    "lte_ray.data.shard": ("Shard",),
    "lte_ray.errors": ("LTEError",),
    "lte_ray.functions": ("FunctionWorker", "fit"),
    "lte_ray.run.callbacks": ("Callback",),
    "lte_ray.merging.policy": ("Discard", "Merge", "MergeChange", "MergePolicy", "Pending", "Roster", "Try", "Wait", "combine"),
    "lte_ray.messages": ("OuterStep", "StepCoefficients"),
    "lte_ray.modes.prepare": ("prepare_model_for_lte",),
    "lte_ray.modes.replica": ("MultiheadReplicaLayer", "ReplicaLayer"),
    "lte_ray.run.history": ("read_metrics",),
    "lte_ray.run.sinks.protocol": ("LogRow", "RunInfo", "Sink"),
    "lte_ray.planning": ("RunPlan", "plan"),
    "lte_ray.report": ("Report", "write_report"),
    "lte_ray.trainer": ("LTETrainer",),
    "lte_ray.worker": ("Worker",),
}
"""The public names by the module that defines them."""

_SUBMODULES = ("base", "config", "export", "ladder", "misc", "modes", "optim", "prepare", "replica", "testing", "worker")
"""Public submodules, which load when they are first used."""

_DEFINED_IN = dict(sorted((name, module) for module, names in _MODULES.items() for name in names))

__all__ = list(_DEFINED_IN)

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _DEFINED_IN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_DEFINED_IN[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

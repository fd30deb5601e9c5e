"""lte-ray: train networks with many parallel LoRA heads (LoRA-the-Explorer) on Ray.

Importing it loads neither Ray nor the command line; names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lte_ray.adapters.layer import LTELayer as LTELayer
    from lte_ray.config import FailureConfig as FailureConfig
    from lte_ray.config import LTEConfig as LTEConfig
    from lte_ray.config import MergeConfig as MergeConfig
    from lte_ray.config import TrainConfig as TrainConfig
    from lte_ray.data.shard import Shard as Shard
    from lte_ray.errors import LTEError as LTEError
    from lte_ray.merging.policy import Discard as Discard
    from lte_ray.merging.policy import Merge as Merge
    from lte_ray.merging.policy import MergeChange as MergeChange
    from lte_ray.merging.policy import MergePolicy as MergePolicy
    from lte_ray.merging.policy import Pending as Pending
    from lte_ray.merging.policy import Roster as Roster
    from lte_ray.merging.policy import Try as Try
    from lte_ray.merging.policy import Wait as Wait
    from lte_ray.merging.policy import combine as combine
    from lte_ray.modes.prepare import prepare_model_for_lte as prepare_model_for_lte
    from lte_ray.modes.replica import MultiheadReplicaLayer as MultiheadReplicaLayer
    from lte_ray.modes.replica import ReplicaLayer as ReplicaLayer
    from lte_ray.trainer import LTETrainer as LTETrainer
    from lte_ray.worker import Worker as Worker

_HOMES = {
    "Discard": "lte_ray.merging.policy",
    "FailureConfig": "lte_ray.config",
    "LTEConfig": "lte_ray.config",
    "LTEError": "lte_ray.errors",
    "LTELayer": "lte_ray.adapters.layer",
    "LTETrainer": "lte_ray.trainer",
    "Merge": "lte_ray.merging.policy",
    "MergeChange": "lte_ray.merging.policy",
    "MergeConfig": "lte_ray.config",
    "MergePolicy": "lte_ray.merging.policy",
    "MultiheadReplicaLayer": "lte_ray.modes.replica",
    "Pending": "lte_ray.merging.policy",
    "ReplicaLayer": "lte_ray.modes.replica",
    "Roster": "lte_ray.merging.policy",
    "Shard": "lte_ray.data.shard",
    "TrainConfig": "lte_ray.config",
    "Try": "lte_ray.merging.policy",
    "Wait": "lte_ray.merging.policy",
    "Worker": "lte_ray.worker",
    "combine": "lte_ray.merging.policy",
    "prepare_model_for_lte": "lte_ray.modes.prepare",
}

__all__ = [
    "Discard",
    "FailureConfig",
    "LTEConfig",
    "LTEError",
    "LTELayer",
    "LTETrainer",
    "Merge",
    "MergeChange",
    "MergeConfig",
    "MergePolicy",
    "MultiheadReplicaLayer",
    "Pending",
    "ReplicaLayer",
    "Roster",
    "Shard",
    "TrainConfig",
    "Try",
    "Wait",
    "Worker",
    "combine",
    "prepare_model_for_lte",
]

__version__ = "0.1.0"


_SUBMODULES = ("misc", "modes", "testing")


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

"""What the processes of ordinary training, the actor that starts them and the driver tell each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lte_ray.layout import Plan
from lte_ray.messages import HeadStatus, MergeRecord
from lte_ray.runtime.context import PickledObject, RunContext
from lte_ray.runtime.coordinator_state import CoordinatorState


@dataclass(frozen=True)
class ProcessSetup:
    """What every process gets.

    Attributes:
        context: of the run.
        plans: of the model that the driver built: one.
        policy: the merge policy.
        start: where the run starts. A process that is started again continues from a newer checkpoint, if there is one.
        threads: torch's.
        gpu_memory: part of a GPU's memory that each process may use; 1: no limit.
    """

    context: RunContext
    plans: tuple[Plan, ...]
    policy: PickledObject
    start: CoordinatorState
    threads: int
    gpu_memory: float = 1.0


@dataclass(frozen=True)
class ProcessReport:
    """What the first process says of the run, a few times per second.

    Attributes:
        status: of the head.
        merges: since the report before.
        bases, emas: by version, the weights that are to be evaluated and their moving averages, flat.
        checkpoint: the newest complete one.
        problem: why a checkpoint couldn't be written; empty if none failed.
        final: the version with which the run ends, its weights, and their moving average (None if there is none); None before.
    """

    status: HeadStatus
    merges: tuple[MergeRecord, ...] = ()
    bases: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    emas: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    checkpoint: int | None = None
    problem: str = ""
    final: tuple[int, NDArray[np.float32], NDArray[np.float32] | None] | None = None


@dataclass(frozen=True)
class ProcessesStatus:
    """What the driver is told.

    Attributes:
        starts: how often the processes were started.
        start_version: the version from which they did the last time.
        status, checkpoint, problem: as in the newest report.
        merges: after the version that the driver has seen.
        final: the version with which the run ended, and handles of its weights and their moving average; None before.
    """

    starts: int
    start_version: int
    status: HeadStatus | None
    merges: tuple[MergeRecord, ...]
    checkpoint: int | None
    problem: str
    final: tuple[int, Any, Any] | None

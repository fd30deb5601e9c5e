"""What every actor of a run gets."""

from __future__ import annotations

from dataclasses import dataclass

from lte_ray.checkpoint import Manifest
from lte_ray.engine.settings import Settings
from lte_ray.runtime.transport import Transport
from lte_ray.storage import RunDirectory
from lte_ray.worker import Worker


@dataclass(frozen=True)
class Common:
    """The run's worker, settings and folder, the way tensors travel, and the checkpoint to go on from, if any."""

    worker: Worker
    settings: Settings
    directory: RunDirectory
    transport: Transport
    resume: Manifest | None = None

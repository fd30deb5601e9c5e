"""What every actor of a run gets."""

from __future__ import annotations

from dataclasses import dataclass

from lte_ray.checkpoint import Manifest
from lte_ray.engine.settings import Settings
from lte_ray.runtime.package import Package
from lte_ray.runtime.transport import Transport
from lte_ray.storage import RunDirectory


@dataclass(frozen=True)
class Common:
    """The run's worker, settings and folder, the way tensors travel, and the checkpoint to go on from, if any."""

    worker: Package
    settings: Settings
    directory: RunDirectory
    transport: Transport
    resume: Manifest | None = None

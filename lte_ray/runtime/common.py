"""What every actor of a run gets."""

from __future__ import annotations

from dataclasses import dataclass

from lte_ray.checkpoint import Manifest
from lte_ray.engine.settings import Settings
from lte_ray.merging.transfer import Group
from lte_ray.runtime.package import Package
from lte_ray.runtime.transport import Transport
from lte_ray.storage import RunDirectory


@dataclass(frozen=True)
class Common:
    """The run's worker, settings and folder, the way tensors travel and in which groups, and the checkpoint to go on from."""

    worker: Package
    settings: Settings
    directory: RunDirectory
    transport: Transport
    groups: tuple[Group, ...]
    resume: Manifest | None = None

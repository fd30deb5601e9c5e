"""What every actor of a run gets, and how the user's objects reach other processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from lte_ray.engine.process_tuning import MAX_REDO_THREADS, merge_threads
from lte_ray.engine.settings import Settings
from lte_ray.errors import WorkerError
from lte_ray.file_modules import SourceModule, loaded_modules, offer
from lte_ray.layout import Plan
from lte_ray.runtime import pickling
from lte_ray.runtime.object_store import Transport
from lte_ray.storage import RunDirectory
from lte_ray.transfer.codec import Codec
from lte_ray.transfer.groups import EntryGroup


@dataclass(frozen=True)
class PickledObject:
    """A worker or policy on its way to an actor.

    Ray gives actors the driver's script folder and working directory, but nothing else of its module path. So the path is sent
    along, and folders of it that exist on the actor's node are added to the path there. Modules that were loaded from files
    are sent as source.
    """

    pickled: bytes
    paths: tuple[str, ...]
    modules: tuple[SourceModule, ...] = ()

    @classmethod
    def pickle(cls, value: Any) -> PickledObject:
        """Pickles an object.

        Raises:
            WorkerError: it can't be pickled.
        """
        return cls(pickling.dumps(value), tuple(os.path.abspath(path) for path in sys.path), loaded_modules())

    def load(self) -> Any:
        """Unpickles the object in this process.

        Raises:
            WorkerError: a module that it needs isn't on this node.
        """
        sys.path.extend(path for path in self.paths if path not in sys.path and os.path.exists(path))
        offer(self.modules)
        try:
            return ray.cloudpickle.loads(self.pickled)
        except ImportError as error:
            raise WorkerError(
                f"Node {ray.util.get_node_ip_address()} can't import what the worker needs: {error}. Send it along (ray job "
                "submit --working-dir), install it on every node, or give the worker as path/to/file.py:Class."
            ) from error


@dataclass(frozen=True)
class RetentionPolicy:
    """Which checkpoints are kept: the newest `last` (None: all), and the `best` ones by the evaluation figure `best_by`."""

    last: int | None = None
    best: int = 0
    best_by: str = ""


@dataclass(frozen=True)
class RunContext:
    """What every actor of a run gets.

    Attributes:
        worker: the user's.
        settings: of the run.
        directory: of the run.
        transport: carries tensors between processes.
        groups: of layers that travel together.
        retention: which checkpoints are kept.
        rejoin: how a head that died begins, as `FailureConfig.rejoin`.
        fault_script: folder of faults for tests (`fault_injection`); None if there are none.
        run_toml: the text of ``run.toml``.
        evaluates: whether the worker has an `evaluate`.
    """

    worker: PickledObject
    settings: Settings
    directory: RunDirectory
    transport: Transport
    groups: tuple[EntryGroup, ...]
    retention: RetentionPolicy = RetentionPolicy()
    rejoin: str = "merged"
    fault_script: str | None = None
    run_toml: str = ""
    evaluates: bool = True

    def merge_threads(self, part: Plan, whole: Plan) -> int:
        """Returns the threads to merge `part` of the `whole` plan with.

        Where heads redo merges it is the same number in all processes, since sums depend on it.
        """
        configured, heads = self.settings.merge.merge_threads, self.settings.lte.num_heads
        if any(group.by_factors for group in self.groups):
            return merge_threads(configured, whole, heads, MAX_REDO_THREADS)
        return merge_threads(configured, part, heads)

    def codecs(self, plans: Sequence[Plan]) -> list[Codec]:
        """Returns each head's codec. Heads with equal plans share one."""
        by_plan = {plan: Codec(plan, self.groups, self.settings.merge) for plan in set(plans)}
        return [by_plan[plan] for plan in plans]

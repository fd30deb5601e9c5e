"""What every actor of a run gets.

How the user's objects reach other processes: pickled, with the places where their modules are found.
"""

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
from lte_ray.import_object import FILE_MODULE_PREFIX
from lte_ray.layout import Plan
from lte_ray.runtime.object_store import Transport
from lte_ray.storage import RunDirectory
from lte_ray.transfer.codec import Codec
from lte_ray.transfer.groups import EntryGroup


@dataclass(frozen=True)
class PickledObject:
    """A worker or policy on its way to an actor.

    Ray gives actors the driver's script folder and working directory, but nothing else of its module path; so that is
    sent along, and what of it exists on the actor's node is added there.
    """

    pickled: bytes
    paths: tuple[str, ...]

    @classmethod
    def pickle(cls, thing: Any) -> PickledObject:
        """Packs an object. What of it was loaded from a file is sent by value, as no other process can import it.

        Raises:
            WorkerError: it can't be pickled.
        """
        for name, module in list(sys.modules.items()):  # a policy of the user's may lie inside one of ours
            if name.startswith(FILE_MODULE_PREFIX):
                ray.cloudpickle.register_pickle_by_value(module)
        try:
            pickled = ray.cloudpickle.dumps(thing)
        except Exception as error:
            raise WorkerError(
                f"{type(thing).__name__} can't be sent to other processes: {type(error).__name__}: {error}. Keep settings "
                "only in its attributes; open files, models and data in the methods that use them."
            ) from error
        return cls(pickled, tuple(os.path.abspath(path) for path in sys.path))

    def load(self) -> Any:
        """Unpacks it in this process.

        Raises:
            WorkerError: a module that it needs isn't on this node.
        """
        sys.path.extend(path for path in self.paths if path not in sys.path and os.path.exists(path))
        try:
            return ray.cloudpickle.loads(self.pickled)
        except ImportError as error:
            raise WorkerError(
                f"Node {ray.util.get_node_ip_address()} can't import what the worker needs: {error}. Send it along (ray job "
                "submit --working-dir), install it on every node, or give the worker as path/to/file.py:Class."
            ) from error


@dataclass(frozen=True)
class RetentionPolicy:
    """Checkpoints that are kept: the `last` (None: all), and the `best` by an evaluation's figure."""

    last: int | None = None
    best: int = 0
    best_by: str = ""


@dataclass(frozen=True)
class RunContext:
    """The run's worker, settings and folder, the way tensors travel and in which groups, and which checkpoints are kept.

    `rejoin` says how a head that died begins; `faults` names a script of faults (`points`); `config` is what ``run.toml`` says.
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

    def merge_threads(self, part: Plan, whole: Plan) -> int:
        """Threads to merge `part` of the `whole` plan with; where heads redo merges, the same everywhere."""
        configured, heads = self.settings.merge.merge_threads, self.settings.lte.num_heads
        if any(group.by_factors for group in self.groups):
            return merge_threads(configured, whole, heads, MAX_REDO_THREADS)
        return merge_threads(configured, part, heads)

    def codecs(self, plans: Sequence[Plan]) -> list[Codec]:
        """Each head's codec; heads with equal plans share one."""
        made = {plan: Codec(plan, self.groups, self.settings.merge) for plan in set(plans)}
        return [made[plan] for plan in plans]

"""How the user's objects reach other processes: pickled, with the places where their modules are found."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any

import ray

from lte_ray.errors import WorkerError
from lte_ray.loading import FILE_MODULE_PREFIX


@dataclass(frozen=True)
class Package:
    """A worker or policy on its way to an actor.

    Ray gives actors the driver's script folder and working directory, but nothing else of its module path; so that is
    sent along, and what of it exists on the actor's node is added there.
    """

    pickled: bytes
    paths: tuple[str, ...]

    @classmethod
    def of(cls, thing: Any) -> Package:
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

    def open(self) -> Any:
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

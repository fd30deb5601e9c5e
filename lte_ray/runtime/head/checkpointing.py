"""A head process's part in checkpoints: snapshots between two steps, written beside training, and read at the start."""

from __future__ import annotations

import threading

from torch import Tensor

from lte_ray import checkpoint
from lte_ray.engine.head.head import Head
from lte_ray.engine.head.state import State, StateMissed, rejoin, restore, snapshot
from lte_ray.engine.head.virtual import HeadGroup
from lte_ray.errors import StorageError, WorkerFailed
from lte_ray.fault_injection import inject
from lte_ray.messages import CheckpointRequest, CoordinatorReply
from lte_ray.runtime.context import RunContext
from lte_ray.runtime.head.client import CoordinatorClient
from lte_ray.storage import RunDirectory


class HeadCheckpointer:
    """Takes snapshots of heads and writes them; nothing that goes wrong with storage keeps a head from training.

    Args:
        directory: the run's.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._asked: list[CheckpointRequest] = []
        self._lock = threading.Lock()
        self._idle = False
        self._taken: set[tuple[int, int]] = set()  # cuts and heads: who is asked twice would write another state over the first

    @property
    def asked(self) -> bool:
        """Whether a snapshot is wanted, so that a round should be left between two steps."""
        return bool(self._asked)

    def ask(self, save: CheckpointRequest, group: HeadGroup, courier: CoordinatorClient) -> None:
        """A snapshot is wanted; at once, if the heads don't train any more."""
        with self._lock:
            self._asked.append(save)
            idle = self._idle
        if idle:
            self.serve(group, courier)

    def serve(self, group: HeadGroup, courier: CoordinatorClient) -> None:
        """Between two steps: takes the snapshots that are wanted."""
        with self._lock:
            asked, self._asked = self._asked, []
        for save in asked:
            self.take(group, courier, save)

    def idle(self, group: HeadGroup, courier: CoordinatorClient) -> None:
        """The heads train no more: from now on snapshots are taken when they are asked for."""
        with self._lock:
            self._idle = True
        self.serve(group, courier)

    def take(self, group: HeadGroup, courier: CoordinatorClient, save: CheckpointRequest) -> None:
        """Copies the state of the heads that are to write it; writing follows in another thread."""
        for head in group.heads:
            if head.head not in save.sequences or (save.cut, head.head) in self._taken:
                continue
            self._taken.add((save.cut, head.head))
            with head.timed("checkpoint"):
                try:
                    state: State | None = snapshot(head, save)
                except StateMissed:
                    state = None
            inject("snapshot", head=head.head, step=head.step, version=save.version)
            courier.beside(lambda number=head.head, state=state: self._write(courier, save.version, number, state))  # type: ignore[misc]

    def _write(self, courier: CoordinatorClient, version: int, number: int, state: State | None) -> None:
        entry, why = None, ""
        if state is not None:
            try:
                entry = checkpoint.write_head(self._directory, version, number, *state)
            except Exception as error:  # whatever it is: the coordinator waits for an answer
                said = str(error) if isinstance(error, StorageError) else f"{type(error).__name__}: {error}"
                why = f"the state of head {number}: {said}"
            inject("saved", head=number, version=version)
        courier.tell("saved", version, number, entry, why)

    def begin(self, head: Head, update: CoordinatorReply, base: Tensor, common: RunContext) -> str:
        """Starts a head as the coordinator says. Gives what it had to do without, in words.

        Raises:
            WorkerFailed: the state that it is to go on from exactly can't be read.
        """
        begin = update.begins[head.head]
        reference = None if begin.reference is None else common.transport.fetch(begin.reference).clone()
        saved, lacks = None, ""
        if begin.saved is not None:
            try:
                saved = checkpoint.read_head(self._directory, checkpoint.read_manifest(self._directory, begin.saved), head.head)
                if begin.exact:
                    restore(head, saved, base)
                    return ""
            except StorageError as error:
                if begin.exact:
                    raise WorkerFailed(f"head {head.head}", None, str(error)) from error
                lacks = f"its saved optimizer state can't be read ({error})"
        return rejoin(head, begin.standing, reference, update.version, base, saved) or lacks

"""A head process's part in checkpoints: snapshots between two steps, written beside training, and read at the start."""

from __future__ import annotations

import threading
from functools import partial

from torch import Tensor

from lte_ray import checkpoint
from lte_ray.engine.head.head import Head
from lte_ray.engine.head.snapshot import SavedState, StateMissed, rejoin, restore, snapshot
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
        self._requests: list[CheckpointRequest] = []
        self._lock = threading.Lock()
        self._training_ended = False
        self._written: set[tuple[int, int]] = (
            set()
        )  # cuts and heads: who is asked twice would write another state over the first

    @property
    def snapshot_requested(self) -> bool:
        """Whether a snapshot is wanted, so that a round should be left between two steps."""
        return bool(self._requests)

    def request_snapshot(self, request: CheckpointRequest, group: HeadGroup, client: CoordinatorClient) -> None:
        """A snapshot is wanted; at once, if the heads don't train any more."""
        with self._lock:
            self._requests.append(request)
            idle = self._training_ended
        if idle:
            self.take_requested_snapshots(group, client)

    def take_requested_snapshots(self, group: HeadGroup, client: CoordinatorClient) -> None:
        """Between two steps: takes the snapshots that are wanted."""
        with self._lock:
            asked, self._requests = self._requests, []
        for save in asked:
            self.take_snapshot(group, client, save)

    def end_training(self, group: HeadGroup, client: CoordinatorClient) -> None:
        """The heads train no more: from now on snapshots are taken when they are asked for."""
        with self._lock:
            self._training_ended = True
        self.take_requested_snapshots(group, client)

    def take_snapshot(self, group: HeadGroup, client: CoordinatorClient, request: CheckpointRequest) -> None:
        """Copies the state of the heads that are to write it; writing follows in another thread."""
        for head in group.heads:
            if head.number not in request.sequences or (request.id, head.number) in self._written:
                continue
            self._written.add((request.id, head.number))
            with head.timer.measure("checkpoint"):
                try:
                    state: SavedState | None = snapshot(head, request)
                except StateMissed:
                    state = None
            inject("snapshot", head=head.number, step=head.step, version=request.version)
            client.run_in_background(partial(self._write, client, request.version, head.number, state))

    def _write(self, client: CoordinatorClient, version: int, number: int, state: SavedState | None) -> None:
        entry, why = None, ""
        if state is not None:
            try:
                entry = checkpoint.write_head(self._directory, version, number, *state)
            except Exception as error:  # whatever it is: the coordinator waits for an answer
                said = str(error) if isinstance(error, StorageError) else f"{type(error).__name__}: {error}"
                why = f"the state of head {number}: {said}"
            inject("saved", head=number, version=version)
        client.call_coordinator("add_checkpoint_part", version, number, entry, why)

    def start_head(self, head: Head, reply: CoordinatorReply, base: Tensor, context: RunContext) -> str:
        """Starts a head as the coordinator says. Gives what it had to do without, in words.

        Raises:
            WorkerFailed: the state that it is to go on from exactly can't be read.
        """
        begin = reply.join_replies[head.number]
        reference = None if begin.reference is None else context.transport.fetch(begin.reference).clone()
        saved, lacks = None, ""
        if begin.checkpoint is not None:
            try:
                saved = checkpoint.read_head(
                    self._directory, checkpoint.read_manifest(self._directory, begin.checkpoint), head.number
                )
                if begin.exact:
                    restore(head, saved, base)
                    return ""
            except StorageError as error:
                if begin.exact:
                    raise WorkerFailed(f"head {head.number}", None, str(error)) from error
                lacks = f"its saved optimizer state can't be read ({error})"
        return rejoin(head, begin.position, reference, reply.version, base, saved) or lacks

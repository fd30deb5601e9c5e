"""A head process's part in checkpoints: snapshots between two steps, written while it trains, and read at the start."""

from __future__ import annotations

import threading
from collections.abc import Sequence
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
    """Takes snapshots of heads and writes them. Storage that fails doesn't stop a head from training.

    Requests arrive in replies of the coordinator or through the driver, and some arrive twice. Either way they come here, and
    each head writes once for a checkpoint.

    Args:
        directory: the run's.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._requests: list[CheckpointRequest] = []
        self._lock = threading.Lock()
        self._training_ended = False
        # By request and head: a second snapshot would overwrite the state whose checksum the coordinator has.
        self._written: set[tuple[int, int]] = set()

    @property
    def snapshot_requested(self) -> bool:
        """Whether a snapshot is requested, so that a head should stop its round between two steps."""
        return bool(self._requests)

    def request_snapshots(self, requests: Sequence[CheckpointRequest], group: HeadGroup, client: CoordinatorClient) -> None:
        """Requests snapshots; they are taken at once if the heads don't train any more."""
        with self._lock:
            self._requests += requests
            at_once = self._training_ended
        if at_once:
            self.take_requested_snapshots(group, client)

    def take_requested_snapshots(self, group: HeadGroup, client: CoordinatorClient) -> None:
        """Takes the snapshots that were requested; to be called between two steps."""
        with self._lock:
            requests, self._requests = self._requests, []
        for request in requests:
            self._take_snapshots(group, client, request)

    def end_training(self, group: HeadGroup, client: CoordinatorClient) -> None:
        """Records that the heads don't train any more: from now on snapshots are taken when they are requested."""
        with self._lock:
            self._training_ended = True
        self.take_requested_snapshots(group, client)

    def _take_snapshots(self, group: HeadGroup, client: CoordinatorClient, request: CheckpointRequest) -> None:
        """Copies the states of the heads that the request names; they are written in another thread."""
        for head in group.heads:
            if head.number not in request.sequences or (request.id, head.number) in self._written:
                continue
            self._written.add((request.id, head.number))
            state, problem = None, ""
            with head.timer.measure("checkpoint"):
                try:
                    state = snapshot(head, request)
                except StateMissed:
                    pass
                except Exception as error:  # the user's optimizer or schedule: it costs the checkpoint, not the head
                    problem = f"the state of head {head.number}: {error}"
            inject("snapshot", head=head.number, step=head.step, version=request.version)
            client.run_in_background(partial(self._write, client, request.version, head.number, state, problem))

    def _write(self, client: CoordinatorClient, version: int, number: int, state: SavedState | None, problem: str) -> None:
        entry = None
        if state is not None:
            try:
                entry = checkpoint.write_head(self._directory, version, number, *state)
            except Exception as error:  # any: the coordinator waits for an answer
                reason = str(error) if isinstance(error, StorageError) else f"{type(error).__name__}: {error}"
                problem = f"the state of head {number}: {reason}"
            inject("saved", head=number, version=version)
        client.call_coordinator("add_checkpoint_part", version, number, entry, problem)

    def start_head(self, head: Head, reply: CoordinatorReply, base: Tensor, context: RunContext) -> str:
        """Starts a head where the coordinator says.

        Returns:
            What the head had to do without, in words; empty if nothing.

        Raises:
            WorkerFailed: the state from which the head must resume exactly can't be read.
        """
        join_reply, directory = reply.join_replies[head.number], self._directory
        reference = None if join_reply.reference is None else context.transport.fetch(join_reply.reference).clone()
        saved, missing = None, ""
        if join_reply.checkpoint is not None:
            try:
                manifest = checkpoint.read_manifest(directory, join_reply.checkpoint)
                saved = checkpoint.read_head(directory, manifest, head.number)
                if join_reply.exact:
                    restore(head, saved, base)
                    return ""
            except StorageError as error:
                if join_reply.exact:
                    raise WorkerFailed(f"head {head.number}", None, str(error)) from error
                missing = f"its saved optimizer state can't be read ({error})"
        return rejoin(head, join_reply.position, reference, reply.version, base, saved) or missing

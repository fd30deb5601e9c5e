"""A head process's part in checkpoints: snapshots between two steps, written while it trains, and read at the start."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from torch import Tensor

from lte_ray import checkpoint
from lte_ray.engine.head.head import Head
from lte_ray.engine.head.snapshot import SavedState, StateMissed, rejoin, restore, snapshot
from lte_ray.engine.head.virtual import HeadGroup
from lte_ray.errors import StorageError, WorkerFailed
from lte_ray.fault_injection import inject
from lte_ray.messages import CheckpointRequest, CommittedPosition, CoordinatorReply
from lte_ray.runtime.context import RunContext
from lte_ray.runtime.head.client import CoordinatorClient
from lte_ray.storage import RunDirectory

log = logging.getLogger("lte_ray")


class HeadCheckpointer:
    """Takes snapshots of heads and writes them. Storage that fails doesn't stop a head from training.

    Requests arrive in replies of the coordinator or through the driver, and some arrive twice. Either way they come here, and
    each head writes once for a checkpoint.

    Args:
        directory: the run's.
        moved: files with the states of heads that were on another node until now.
    """

    def __init__(self, directory: RunDirectory, moved: Mapping[int, checkpoint.FileEntry]) -> None:
        self._directory, self._moved = directory, moved
        self._starts: dict[int, CommittedPosition] = {}
        self._moving: dict[int, Future[checkpoint.FileEntry | None]] = {}
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

    # -- moving to another node ------------------------------------------------------------------------------------------

    def save_to_move(self, head: Head, client: CoordinatorClient) -> None:
        """Saves the state of a head that has contributed all that it has trained and leaves, once, for its next process."""
        if head.number in self._moving:
            return
        state, start = head.state, self._starts[head.number]
        sequence = state.merged.sequence if state.pending is None else state.sequence
        with head.timer.measure("checkpoint"):
            try:
                tensors, meta = snapshot(head, CheckpointRequest(head.version, {head.number: sequence}))
            except Exception:  # the user's optimizer or schedule: the next process does without
                log.warning("The state of head %d, which moves, can't be saved.", head.number, exc_info=True)
                return
        if sequence == start.sequence:  # an earlier process has made that contribution
            meta["incarnation"] = start.incarnation
        self._moving[head.number] = client.run_in_background(partial(self._write_moved, head.number, tensors, meta))

    def _write_moved(self, number: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> checkpoint.FileEntry | None:
        try:
            entry = checkpoint.write_moved_head(self._directory, number, tensors, meta)
        except StorageError as error:
            log.warning("The state of head %d, which moves, can't be saved: %s", number, error)
            return None
        inject("moved", head=number)
        return entry

    def moved_states(self) -> dict[int, checkpoint.FileEntry]:
        """Waits until the states of heads that move are written; returns their files."""
        entries = {number: writing.result() for number, writing in self._moving.items()}
        return {number: entry for number, entry in entries.items() if entry is not None}

    # -- starting --------------------------------------------------------------------------------------------------------

    def start_head(self, head: Head, reply: CoordinatorReply, base: Tensor, context: RunContext) -> str:
        """Starts a head where the coordinator says.

        Returns:
            What the head had to do without, in words; empty if nothing.

        Raises:
            WorkerFailed: the state from which the head must resume exactly can't be read.
        """
        join_reply, directory = reply.join_replies[head.number], self._directory
        reference = None if join_reply.reference is None else context.transport.fetch(join_reply.reference).clone()
        saved, missing = self._read_moved(head.number), ""
        self._starts[head.number] = join_reply.position
        if saved is None and join_reply.checkpoint is not None:
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

    def _read_moved(self, head: int) -> SavedState | None:
        if head not in self._moved:
            return None
        try:
            return checkpoint.read_moved_head(self._directory, self._moved[head])
        except (StorageError, ValueError, KeyError) as error:
            log.warning("Head %d continues without the state that it left on its former node: %s", head, error)
            return None

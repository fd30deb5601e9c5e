"""What runs in each process of ordinary training: rounds of the engine, and in the first one checkpoints and reports."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from torch import Tensor, distributed

from lte_ray import checkpoint, fault_injection, storage
from lte_ray.config.profile_window import parse_window
from lte_ray.engine.coordinator.broadcast_log import alternative_bytes
from lte_ray.engine.coordinator.coordinator import Coordinator
from lte_ray.engine.data_parallel import TrainingProcess
from lte_ray.engine.gpu_memory import explaining_limit, limit_gpu_memory
from lte_ray.engine.head.snapshot import SavedState, snapshot
from lte_ray.engine.process_tuning import keep_freed_memory, release_freed_memory
from lte_ray.errors import LTEError, StorageError, WorkerError, WorkerFailed
from lte_ray.fault_injection import inject
from lte_ray.messages import CheckpointRequest, MergeRecord
from lte_ray.runtime.coordinator.actor import load_engine
from lte_ray.runtime.coordinator.aggregators import Published
from lte_ray.runtime.coordinator.broadcast import is_due
from lte_ray.runtime.coordinator.checkpointing import CheckpointManager
from lte_ray.runtime.coordinator_state import CoordinatorState, load_checkpoint
from lte_ray.runtime.data_parallel.messages import ProcessReport, ProcessSetup
from lte_ray.runtime.tracing import Tracer
from lte_ray.storage import RUN

REPORT_SECONDS = 0.25
"""Seconds between two reports of the first process."""


def run_process(setup: ProcessSetup, actor: Any) -> None:
    """Trains to the end of the run; Ray Train calls this in each process.

    Args:
        setup: of the run.
        actor: the handle of the `DataParallelActor` that started the processes.

    Raises:
        LTEError: the run can't continue; the actor knows it.
        Exception: anything else: Ray Train starts all processes again.
    """
    fault_injection.arm(setup.context.fault_script)
    rank, device = ray.train.get_context().get_world_rank(), ray.train.torch.get_device()
    try:
        version = _agree_on_start(setup, actor, rank, device)
        if version is not None:
            limit_gpu_memory(setup.gpu_memory, device)
            with explaining_limit(setup.gpu_memory, f"Process {rank} of ordinary training"):
                _train(setup, actor, rank, device, version)
    except LTEError as error:
        ray.get(actor.fail.remote(error))
        raise


def _agree_on_start(setup: ProcessSetup, actor: Any, rank: int, device: torch.device) -> int | None:
    """Returns the version from which all processes start, as the first one decides; None if the run has ended."""
    version = 0
    if rank == 0:
        newest = checkpoint.newest_resumable(setup.context.directory) if setup.context.directory.exists(RUN) else None
        version = newest.version if newest is not None else 0
        version = version if ray.get(actor.begin.remote(version)) else -1
    shared = torch.tensor([version], device=device)
    distributed.broadcast(shared, 0)
    version = int(shared.item())
    return version if version >= 0 else None


def _train(setup: ProcessSetup, actor: Any, rank: int, device: torch.device, version: int) -> None:
    torch.set_num_threads(setup.threads)
    keep_freed_memory()
    context = setup.context
    try:
        worker = context.worker.load()
    except WorkerError as error:
        raise WorkerFailed("head 0", None, str(error)) from error
    if not context.directory.exists(RUN):
        raise StorageError(
            f"{context.directory.display} isn't seen from the node of process {rank}. On several nodes --storage must be a "
            "place that all of them share (s3://, gs://, NFS)."
        )
    state = setup.start
    if version != state.version:
        state = load_checkpoint(context, setup.plans, version, 1, setup.policy.load())
    # Only the first process evaluates and saves, so only it needs the moving average.
    settings = context.settings if rank == 0 else replace(context.settings, train=replace(context.settings.train, ema=0.0))
    own_state = state if rank == 0 else replace(state, ema=None)
    coordinator = load_engine(replace(context, settings=settings), setup.plans, setup.policy, own_state, local=True)
    process = TrainingProcess(worker, context.settings, coordinator, rank, distributed.all_reduce, device=device)
    if process.head.plan != setup.plans[0]:
        reason = "build_model() gives another model here than in the driver."
        raise WorkerFailed("head 0", None, reason)
    saved: SavedState | None = None
    if 0 in state.exact_heads:
        saved = checkpoint.read_head(context.directory, checkpoint.read_manifest(context.directory, version), 0)
    process.start(saved)
    release_freed_memory()
    tracer = Tracer(context.directory, "head-0", parse_window(settings.train.profile) if rank == 0 else None)

    def before_step() -> bool:
        tracer.before_step(process.head.step)
        return False

    process.head.interrupted = before_step
    recorder = Recorder(setup, process, coordinator, state, actor) if rank == 0 else None
    while not process.done:
        merges = process.train_round()
        inject("round", head=rank, step=process.head.step)
        if recorder is not None:
            recorder.record(merges)
    tracer.end()
    if recorder is not None:
        recorder.finish()


class Recorder:
    """The first process's records: it writes the checkpoints, and reports to the actor in a thread of its own.

    Args:
        setup: of the run.
        process: that trains here.
        coordinator: its own.
        state: from which it started.
        actor: gets the reports.
    """

    def __init__(
        self, setup: ProcessSetup, process: TrainingProcess, coordinator: Coordinator, state: CoordinatorState, actor: Any
    ) -> None:
        self._context, self._process, self._coordinator, self._actor = setup.context, process, coordinator, actor
        self._checkpoints = CheckpointManager(setup.context, setup.plans[0], state.checkpoint_version, state.saved_heads)
        self._start_step = process.head.step
        self._last = MergeRecord(
            coordinator.version, time.time(), (), 0, 0, {}, 0, 0, step=self._start_step, steps_taken=coordinator.steps_taken
        )
        self._writing: Future[None] | None = None
        self._lock, self._sending = threading.Lock(), threading.Lock()
        self._report = ProcessReport(process.head.status())
        self._ended = threading.Event()
        self._stop = False
        process.stop_requested = lambda: self._stop
        self._thread = threading.Thread(target=self._send_reports, daemon=True)
        self._thread.start()

    def record(self, merges: Sequence[MergeRecord]) -> None:
        """Records the merges of a round, and begins a checkpoint if one is due and none is being written."""
        train = self._context.settings.train
        for merge in merges:
            version = merge.version
            saves = is_due(train.checkpoint_every, version - 1, version) and (self._writing is None or self._writing.done())
            evaluates = is_due(train.eval_every, version - 1, version) or (saves and self._context.retention.best > 0)
            base, ema = self._copy_weights() if saves or evaluates else (None, None)
            processes = train.baseline_processes
            sent = alternative_bytes(self._coordinator.plan.base.size, processes, processes, merge.steps * processes)
            self._last = replace(merge, bytes_up=0, bytes_down=0, alternative_bytes=sent)
            with self._lock:
                bases, emas = (
                    {**flats, **({version: flat.numpy()} if flat is not None and evaluates else {})}
                    for flats, flat in ((self._report.bases, base), (self._report.emas, ema))
                )
                self._report = replace(self._report, merges=(*self._report.merges, self._last), bases=bases, emas=emas)
            if base is not None and saves:
                self._begin_checkpoint(base, ema)

    def finish(self) -> None:
        """Writes the last version, unless it is written, and says that the run has ended, or was stopped."""
        if self._writing is not None:
            self._writing.result()
        (base, ema), head = self._copy_weights(), self._process.head
        if self._checkpoints.newest != self._last.version and self._last.version:
            self._begin_checkpoint(base, ema).result()
        head.mark_done()
        average = None if ema is None else ema.numpy()
        final = (self._coordinator.version, base.numpy(), average)
        with self._lock:
            self._report = replace(self._report, final=final)
        self._ended.set()
        self._thread.join()

    def _copy_weights(self) -> tuple[Tensor, Tensor | None]:
        """Copies the weights and their moving average, which the coordinator continues to write to."""
        ema = self._coordinator.ema
        return self._coordinator.base.clone(), None if ema is None else ema.clone()

    def _begin_checkpoint(self, base: Tensor, ema: Tensor | None) -> Future[None]:
        """Takes the snapshot at once; another thread writes it."""
        head, record = self._process.head, self._last
        request = CheckpointRequest(record.version, {0: self._coordinator.positions[0].sequence}, id=time.time_ns())
        saved: SavedState | str
        with head.timer.measure("checkpoint"):
            try:
                saved = snapshot(head, request)
            except WorkerError as error:  # the user's optimizer or schedule: it costs the checkpoint, not the run
                saved = str(error)
        facts, policy = self._coordinator.checkpoint_facts(), self._coordinator.policy_state()
        self._checkpoints.begin_checkpoint(record, request, facts, policy)
        self._writing = storage.run_in_thread(lambda: asyncio.run(self._write(record.version, base, ema, saved)))
        return self._writing

    async def _write(self, version: int, base: Tensor, ema: Tensor | None, saved: SavedState | str) -> None:
        """Writes a checkpoint. Instead of the head's state, `saved` may say why there is none."""
        await asyncio.to_thread(self._send_report)  # first: a run that continues from this checkpoint lacks none of its merges
        publish = self._context.transport.publish
        average = {} if ema is None else {-1: publish(ema)}
        await self._checkpoints.write_base(version, Published(version, {-1: publish(base)}, ema=average))
        if isinstance(saved, str):
            await self._checkpoints.add_part(version, 0, None, f"the state of head 0: {saved}")
            return
        try:
            entry = await asyncio.to_thread(checkpoint.write_head, self._context.directory, version, 0, *saved)
        except StorageError as error:
            await self._checkpoints.add_part(version, 0, None, f"the state of head 0: {error}")
        else:
            await self._checkpoints.add_part(version, 0, entry)

    def _send_reports(self) -> None:
        """Reports until the end."""
        while not self._ended.wait(REPORT_SECONDS):
            self._send_report()
        self._send_report()

    def _send_report(self) -> None:
        """Reports what is new, and learns whether the run is to stop."""
        with self._sending:  # reports arrive in order
            with self._lock:
                report, self._report = self._report, replace(self._report, merges=(), bases={}, emas={})
            status = replace(self._process.head.status(), note=storage.pending_problem())
            checkpoints = self._checkpoints
            report = replace(report, status=status, checkpoint=checkpoints.newest, problem=checkpoints.problem)
            self._stop = ray.get(self._actor.report.remote(report))

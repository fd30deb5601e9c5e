"""Ordinary training in several processes, seen from the driver: Ray Train runs it, the driver writes the same records."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
from torch import Tensor

from lte_ray import checkpoint
from lte_ray.config import FailureConfig
from lte_ray.engine.failure_policy import FailurePolicy
from lte_ray.engine.hang_detector import HangDetector
from lte_ray.engine.prepare import Initial
from lte_ray.engine.process_tuning import head_threads
from lte_ray.errors import HeadLost, LeaseLost, LTEError, RunError, StorageError, UserError
from lte_ray.run.callbacks import CallbackList
from lte_ray.run.metrics import Reporter
from lte_ray.runtime.context import PickledObject, RunContext
from lte_ray.runtime.controller.actor_launcher import ActorLauncher
from lte_ray.runtime.controller.evaluation import Evaluations
from lte_ray.runtime.controller.head_actors import HeadActorSlot, SlotState
from lte_ray.runtime.controller.progress import ProgressMonitor
from lte_ray.runtime.controller.run_state import RunPhase, RunState
from lte_ray.runtime.coordinator.actor import CoordinatorStatus
from lte_ray.runtime.coordinator_state import CoordinatorState
from lte_ray.runtime.data_parallel.actor import FOLDER, DataParallelActor
from lte_ray.runtime.data_parallel.messages import ProcessesStatus, ProcessSetup
from lte_ray.runtime.placement import Placement
from lte_ray.runtime.ray_errors import ray_get

POLL = 0.5
"""Seconds between two polls of the actor."""

WHO = "ordinary training"
"""What errors call the processes."""


class _Processes:
    """The processes as slots, for those who count them or explain what the run waits for."""

    def __init__(self, count: int) -> None:
        self.slots = [HeadActorSlot((rank,), None, state=SlotState.TRAINING) for rank in range(count)]
        for slot in self.slots:
            slot.health.begun = time.monotonic()

    def have_answered(self) -> None:
        for slot in self.slots:
            slot.health.answered = time.monotonic()


class DataParallelController:
    """Runs ordinary training in several processes from its start to its end.

    Args:
        context: what every process gets.
        initial: the model and its plan.
        start: the state that the run starts from.
        policy: the merge policy.
        placement: what each process reserves.
        failure: what happens when processes die.
        reporter: shows progress.
        export: receives the final weights and their moving average (flat; None if there is none) as soon as they exist.
        callbacks: that follow the run and may end it early.

    Attributes:
        state: what is known of the run.
        progress: sums it up for displays.
    """

    def __init__(
        self,
        context: RunContext,
        initial: Initial,
        start: CoordinatorState,
        policy: PickledObject,
        placement: Placement,
        failure: FailureConfig,
        reporter: Reporter,
        export: Callable[[Tensor, Tensor | None], None],
        callbacks: CallbackList | None = None,
    ) -> None:
        self._context, self._start, self._placement = context, start, placement
        self._failure, self._reporter, self._export = failure, reporter, export
        train = context.settings.train
        _, threads = head_threads(train.threads_per_head, placement.cpus)
        self._setup = ProcessSetup(context, initial.plans, policy, start, threads, placement.gpu_memory)
        launcher = self._launcher = ActorLauncher(context, initial, placement, "never")
        self._processes = _Processes(train.baseline_processes)
        state = self.state = RunState(context.directory, 1, start, callbacks)
        self.progress = ProgressMonitor(state, self._processes, context.settings)
        failure_policy, hang_detector = FailurePolicy(failure), HangDetector()
        self._evaluations = Evaluations(state, context, self._processes, launcher, failure_policy, hang_detector)
        self._starts = 0
        self._actor: Any = None
        self._fit: Any = None

    def run(self) -> None:
        """Runs the training to its end.

        Raises:
            RunError: it ended early. All processes are gone, and complete checkpoints remain.
        """
        try:
            with self._actors():
                try:
                    self._finish(self._train())
                except BaseException as error:
                    self._save_early(error)
                    raise
            self.state.finish()
        except UserError as error:  # of any kind: the run had begun
            raise RunError(str(error)) from error
        finally:
            with contextlib.suppress(LTEError, OSError):  # must not hide what ended the run
                self.state.log.close()
                checkpoint.remove_incomplete(self._context.directory)
                self._context.directory.delete(FOLDER)

    @contextlib.contextmanager
    def _actors(self) -> Iterator[None]:
        """Starts the actor, which starts the processes, and ends all of them after the block."""
        try:
            failure = self._failure
            limits = (failure.max_failures, failure.head_failures)
            options = self._launcher.unreserved()
            self._actor = self._launcher.launch(DataParallelActor, options, self._setup, self._placement, *limits)
            self._fit = self._actor.fit.remote()
            self._evaluations.add_first(self._start)
            yield
        finally:
            self._launcher.end_all()

    def _train(self) -> tuple[int, Any, Any]:
        """Watches the training; returns the last version and handles of its weights and their moving average.

        Raises:
            LTEError: the run can't continue.
        """
        self.state.enter(RunPhase.TRAINING)
        running, stopping = True, False
        while running:
            if self.state.ends_early and not stopping:
                stopping = True
                self._actor.stop.remote()
            running = not ray.wait([self._fit], timeout=POLL)[0]
            if not running:
                ray_get(self._fit, WHO)
            status = self._poll()
            self.state.log.flush()
            if self.state.have_stepped([0]):
                self._evaluations.poll()
            self.progress.check_for_stall()
            self._reporter.update(self.progress.snapshot())
            self.state.check_stops()
        if status.final is None:
            raise HeadLost(f"The processes of {WHO} ended before the run did.")
        return status.final

    def _poll(self) -> ProcessesStatus:
        """Records what the processes have reported."""
        state = self.state
        answer = self._actor.status.remote(state.newest_version, self._starts)
        status: ProcessesStatus = ray_get(answer, WHO)
        if status.starts > self._starts:
            self._processes.have_answered()
            if self._starts:
                state.rewind(status.start_version)
                state.log.record_event("processes_restart", version=status.start_version, incarnation=status.starts - 1)
                if status.start_version == 0 and not state.evaluations:
                    self._evaluations.add_first(self._start)
            self._starts = status.starts
        state.record_coordinator(
            CoordinatorStatus(state.newest_version, "", status.merges, status.checkpoint, storage_problem=status.problem), 0
        )
        if status.status is not None:
            state.record_heads([status.status], 0)
        return status

    def _save_early(self, why: BaseException) -> None:
        """Ends a run early: the processes save the version that their round leads to, as far as time allows."""
        if isinstance(why, LeaseLost):  # another driver's run: nothing may be written
            self.state.enter(RunPhase.FAILED)
            return
        end = self.state.end_early(why, self._failure.grace)
        with contextlib.suppress(ray.exceptions.RayError, LTEError):
            self._actor.stop.remote()
            ray.wait([self._fit], timeout=max(0.0, end - time.monotonic()))
            self._poll()

    def _finish(self, final: tuple[int, Any, Any]) -> None:
        """Exports the last version, evaluates it, and gets a sample.

        Raises:
            StorageError: the last checkpoint couldn't be written.
            LTEError: the worker's code raised.
        """
        version, base, ema = final
        self.state.enter(RunPhase.SAVING)
        if self.state.ends_early and self.state.furthest_step < self._context.settings.train.steps:
            self.state.record_stop(version)
        fetch = self._context.transport.fetch
        self._export(
            fetch(base).clone(), None if ema is None else fetch(ema).clone()
        )  # first: what follows is the worker's code, and may fail
        if version and self.state.checkpoint != version:
            problem = self.state.storage_problem or f"checkpoint {version} couldn't be written."
            raise StorageError(f"{problem} The weights were exported.")
        self._evaluations.finish(version, base, ema, lambda: self._reporter.update(self.progress.snapshot()))

"""One run on Ray, seen from the driver: starts the actors, watches and replaces them, and ends them.

The driver owns coordinator, heads and evaluator as siblings, so that none dies with another. It moves no tensors: it watches,
has versions evaluated, and writes the metrics.

The controller is the root of a tree that imports downward only::

    controller
    ├── node_draining
    ├── failure_handling, coordinator_recovery, evaluation, progress
    ├── head_actors
    ├── coordinator_group
    └── actor_launcher, run_state

None of these holds the controller. What concerns two of them passes through it: recovery returns the heads that stayed silent,
and the controller gives them to the failure handler.
"""

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
from lte_ray.errors import CoordinatorLost, HeadLost, LeaseLost, LTEError, RunError, StorageError, UserError, WorkerFailed
from lte_ray.messages import CheckpointRequest
from lte_ray.run.callbacks import CallbackList
from lte_ray.run.metrics import Reporter
from lte_ray.runtime.context import PickledObject, RunContext
from lte_ray.runtime.controller.actor_launcher import ActorLauncher
from lte_ray.runtime.controller.coordinator_group import CoordinatorGroup
from lte_ray.runtime.controller.coordinator_recovery import CoordinatorRecovery
from lte_ray.runtime.controller.evaluation import Evaluations
from lte_ray.runtime.controller.failure_handling import FailureHandler
from lte_ray.runtime.controller.head_actors import HeadActorGroup, HeadActorSlot, SlotState
from lte_ray.runtime.controller.node_draining import NodeDraining
from lte_ray.runtime.controller.progress import ProgressMonitor
from lte_ray.runtime.controller.run_state import RunPhase, RunState
from lte_ray.runtime.coordinator.actor import CoordinatorStatus
from lte_ray.runtime.coordinator_state import CoordinatorState
from lte_ray.runtime.head.actor import HeadsEnd
from lte_ray.runtime.object_store import ObjectLost
from lte_ray.runtime.placement import Reservation
from lte_ray.runtime.ray_errors import PROCESS_DIED, ray_get

POLL = 0.5
"""Seconds between two polls of the actors."""

CONFIRM = 1.0
"""Seconds that a head's process has to confirm that it will write its state, while the run continues."""

LAST_CHECKPOINT = 60.0
"""Seconds until the last checkpoint must have begun, at the end of a run."""

MOVE_BEFORE = 10.0
"""Seconds before its node is taken away at which the coordinator moves, even if heads are still about to leave."""

REPLY = 5.0
"""Seconds to wait for what a coordinator that moves has sent to heads."""

LAST_CONFIRM = 30.0
"""Seconds that a head's process has at least to confirm that it will write its state into the last checkpoint."""


class TrainController:
    """Runs one training on Ray from its start to its end.

    Args:
        context: what every actor gets.
        initial: the model, the plans and the first base.
        start: the state that the run starts from.
        policy: the merge policy.
        reservation: the actors' places in the cluster.
        failure: what happens when processes die.
        stack_heads: whether an actor's heads are computed as one batch.
        reporter: shows progress.
        export: receives the final base and its moving average (flat; None if there is none) as soon as they exist.
        callbacks: that follow the run and may end it early.

    Attributes:
        state: what is known of the run.
        progress: sums it up for displays.
        heads, coordinator: its processes.
    """

    def __init__(
        self,
        context: RunContext,
        initial: Initial,
        start: CoordinatorState,
        policy: PickledObject,
        reservation: Reservation,
        failure: FailureConfig,
        stack_heads: str,
        reporter: Reporter,
        export: Callable[[Tensor, Tensor | None], None],
        callbacks: CallbackList | None = None,
    ) -> None:
        self._context, self._start, self._reservation = context, start, reservation
        self._failure, self._reporter, self._export = failure, reporter, export
        hang_detector, failure_policy = HangDetector(), FailurePolicy(failure)
        launcher = self._launcher = ActorLauncher(context, initial, reservation.placement, stack_heads)
        state = self.state = RunState(context.directory, context.settings.lte.num_heads, start, callbacks)
        if context.settings.data_problem:
            state.log.record_event("data", why=context.settings.data_problem)
        coordinator = self.coordinator = CoordinatorGroup(context, initial, policy, launcher, hang_detector)
        heads = self.heads = HeadActorGroup(coordinator, launcher, hang_detector)
        self.progress = ProgressMonitor(state, heads, context.settings)
        self._evaluations = Evaluations(state, context, heads, launcher, failure_policy, hang_detector)
        self._failure_handler = FailureHandler(
            state, heads, coordinator, failure_policy, reservation, len(initial.plans), context.settings.lte.num_heads
        )
        merges_wait = context.settings.merge.when != "arrival"
        self._draining = NodeDraining(state, heads, merges_wait)
        self._recovery = CoordinatorRecovery(state, heads, coordinator, failure_policy, context, initial, start)

    def run(self) -> None:
        """Runs the training to its end.

        Raises:
            RunError: it ended early. All actors are gone, and complete checkpoints remain.
        """
        try:
            with self.actors():
                try:
                    self._train()
                    self._finish()
                except BaseException as error:
                    self._save_early(error)
                    raise
            self._check_complete()
            self.state.finish()
        except UserError as error:  # of any kind: the run had begun
            raise RunError(str(error)) from error
        finally:
            with contextlib.suppress(LTEError, OSError):  # must not hide what ended the run
                self.state.log.close()
                checkpoint.remove_incomplete(self._context.directory)

    def _check_complete(self) -> None:
        """Raises RunError if heads that found no place have steps left, unless the run may do without them."""
        missing = ", ".join(self._failure_handler.ended_without)
        if missing and self._failure.exhausted == "stop":
            self.state.enter(RunPhase.FAILED)
            why = (
                f"The run ended without {missing}: the cluster had no place for "
                f"{self._reservation.last_patience:.0f} s (--resource-timeout), and all others were done. The last version is "
                "saved. Continue with --resume when there is room; with --exhausted drop this is no error."
            )
            self.state.log.record_event("ended_early", why=why)
            raise RunError(why)

    @contextlib.contextmanager
    def actors(self) -> Iterator[None]:
        """Starts the heads and the coordinator, and ends all actors after the block."""
        try:
            self.heads.launch_all(self._reservation.heads_and_strategies())
            self.coordinator.begin(self._start)
            self._failure_handler.begin_without(self._reservation.missing)
            for slot in self.heads.slots:
                self.heads.start(slot)
            self._evaluations.add_first(self._start)
            yield
        finally:
            self._launcher.end_all()

    # -- while heads train ---------------------------------------------------------------------------------------------

    def _train(self) -> None:
        """Watches the processes until all heads have ended, or the run ends early by its rules.

        Replaces those that die, has versions evaluated, reports.
        """
        self.state.enter(RunPhase.TRAINING)
        while self.heads.busy and not self.state.ends_early:
            for slot in self.heads.wait_for_ended(POLL):
                if slot.state is SlotState.TRAINING:  # else it was restarted since the coordinator was lost
                    self._handle_end(slot)
            self.state.record_heads(self.heads.poll(), self.coordinator.epoch)
            self._check_processes()
            self.state.log.flush()
            if self.state.have_stepped(self.heads.heads):
                self._evaluations.poll()
            self._report()
            self.state.check_stops()

    def _handle_end(self, slot: HeadActorSlot) -> None:
        """Deals with heads whose `run` call has returned or failed.

        Raises:
            LTEError: the run can't continue.
        """
        try:
            end: HeadsEnd = ray_get(slot.run, slot.name, self.state.statuses.get(slot.numbers[0]))
        except CoordinatorLost as error:
            self._recover(str(error))
            if slot.state is not SlotState.DROPPED:
                self._failure_handler.handle_loss(slot, error)
        except (WorkerFailed, HeadLost) as error:
            self._failure_handler.handle_loss(slot, error)
        else:
            self.state.record_heads(end.statuses, self.coordinator.epoch)
            if end.moves:
                self._failure_handler.handle_move(slot, end.states)
            else:
                self._failure_handler.handle_finish(slot)

    def _check_processes(self) -> None:
        """Checks all processes once, the coordinator first, since heads depend on it."""
        try:
            self._poll_coordinator()
        except CoordinatorLost as error:
            self._recover(str(error))
        self._failure_handler.drop_starved()
        if self.coordinator.loss_spike is not None:
            try:
                self._recovery.roll_back(*self.coordinator.loss_spike)
            except CoordinatorLost as error:
                self._recover(str(error))
        self._failure_handler.check()
        self._leave_nodes()

    def _leave_nodes(self) -> None:
        """Has heads, coordinator and evaluator leave nodes that drain, the coordinator once no head is about to leave."""
        draining = self._draining.check()
        if not draining:
            return
        self._evaluations.leave(draining.keys())
        here = draining.keys() & self.coordinator.nodes()
        if not here:
            return
        left = min((seconds for node in here if (seconds := draining[node]) is not None), default=LAST_CHECKPOINT)
        if left < MOVE_BEFORE or not any(slot.leaves_since is not None for slot in self.heads.training):
            self._move_coordinator(min(here), max(1.0, left / 2))

    def _move_coordinator(self, node: str, seconds: float) -> None:
        """Replaces the coordinator, whose node drains, by one that continues from a checkpoint of this very version.

        Args:
            node: its node, or that of one of its shards.
            seconds: that the checkpoint may take. Without it the next coordinator continues from what the heads know, as after
                a loss.
        """
        end = time.monotonic() + seconds
        with contextlib.suppress(ray.exceptions.RayError):
            self._write_last(end, early=True)
            ray.get(self.coordinator.actor.wait_for_checkpoints.remote(seconds), timeout=max(0.1, end - time.monotonic()))
            self._record(ray.get(self.coordinator.actor.status.remote(self.state.newest_version), timeout=REPLY))
            self._wait_until_received(min(end, time.monotonic() + REPLY))
        self._recover(f"The coordinator leaves node {node[:12]}, which will be taken away", moves=True)

    def _wait_until_received(self, end: float) -> None:
        """Waits until a head has the newest version: otherwise all heads would have to start again from its checkpoint."""
        while time.monotonic() < end and all(s.version < self.state.newest_version for s in self.state.statuses.values()):
            self.state.record_heads(self.heads.poll(), self.coordinator.epoch)

    def _poll_coordinator(self) -> None:
        """Records what the coordinator says, and checks its shards.

        Raises:
            CoordinatorLost: one of these processes died, or hangs.
        """
        status = self.coordinator.poll(self.state.newest_version)
        if status is not None:
            self._record(status)
        self.coordinator.check_shards()

    def _record(self, status: CoordinatorStatus) -> None:
        self.state.record_coordinator(status, self.coordinator.epoch)
        for request in status.checkpoint_requests:
            self._deliver(request, CONFIRM)
        if status.needs_evaluator:
            self.coordinator.actor.use_evaluator.remote(self._evaluations.actor)

    def _recover(self, why: str, moves: bool = False) -> None:
        """Replaces a coordinator that was lost, or that moves to another node.

        Raises:
            LTEError: the run can't continue.
        """
        reports, silent = self._recovery.stop_and_collect(why, moves)
        for slot, error in silent:
            self._failure_handler.handle_loss(slot, error)
        self._recovery.restart(reports, why)

    def _report(self) -> None:
        self.progress.check_for_stall()
        self._reporter.update(self.progress.snapshot())

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _deliver(self, request: CheckpointRequest, timeout: float) -> None:
        """Asks heads for their parts of a checkpoint, which is completed without those that can't be reached."""
        for head in self.heads.request_states(request, timeout):
            self.coordinator.actor.add_checkpoint_part.remote(request.version, head, None)

    def _write_last(self, end: float, early: bool, least: float = 0.1) -> None:
        """Has heads write the checkpoints that are open, among them one of the last version unless it is complete.

        Args:
            end: until when (monotonic). For each checkpoint that isn't complete heads have half of the time that is left.
            early: whether heads still train.
            least: seconds that heads have at least.
        """
        frozen = self.coordinator.actor.freeze.remote(early)
        for request in ray.get(frozen, timeout=max(0.1, end - time.monotonic())):
            self._deliver(request, max(least, (end - time.monotonic()) / 2))

    def _save_early(self, why: BaseException) -> None:
        """Ends a run early: heads write their states into a checkpoint of the last version, as far as time allows."""
        if isinstance(why, LeaseLost):  # another driver's run: nothing may be written
            self.state.enter(RunPhase.FAILED)
            return
        end = self.state.end_early(why, self._failure.grace)
        with contextlib.suppress(ray.exceptions.RayError, LTEError):
            self._write_last(end, early=True)
            left = max(0.1, end - time.monotonic())
            ray.get(self.coordinator.actor.wait_for_checkpoints.remote(left), timeout=left + 0.5)
            self._record(ray.get(self.coordinator.actor.status.remote(self.state.newest_version), timeout=0.5))

    # -- the end -------------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Saves and exports the last version, evaluates it, and gets a sample.

        Raises:
            StorageError: the last checkpoint couldn't be written.
            LTEError: the run can't continue.
        """
        while True:
            self.state.enter(RunPhase.SAVING)
            try:
                version, final, average, factors, problem = self._save_last()
                break
            except (*PROCESS_DIED, CoordinatorLost, ObjectLost, ray.exceptions.GetTimeoutError) as error:
                self._recover(str(error))
                self._train()  # heads that died together with it have steps to take again
        if self.heads.busy:
            self.state.record_stop(version)
            self.heads.end_training()
        publish = self._context.transport.publish  # the driver owns what it publishes, so that it outlives the coordinator
        base, ema = publish(final), None if average is None else publish(average)
        adapters = {head: publish(each) for head, each in factors.items()}
        merges = not self._context.settings.merge.never_merge
        if merges:
            self._export(final, average)  # first: what follows is the worker's code, and may fail
        if problem:
            raise StorageError(f"{problem} The merged weights were exported." if merges else problem)
        self._evaluations.finish(version, base, ema, self._report, adapters)

    def _save_last(self) -> tuple[int, Tensor, Tensor | None, dict[int, Tensor], str]:
        """Returns the last version, its base and moving average (flat), the heads' own factors where they never merge, and what
        was wrong with its checkpoint.

        Raises:
            CoordinatorLost: the coordinator died, or hangs. Ray's errors and `ObjectLost` may say the same.
        """
        self._write_last(time.monotonic() + LAST_CHECKPOINT, early=self.heads.busy, least=LAST_CONFIRM)
        version, base, ema, adapters, problem = self._wait_for(self.coordinator.actor.finish.remote())
        self._record(self._wait_for(self.coordinator.actor.status.remote(self.state.newest_version)))
        fetch = self._context.transport.fetch
        factors = {head: fetch(each).clone() for head, each in adapters.items()}
        return version, fetch(base).clone(), None if ema is None else fetch(ema).clone(), factors, problem

    def _wait_for(self, answer: Any) -> Any:
        """Returns the coordinator's answer, while heads write their parts of the last checkpoint.

        Raises:
            CoordinatorLost: its process died, or hangs.
        """
        while not ray.wait([answer], timeout=POLL)[0]:
            self._poll_coordinator()
            self._failure_handler.check_exited()
            for slot in self.heads.wait_for_ended(0):  # of a run that ends early: its checkpoint does without those that died
                self._failure_handler.let_end(slot)
            self._report()
        return ray_get(answer, "the coordinator")

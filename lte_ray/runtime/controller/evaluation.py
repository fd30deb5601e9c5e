"""Evaluations of the merged weights: one at a time, in the evaluator's process, which is started when it is first needed."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, wait
from typing import Any

import ray

from lte_ray import checkpoint, storage
from lte_ray.engine.failure_policy import FailurePolicy
from lte_ray.engine.hang_detector import HangDetector
from lte_ray.errors import LTEError, RunError, StorageError, UserError, WorkerFailed
from lte_ray.run.metrics import MAX_WRITE_WAIT, Evaluation
from lte_ray.runtime.context import RunContext
from lte_ray.runtime.controller.actor_launcher import ActorLauncher
from lte_ray.runtime.controller.head_actors import HasSlots
from lte_ray.runtime.controller.run_state import PendingEvaluation, RunPhase, RunState
from lte_ray.runtime.coordinator_state import CoordinatorState
from lte_ray.runtime.draining import node_of_actor
from lte_ray.runtime.ray_errors import ray_get

log = logging.getLogger("lte_ray")

FIRST_ANSWER = 120.0
"""Seconds within which the evaluator first answers: it imports torch and the worker's module."""

POLL = 0.5
"""Seconds between two checks of the evaluator while it makes a sample."""


class Evaluations:
    """Has the versions in the run's queue evaluated, and watches the evaluator.

    Args:
        state: of the run, with the queue.
        context: of the run.
        heads: which leave the evaluator some cores.
        launcher: starts and ends the evaluator.
        policy: decides whether another evaluator may start.
        hang_detector: the run's.
    """

    def __init__(
        self,
        state: RunState,
        context: RunContext,
        heads: HasSlots,
        launcher: ActorLauncher,
        policy: FailurePolicy,
        hang_detector: HangDetector,
    ) -> None:
        self._state, self._context, self._heads, self._launcher = state, context, heads, launcher
        self._policy, self._hang_detector = policy, hang_detector
        self._actor: Any = None
        self._result: Any = None  # of the version that the evaluator has
        self._ping: tuple[Any, float] | None = None  # the ping without an answer, and since when
        self._writes: list[Future[None]] = []  # of evaluations into their checkpoints

    @property
    def actor(self) -> Any:
        """The evaluator's handle. Starting it late keeps it from delaying the heads."""
        if self._actor is None:
            self._actor = self._launcher.launch_evaluator(head_actors=len(self._heads.slots))
        return self._actor

    def poll(self, patience: float = 0) -> None:
        """Records the result of an evaluation if there is one within `patience` seconds, and starts the next.

        Raises:
            WorkerFailed: the worker's code raised.
            RunError: the evaluator died or hung too often.
        """
        state = self._state
        if state.evaluating is not None:
            if not ray.wait([self._result], timeout=patience)[0]:
                self._check_alive()
                return
            pending, state.evaluating = state.evaluating, None
            try:
                values = ray_get(self._result, "the evaluator")
            except (WorkerFailed, UserError):
                raise
            except LTEError as error:
                self._handle_loss(str(error))
                return
            evaluation = Evaluation(pending.version, pending.step, values)
            state.record_evaluation(evaluation)
            if self._context.retention.best:
                running = [write for write in self._writes if not write.done()]
                self._writes = [*running, storage.run_in_thread(lambda: self._write(evaluation))]
                wait(self._writes[-1:], MAX_WRITE_WAIT)
        if state.queue:
            pending = state.evaluating = state.queue.popleft()
            self._result = self.actor.evaluate.remote(pending.base, pending.ema, pending.adapters)

    def leave(self, nodes: Collection[str]) -> None:
        """Ends the evaluator if it is on one of these nodes and idle; the next evaluation is made elsewhere."""
        if self._actor is not None and self._state.evaluating is None and node_of_actor(self._actor) in nodes:
            self._launcher.end(self._actor)
            self._actor = self._ping = None

    def add_first(self, start: CoordinatorState) -> None:
        """Queues the initial weights, with which all others are compared, unless the run evaluates at its end only."""
        train = self._context.settings.train
        if train.eval_every and start.version == 0:
            self._state.queue.append(PendingEvaluation(0, 0, start.base, start.base if train.ema else None))

    def add_final(self, version: int, base: Any, ema: Any = None, adapters: Mapping[int, Any] | None = None) -> None:
        """Queues the final version, unless it is or was evaluated already, or the worker evaluates nothing."""
        state = self._state
        if not self._context.evaluates:
            return
        versions = [pending.version for pending in (state.evaluating, *state.queue) if pending is not None]
        versions += [evaluation.version for evaluation in state.evaluations]
        if version not in versions:
            state.queue.append(PendingEvaluation(version, state.furthest_step, base, ema, adapters or {}))

    def finish(
        self,
        version: int,
        base: Any,
        ema: Any,
        report: Callable[[], None],
        adapters: Mapping[int, Any] | None = None,
    ) -> None:
        """Evaluates the final version and all that wait, and gets a sample.

        Args:
            version: the final one.
            base, ema: refer to its weights and their moving average; None if there is none.
            report: called while it waits.
            adapters: by head, refers to its own factors, where nothing is merged.

        Raises:
            LTEError: the worker's code raised.
        """
        self._state.enter(RunPhase.EVALUATING)
        self.add_final(version, base, ema, adapters)
        while self.busy:
            self.poll(patience=POLL)
            report()
        self.wait_for_writes()
        self._state.sample = self.sample(base, adapters)

    @property
    def busy(self) -> bool:
        """Whether a version is being evaluated, or waits for it."""
        return self._state.evaluating is not None or bool(self._state.queue)

    def _write(self, evaluation: Evaluation) -> None:
        """Writes an evaluation into the folder of its checkpoint, if there is one."""
        with contextlib.suppress(StorageError):
            if evaluation.version in checkpoint.complete_versions(self._context.directory):
                checkpoint.write_evaluation(self._context.directory, evaluation.version, evaluation.values)

    def wait_for_writes(self) -> None:
        """Waits until all evaluations are written, as long as storage is waited for."""
        wait(self._writes, self._context.directory.patience)

    def sample(self, base: Any, adapters: Mapping[int, Any] | None = None) -> str | None:
        """Returns what the worker's `sample` returns for the weights, or why there is nothing: a sample can't fail a run."""
        try:
            result = self.actor.sample.remote(base, adapters)
            while self._actor is not None and not ray.wait([result], timeout=POLL)[0]:
                self._check_alive()
            sample: str | None = ray_get(result, "the evaluator")
        except WorkerFailed as error:
            return f"sample() raised: {error.traceback.strip().splitlines()[-1]}"
        except LTEError as error:
            return f"sample() gave nothing: {error}"
        return sample

    def _check_alive(self) -> None:
        """An evaluation may take any time, but its process answers pings meanwhile, unless it hangs."""
        now = time.monotonic()
        self._ping = self._ping or (self.actor.alive.remote(), now)
        ref, since = self._ping
        if ray.wait([ref], timeout=0)[0]:
            self._ping = None
        elif now - since > max(FIRST_ANSWER, self._hang_detector.silence):
            self._state.evaluating = None
            self._handle_loss(f"The process of the evaluator hasn't answered for {now - since:.0f} s.")

    def _handle_loss(self, why: str) -> None:
        """Does without the evaluation; another process makes the next one."""
        decision = self._policy.decide_other()
        self._state.log.record_event("evaluator_lost", why=why.splitlines()[0][:300])
        if decision.action == "stop":
            raise RunError(decision.explain(why))
        log.warning("%s The next evaluation is made by another process.", why.splitlines()[0])
        if self._actor is not None:
            self._launcher.end(self._actor)
            self._actor = self._ping = None

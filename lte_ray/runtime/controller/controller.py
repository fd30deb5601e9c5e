"""One run on Ray, seen from the driver: starts the actors, watches and replaces them, and takes all of it down again.

The driver owns coordinator, heads and evaluator as siblings, so that none dies with another. It moves no tensors: it
watches, has versions evaluated, and keeps the metrics.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from torch import Tensor

from lte_ray import checkpoint, storage
from lte_ray.config import FailureConfig
from lte_ray.engine.coordinator.step_budget import is_shared
from lte_ray.engine.failure_policy import FailurePolicy
from lte_ray.engine.prepare import Initial
from lte_ray.engine.process_tuning import available_cores, head_threads
from lte_ray.errors import ContributionRefused, CoordinatorLost, LTEError, RunError, StorageError, UserError, WorkerFailed
from lte_ray.messages import CheckpointRequest, HeadStatus, MergeRecord
from lte_ray.run.metrics import BRIEF, Evaluation, MetricsLog, Progress, Reporter, samples_per_second
from lte_ray.runtime.context import PickledObject, RunContext
from lte_ray.runtime.controller.coordinator_group import BESIDE, CoordinatorGroup
from lte_ray.runtime.controller.failure_handling import FailureHandler
from lte_ray.runtime.controller.head_actors import HeadActorGroup
from lte_ray.runtime.coordinator.actor import CoordinatorStatus
from lte_ray.runtime.coordinator_state import CoordinatorState
from lte_ray.runtime.evaluator_actor import EvaluatorActor
from lte_ray.runtime.head.actor import HeadActor, HeadHost
from lte_ray.runtime.object_store import ObjectLost
from lte_ray.runtime.placement import Placement, Reservation
from lte_ray.runtime.ray_errors import PROCESS_DIED, ray_get

POLL = 0.5
"""Seconds between two looks at the actors."""

MOST_WAITING = 2
"""Versions that may wait for evaluation; of more, those in the middle are left out, so that memory stays bounded."""

QUIET = 30.0
"""Seconds without a step or a merge after which the run says what it waits for."""

STARTING = 120.0
"""Seconds within which the evaluator answers at first: it imports torch and the worker's module."""

JOB_STOP = 3.0
"""Seconds that Ray gives a stopped job by default (RAY_JOB_STOP_WAIT_TIME_S) before it kills it."""

log = logging.getLogger("lte_ray")


@dataclass
class TrainController:
    """What the driver knows of a run that is on.

    Args:
        common: as every actor.
        initial: model, plans and the first base.
        start: from where the run starts or goes on.
        policy: the merge policy.
        placement: what each actor reserves.
        failure: what happens when processes die.
        stack: whether an actor's heads are computed as one batch.
        reporter: shows progress.
        export: what is done with the final base (flat), as soon as it is there.
    """

    common: RunContext
    initial: Initial
    start: CoordinatorState
    policy: PickledObject
    placement: Placement
    failure: FailureConfig
    stack: str
    reporter: Reporter
    export: Callable[[Tensor], None]
    merges: list[MergeRecord] = field(default_factory=list)
    statuses: dict[int, HeadStatus] = field(default_factory=dict)
    evaluations: list[Evaluation] = field(default_factory=list)
    checkpoint: int | None = None
    sample: str | None = None

    def __post_init__(self) -> None:
        self._begun = time.time()
        self.version = self.start.version
        self.checkpoint = self.start.checkpoint_version
        self.log = MetricsLog(self.common.directory)
        self.log.rewind(self.version)
        if self.version:
            anew = [head for head in range(self.common.settings.lte.num_heads) if not self.start.position(head).sequence]
            self.log.record_event("resumed", version=self.version, heads=self.common.settings.lte.num_heads, anew=anew)
        self.failures = FailurePolicy(self.failure)
        self.note = ""
        self._trouble = self._merging = ""
        self._told: set[tuple[int, int]] = set()  # cuts that heads were asked to write to, and the heads
        self._refused = (0, 0)  # epoch and number of the newest refusal that was noted
        self._poison: set[tuple[int, int, int]] = set()  # head, epoch and sequence of those that were poison
        self._pinged: tuple[Any, float] | None = None  # the evaluator's sign of life that hasn't come yet, and since when
        self._alive: list[Any] = []
        self._to_evaluate: deque[tuple[int, int, Any]] = deque()
        self._evaluating: tuple[int, int, Any] | None = None
        self._evaluator: Any = None
        self._judging: list[Future[None]] = []  # evaluations that are being written
        self._moved = (time.monotonic(), (0, 0))
        self._quiet_said = 0.0
        self.hub = CoordinatorGroup(self.common, self.initial, self.policy, self._launch, self._end)
        self.crew = HeadActorGroup(self.hub, self._launch_heads, self._end)

    def run(self, places: Reservation) -> None:
        """Runs to the end, with the actors in these places.

        Raises:
            RunError: it ended early. All actors are gone, and complete checkpoints remain.
        """
        try:
            with self._actors(places) as mending:
                try:
                    self._watch(mending)
                    self._finish(mending)
                except BaseException as error:
                    self._save(error)
                    raise
        except UserError as error:  # whatever it is, the run had begun
            raise RunError(str(error)) from error
        finally:
            with contextlib.suppress(LTEError, OSError):  # must not hide what ended the run
                self.log.close()
                checkpoint.remove_incomplete(self.common.directory)

    # -- actors --------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _actors(self, places: Reservation) -> Iterator[FailureHandler]:
        try:
            self.crew.launch_all(places.slots())
            self.hub.begin(self.start)
            for member in self.crew.members:
                self.crew.start(member)
            if self.common.settings.train.eval_every and self.version == 0:
                self._to_evaluate.append((0, 0, self.start.base))
            yield FailureHandler(self, places)
        finally:
            for actor in self._alive:
                ray.kill(actor)

    def _launch(self, kind: type, options: dict[str, Any], *args: Any) -> Any:
        # Every actor answers status calls in a group of its own while it works.
        handle = ray.remote(concurrency_groups={"ctl": 4})(kind).options(max_restarts=0, **options).remote(*args)
        self._alive.append(handle)
        return handle

    def _end(self, actor: Any) -> None:
        if actor in self._alive:
            self._alive.remove(actor)
            ray.kill(actor)

    def _launch_heads(self, numbers: tuple[int, ...], strategy: Any, incarnation: int) -> Any:
        placement, (lanes, threads) = self.placement, self._computing
        resources = {k: v for k, v in placement.bundle.items() if k not in ("CPU", "GPU")}
        options = {"num_cpus": placement.bundle.get("CPU", 0), "num_gpus": placement.gpus, "resources": resources}
        options["scheduling_strategy"] = strategy
        host = HeadHost(threads, lanes, placement.gpus > 0, self.stack)
        return self._launch(HeadActor, options, self.common, self.initial.plans, numbers, host, incarnation)

    @property
    def _computing(self) -> tuple[int, int]:
        """Lanes of an actor of heads, and torch's threads in each."""
        return head_threads(self.common.settings.train.threads_per_head, self.placement.cpus, self.placement.heads)

    @property
    def evaluator(self) -> Any:
        """Started when it is first needed, so that it doesn't keep the heads from starting."""
        if self._evaluator is None:
            lanes, threads = self._computing
            wanted = self.placement.gpus
            gpus = wanted if 0 < wanted <= ray.available_resources().get("GPU", 0) else 0  # if the heads leave one
            spare = max(1, available_cores() - lanes * threads * len(self.crew.members))
            options = {**BESIDE, "num_gpus": gpus}
            self._evaluator = self._launch(EvaluatorActor, options, self.common, self.initial.plan, spare, gpus > 0)
        return self._evaluator

    # -- the loop ------------------------------------------------------------------------------------------------------

    def _watch(self, mending: FailureHandler) -> None:
        """Until all heads have ended: polls, replaces what has died, evaluates, reports. May be called again."""
        while self.crew.busy:
            for member in self.crew.ended(POLL):
                try:
                    statuses = ray_get(member.run, member.name, self.statuses.get(member.numbers[0]))
                except LTEError as error:
                    mending.head_ended(member, error)
                else:
                    self._note(statuses)
                    self.crew.over(member)
                    mending.check_quarantined(member)
            self._note(self.crew.look())
            mending.look()
            self.log.flush()
            if all(n in self.statuses and self.statuses[n].step for member in self.crew.members for n in member.numbers):
                self._evaluate()
            self._watchdog()
            self.reporter.update(self.progress())

    def _note(self, statuses: Any) -> None:
        self.statuses.update({status.head: status for status in statuses})
        for status in statuses:  # what a coordinator that is gone can't tell any more, its heads do
            for epoch, sequence in status.dropped:
                if epoch < self.hub.epoch and (status.head, epoch, sequence) not in self._poison:
                    self._poison.add((status.head, epoch, sequence))
                    why = "poison, as the coordinator said before it was lost"
                    self.log.record_event("refused", head=status.head, sequence=sequence, why=why, poison=True)

    def is_now(self, heads: tuple[int, ...], state: str) -> None:
        """What becomes of heads whose process can't say so itself."""
        self.statuses |= {n: replace(self.statuses[n], state=state, note="") for n in heads if n in self.statuses}

    @property
    def seen(self) -> int:
        """The newest version that the driver knows of."""
        return self.merges[-1].version if self.merges else self.version

    def take(self, status: CoordinatorStatus) -> None:
        """What the coordinator says."""
        if status.checkpoint is not None and status.checkpoint != self.checkpoint:
            self.checkpoint = status.checkpoint
        if status.storage_problem and status.storage_problem != self._trouble:
            self.log.record_event("storage", why=status.storage_problem)
            log.warning("%s", status.storage_problem)
        self._trouble, self._merging = status.storage_problem, status.waiting_for
        for number, verdict in status.refusals:
            if (self.hub.epoch, number) > self._refused:
                self._refused = (self.hub.epoch, number)
                if verdict.harmful:
                    self._poison.add((verdict.head, self.hub.epoch, verdict.sequence))
                self.log.record_event(
                    "refused", head=verdict.head, sequence=verdict.sequence, why=verdict.reason, poison=verdict.harmful
                )
        for record in [record for record in status.merges if record.version > self.seen]:  # two answers may tell of one
            if record.base is not None:
                self._to_evaluate.append((record.version, record.step, record.base))
            self.log.record_merge(record)
            self.merges.append(replace(record, base=None))  # a base that is held stays in memory
        while len(self._to_evaluate) > MOST_WAITING:
            del self._to_evaluate[1]  # the first one may be version 0, where everything is measured from
        for save in status.checkpoint_requests:
            new = {head: n for head, n in save.sequences.items() if (save.id, head) not in self._told}
            self._told |= {(save.id, head) for head in new}
            if new:
                self._ask_to_write(replace(save, sequences=new), limit=1.0)
        if status.needs_evaluator:
            self.hub.coordinator.use_evaluator.remote(self.evaluator)

    def rewind(self, version: int) -> None:
        """The run goes on from an earlier version than was seen: what came after it is made again."""
        self.merges = [merge for merge in self.merges if merge.version <= version]
        self.evaluations = [each for each in self.evaluations if each.version <= version]
        self._to_evaluate.clear()
        self._evaluating = None
        self.version = min(version, self.version) if not self.merges else self.version
        self.log.rewind(version)

    def _evaluate(self, patience: float = 0) -> None:
        """Takes an evaluation's result if there is one, and starts the next."""
        if self._evaluating is not None:
            version, step, ref = self._evaluating
            if not ray.wait([ref], timeout=patience)[0]:
                self._check_evaluator()
                return
            self._evaluating = None
            try:
                values = ray_get(ref, "the evaluator")
            except (WorkerFailed, UserError):
                raise
            except LTEError as error:
                self._evaluator_died(str(error))
                return
            evaluation = Evaluation(version, step, values)
            self.evaluations.append(evaluation)
            self.log.record_evaluation(evaluation)
            if self.common.retention.best:
                running = [judging for judging in self._judging if not judging.done()]
                self._judging = [*running, storage.run_in_thread(lambda: self._judge(evaluation))]
                wait(self._judging[-1:], BRIEF)
        if self._to_evaluate:
            version, step, base = self._to_evaluate.popleft()
            self._evaluating = (version, step, self.evaluator.evaluate.remote(base))

    def _judge(self, evaluation: Evaluation) -> None:
        """Writes an evaluation beside its checkpoint, if there is one."""
        with contextlib.suppress(StorageError):
            if evaluation.version in checkpoint.complete_versions(self.common.directory):
                checkpoint.write_evaluation(self.common.directory, evaluation.version, evaluation.values)

    def _check_evaluator(self) -> None:
        """An evaluation may take any time; but its process answers meanwhile, unless it hangs."""
        now = time.monotonic()
        self._pinged = self._pinged or (self.evaluator.alive.remote(), now)
        if ray.wait([self._pinged[0]], timeout=0)[0]:
            self._pinged = None
        elif now - self._pinged[1] > max(STARTING, self.crew.deadlines.silence):
            self._evaluating = None
            self._evaluator_died(f"The process of the evaluator hasn't answered for {now - self._pinged[1]:.0f} s.")

    def _evaluator_died(self, why: str) -> None:
        """One evaluation is missing; the next is made by another process."""
        remedy = self.failures.other()
        self.log.record_event("evaluator_lost", why=why.splitlines()[0][:300])
        if remedy.action == "stop":
            raise RunError(remedy.said(why))
        if self._evaluator is not None:
            self._end(self._evaluator)
            self._evaluator = self._pinged = None

    def _watchdog(self) -> None:
        """Says what the run waits for, when nothing has moved for long."""
        now, where = time.monotonic(), (sum(s.step for s in self.statuses.values()), self.seen)
        if where != self._moved[1]:
            self._moved, self._quiet_said, self.note = (now, where), 0.0, ""
            return
        still = now - self._moved[0]
        if still < QUIET:
            return
        self.note = f"nothing has moved for {still:.0f} s: {self._explained()}"
        if still - self._quiet_said >= QUIET:
            self._quiet_said = still
            log.warning("%s", self.note)
            self.log.record_event("still", seconds=round(still), why=self._explained())

    def _explained(self) -> str:
        reasons = []
        for member in self.crew.members:
            if member.run is None and not member.over:
                reasons.append(f"{member.name} is to be started again")
            elif member.pulse.answered is None and not member.over:
                reasons.append(f"{member.name} is starting, or waits for resources of the cluster")
        reasons += [f"head {s.head} is {s.state}" + (f" ({s.note})" if s.note else "") for s in self.statuses.values()]
        if self._merging:
            reasons.append(f"the coordinator waits {self._merging}")
        reasons += [trouble for trouble in (storage.pending_problem(), self._trouble) if trouble]
        return "; ".join(reasons) or "unknown"

    # -- the end -------------------------------------------------------------------------------------------------------

    def _save(self, why: BaseException) -> None:
        """The run ends early: its heads write their states into a checkpoint of the last version, as far as time allows."""
        limit = self.failure.grace or max(1.0, float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", JOB_STOP)) - 0.5)
        end = time.monotonic() + limit
        self.log.record_event("ended_early", why=f"{type(why).__name__}: {why}"[:500])
        with contextlib.suppress(ray.exceptions.RayError, LTEError):
            self._write_last(end, early=True)
            left = max(0.1, end - time.monotonic())
            ray.get(self.hub.coordinator.wait_for_checkpoints.remote(left), timeout=left + 0.5)
            self.take(ray.get(self.hub.coordinator.status.remote(self.seen), timeout=0.5))

    def _write_last(self, end: float, early: bool, least: float = 0.1) -> None:
        """Has a checkpoint of the last version written, unless there is one, until `end` (monotonic).

        For each that is in the making heads have half of what is left, or `least` seconds.
        """
        coordinator = self.hub.coordinator
        for save in ray.get(coordinator.freeze.remote(early), timeout=max(0.1, end - time.monotonic())):
            self._ask_to_write(save, max(least, (end - time.monotonic()) / 2))

    def _ask_to_write(self, save: CheckpointRequest, limit: float) -> None:
        """Has heads write their states into a checkpoint; it does without those that can't."""
        asked = {}
        for member in self.crew.members:
            if member.actor is not None and set(member.numbers) & save.sequences.keys():
                asked[member.actor.save.remote(save)] = member
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=limit) if asked else ([], [])
        there = set()
        for ref in answered:
            with contextlib.suppress(ray.exceptions.RayError):
                there |= set(asked[ref].numbers) if ray.get(ref) else set()
        for head in save.sequences.keys() - there:
            self.hub.coordinator.add_checkpoint_part.remote(save.version, head, None)

    def _finish(self, mending: FailureHandler) -> None:
        """The last checkpoint, the export, the last evaluation and the sample."""
        while True:
            try:
                self._write_last(time.monotonic() + 60.0, early=False, least=30.0)
                version, base, trouble = self._when_there(mending, self.hub.coordinator.finish.remote())
                self.take(self._when_there(mending, self.hub.coordinator.status.remote(self.seen)))
                final = self.common.transport.fetch(base).clone()
                break
            except (*PROCESS_DIED, CoordinatorLost, ObjectLost, ray.exceptions.GetTimeoutError) as error:
                mending.recover(str(error))
                self._watch(mending)  # heads that died together with it have something to do again
        base = self.common.transport.publish(final)  # the driver's own from here on
        self.export(final)  # first: what follows is the worker's code, and may fail
        if trouble:
            raise StorageError(f"{trouble} The merged weights were exported.")
        step = max((s.step for s in self.statuses.values()), default=0)
        waiting = [self._evaluating and self._evaluating[0], *(v for v, _, _ in self._to_evaluate)]
        if version not in [*waiting, *(e.version for e in self.evaluations)]:
            self._to_evaluate.append((version, step, base))
        while self._evaluating or self._to_evaluate:
            self._evaluate(patience=POLL)
            self._watchdog()
            self.reporter.update(self.progress("evaluating the merged weights"))
        wait(self._judging, self.common.directory.patience)
        try:
            sampling = self.evaluator.sample.remote(base)
            while self._evaluator is not None and not ray.wait([sampling], timeout=POLL)[0]:
                self._check_evaluator()
            self.sample = ray_get(sampling, "the evaluator")
        except WorkerFailed as error:  # a sample is for show: no reason to call the run failed
            self.sample = f"sample() raised: {error.traceback.strip().splitlines()[-1]}"
        except LTEError as error:
            self.sample = f"sample() gave nothing: {error}"

    def _when_there(self, mending: FailureHandler, answer: Any) -> Any:
        """The coordinator's answer, while others write their parts of the last checkpoint.

        Raises:
            CoordinatorLost: its process died, or hangs.
        """
        while not ray.wait([answer], timeout=POLL)[0]:
            mending.look_at_end()
            self._watchdog()
            self.reporter.update(self.progress("saving the last version"))
        return ray_get(answer, "the coordinator")

    def check_heads(self) -> None:
        """Raises ContributionRefused if every head of the run is quarantined."""
        numbers = [n for member in self.crew.members for n in member.numbers]
        out = [self.statuses[n] for n in numbers if n in self.statuses and self.statuses[n].state == "quarantined"]
        if numbers and len(out) == len(numbers):
            raise ContributionRefused(
                f"Head {out[0].head} was {out[0].note}, and so were all others. If the loss diverged, lower the learning rate "
                "or --lora-alpha."
            )

    def progress(self, note: str = "") -> Progress:
        """The run as it is now."""
        train = self.common.settings.train
        statuses = tuple(self.statuses[n] for n in sorted(self.statuses))
        step = min((s.step for s in statuses), default=0)
        if is_shared(self.common.settings):
            step = sum(s.step for s in statuses) // self.common.settings.lte.num_heads
        rate = samples_per_second(self.merges)
        recent = self.merges[-10:]
        taken = sum(m.steps for m in recent[1:]) / len(statuses or (0,))
        per_step = (recent[-1].at - recent[0].at) / max(1, taken) if len(recent) > 1 else None
        return Progress(
            run=self.common.settings.run,
            step=step,
            steps=train.steps,
            samples=sum(s.samples for s in statuses),
            samples_per_second=rate,
            version=self.seen,
            heads=statuses,
            evaluation=self.evaluations[-1] if self.evaluations else None,
            seconds=time.time() - self._begun,
            remaining=None if per_step is None else per_step * (train.steps - step),
            checkpoint=self.checkpoint,
            note=next((n for n in (note, self.note, self.log.problem, self._trouble, *(s.note for s in statuses)) if n), ""),
        )

"""One run on Ray, seen from the driver: starts the actors, watches them, and takes all of it down again.

The driver owns coordinator, heads and evaluator as siblings, so that none dies with another. It moves no tensors: it
watches, has versions evaluated, and keeps the metrics.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import ray
from torch import Tensor

from lte_ray import checkpoint
from lte_ray.engine.budget import is_shared
from lte_ray.engine.initial import Initial
from lte_ray.engine.threads import cores, head_threads
from lte_ray.errors import CoordinatorLost, HeadLost, LTEError, RunError, UserError, WorkerFailed
from lte_ray.messages import HeadStatus, MergeRecord
from lte_ray.metrics import Evaluation, MetricsLog, Progress, Reporter, throughput
from lte_ray.runtime.common import Common
from lte_ray.runtime.coordinator import CoordinatorActor, CoordinatorStatus
from lte_ray.runtime.evaluator import EvaluatorActor
from lte_ray.runtime.head import HeadActor, Host
from lte_ray.runtime.package import Package
from lte_ray.runtime.placement import Placement
from lte_ray.runtime.shard import ShardActor, base_parts

POLL = 1.0
"""Seconds between two looks at the actors."""

GRACE = 1.5
"""Seconds that a run which ends early gives to a checkpoint that is being written; a stopped job is killed after 3."""

MOST_WAITING = 2
"""Versions that may wait for evaluation; of more, those in the middle are left out, so that memory stays bounded."""


@dataclass
class Actors:
    """The handles of a run's actors; `heads` are those that host heads, with the numbers of the heads."""

    coordinator: Any
    heads: list[tuple[Any, tuple[int, ...]]]
    start_evaluator: Callable[[], Any]

    @cached_property
    def evaluator(self) -> Any:
        """Started when it is first needed, so that it doesn't keep the heads from starting."""
        return self.start_evaluator()


@dataclass
class Session:
    """What the driver knows of a run that is on.

    Args:
        common: as every actor.
        initial: model, plan and base to start from (of `version`).
        policy: the merge policy.
        placement: what each actor reserves.
        stack: whether an actor's heads are computed as one batch.
        keep: checkpoints to keep.
        reporter: shows progress.
        export: what is done with the final base (flat), as soon as it is there.
    """

    common: Common
    initial: Initial
    policy: Package
    placement: Placement
    stack: str
    keep: int | None
    reporter: Reporter
    export: Callable[[Tensor], None]
    merges: list[MergeRecord] = field(default_factory=list)
    statuses: dict[int, HeadStatus] = field(default_factory=dict)
    evaluations: list[Evaluation] = field(default_factory=list)
    checkpoint: int | None = None
    sample: str | None = None

    def __post_init__(self) -> None:
        self._begun = time.time()
        self.version = self.common.resume.version if self.common.resume else 0
        self._log = MetricsLog(self.common.directory)
        self._log.rewind(self.version)
        self._to_evaluate: deque[tuple[int, int, Any]] = deque()
        self._evaluating: tuple[int, int, Any] | None = None

    def run(self, hosted: list[tuple[int, ...]], strategies: list[Any]) -> None:
        """Runs to the end, with one actor for each of `hosted` (head numbers), under its scheduling strategy.

        Raises:
            RunError: it ended early. All actors are gone, and complete checkpoints remain.
        """
        try:
            with self._actors(hosted, strategies) as actors:
                try:
                    self._watch(actors)
                    self._finish(actors)
                except BaseException:
                    with contextlib.suppress(ray.exceptions.RayError):
                        ray.get(actors.coordinator.close.remote(GRACE), timeout=GRACE + 0.5)
                        self._take(ray.get(actors.coordinator.status.remote(self._seen), timeout=0.5))
                    raise
        except UserError as error:  # whatever it is, the run had begun
            raise RunError(str(error)) from error
        finally:
            with contextlib.suppress(LTEError, OSError):  # must not hide what ended the run
                self._log.flush(now=True)
                checkpoint.remove_incomplete(self.common.directory)

    @contextlib.contextmanager
    def _actors(self, hosted: list[tuple[int, ...]], strategies: list[Any]) -> Iterator[Actors]:
        common, placement, settings = self.common, self.placement, self.common.settings
        with contextlib.ExitStack() as started:

            def start(kind: type, options: dict[str, Any], *args: Any) -> Any:
                # Every actor answers status calls in a group of its own while it works.
                handle = ray.remote(concurrency_groups={"ctl": 2})(kind).options(max_restarts=0, **options).remote(*args)
                started.callback(ray.kill, handle)
                return handle

            lanes, threads = head_threads(settings.train.threads_per_head, placement.cpus, placement.heads)
            resources = {k: v for k, v in placement.bundle.items() if k not in ("CPU", "GPU")}
            options = {"num_cpus": placement.bundle.get("CPU", 0), "num_gpus": placement.gpus, "resources": resources}
            host = Host(threads, lanes, placement.gpus > 0, self.stack)
            plans = self.initial.plans
            heads = [
                (start(HeadActor, {**options, "scheduling_strategy": strategy}, common, plans, numbers, host), numbers)
                for numbers, strategy in zip(hosted, strategies, strict=True)
            ]
            beside = {"num_cpus": 0, "scheduling_strategy": "DEFAULT"}
            calls = max(1000, 3 * len(plans))  # heads that wait must not fill up the coordinator
            shards = [
                start(
                    ShardActor,
                    {**beside, "scheduling_strategy": "SPREAD", "max_concurrency": calls},
                    common,
                    plans,
                    parts,
                    self.version,
                )
                for parts in base_parts(common, self.initial.plan, self.initial.base)
            ]
            base = None if shards else self.initial.base.numpy()
            first = (plans, self.policy, base, self.version)
            coordinator = start(CoordinatorActor, {**beside, "max_concurrency": calls}, common, *first, self.keep, shards)

            def start_evaluator() -> Any:
                gpus, spare = self._spare_gpus(), cores() - lanes * threads * len(hosted)
                options = {**beside, "num_gpus": gpus}
                return start(EvaluatorActor, options, common, self.initial.plan, max(1, spare), gpus > 0)

            if settings.train.eval_every and self.version == 0:
                self._to_evaluate.append((0, 0, common.transport.publish(self.initial.base)))
            yield Actors(coordinator, heads, start_evaluator)

    def _spare_gpus(self) -> float:
        """The evaluator computes on a GPU if the heads do and leave one."""
        wanted = self.placement.gpus
        return wanted if 0 < wanted <= ray.available_resources().get("GPU", 0) else 0

    def _watch(self, actors: Actors) -> None:
        """Until all heads have ended: polls, evaluates, reports."""
        training = {actor.run.remote(actors.coordinator): (actor, numbers) for actor, numbers in actors.heads}
        while training:
            ended, _ = ray.wait(list(training), timeout=POLL)
            for ref in ended:
                _, numbers = training.pop(ref)
                self._note(_get(ref, _name(numbers), self.statuses.get(numbers[0])))
            self._look(actors, [actor for actor, _ in training.values()])
            if all(n in self.statuses and self.statuses[n].step for _, numbers in actors.heads for n in numbers):
                self._evaluate(actors)
            self.reporter.update(self.progress())

    def _note(self, statuses: tuple[HeadStatus, ...]) -> None:
        self.statuses.update({status.head: status for status in statuses})

    def _look(self, actors: Actors, training: list[Any]) -> None:
        asked = [actor.status.remote() for actor in training]
        coordinator = actors.coordinator.status.remote(self._seen)
        answered, _ = ray.wait([*asked, coordinator], num_returns=len(asked) + 1, timeout=POLL)
        for ref in answered:
            try:
                if ref == coordinator:
                    status = ray.get(ref)
                    self._take(status)
                    if status.needs_evaluator:
                        actors.coordinator.use_evaluator.remote(actors.evaluator)
                else:
                    self._note(ray.get(ref))
            except ray.exceptions.RayActorError:
                pass  # `run` of the same actor says it better; the coordinator's end, each head's `run`
        self._log.flush()

    @property
    def _seen(self) -> int:
        return self.merges[-1].version if self.merges else self.version

    def _take(self, status: CoordinatorStatus) -> None:
        self.checkpoint = status.checkpoint
        for record in status.merges:
            if record.base is not None:
                self._to_evaluate.append((record.version, record.step, record.base))
            self._log.merge(record)
            self.merges.append(replace(record, base=None))  # a base that is held stays in memory
        while len(self._to_evaluate) > MOST_WAITING:
            del self._to_evaluate[1]  # the first one may be version 0, where everything is measured from

    def _evaluate(self, actors: Actors, patience: float = 0) -> None:
        """Takes an evaluation's result if there is one, and starts the next."""
        if self._evaluating is not None:
            version, step, ref = self._evaluating
            if not ray.wait([ref], timeout=patience)[0]:
                return
            self._evaluating = None
            evaluation = Evaluation(version, step, _get(ref, "the evaluator"))
            self.evaluations.append(evaluation)
            self._log.evaluation(evaluation)
        if self._to_evaluate:
            version, step, base = self._to_evaluate.popleft()
            self._evaluating = (version, step, actors.evaluator.evaluate.remote(base))

    def _finish(self, actors: Actors) -> None:
        """The last checkpoint, the export, the last evaluation and the sample."""
        version, base = _get(actors.coordinator.finish.remote(), "the coordinator")
        self._take(_get(actors.coordinator.status.remote(self._seen), "the coordinator"))
        self.export(self.common.transport.fetch(base).clone())  # first: what follows is the worker's code, and may fail
        step = max((s.step for s in self.statuses.values()), default=0)
        waiting = [self._evaluating and self._evaluating[0], *(v for v, _, _ in self._to_evaluate)]
        if version not in [*waiting, *(e.version for e in self.evaluations)]:
            self._to_evaluate.append((version, step, base))
        while self._evaluating or self._to_evaluate:
            self._evaluate(actors, patience=POLL)
            self.reporter.update(self.progress("evaluating the merged weights"))
        try:
            self.sample = _get(actors.evaluator.sample.remote(base), "the evaluator")
        except WorkerFailed as error:  # a sample is for show: no reason to call the run failed
            self.sample = f"sample() raised: {error.traceback.strip().splitlines()[-1]}"

    def progress(self, note: str = "") -> Progress:
        """The run as it is now."""
        train = self.common.settings.train
        statuses = tuple(self.statuses[n] for n in sorted(self.statuses))
        step = min((s.step for s in statuses), default=0)
        if is_shared(self.common.settings):
            step = sum(s.step for s in statuses) // self.common.settings.lte.num_heads
        rate = throughput(self.merges)
        recent = self.merges[-10:]
        taken = sum(m.steps for m in recent[1:]) / len(statuses or (0,))
        per_step = (recent[-1].at - recent[0].at) / max(1, taken) if len(recent) > 1 else None
        return Progress(
            run=self.common.settings.run,
            step=step,
            steps=train.steps,
            samples=sum(s.samples for s in statuses),
            samples_per_second=rate,
            version=self._seen,
            heads=statuses,
            evaluation=self.evaluations[-1] if self.evaluations else None,
            seconds=time.time() - self._begun,
            remaining=None if per_step is None else per_step * (train.steps - step),
            checkpoint=self.checkpoint,
            note=note or next((status.note for status in statuses if status.note), ""),
        )


def _name(numbers: tuple[int, ...]) -> str:
    return f"head {numbers[0]}" if len(numbers) == 1 else f"heads {numbers[0]}-{numbers[-1]}"


def _get(ref: Any, who: str, status: HeadStatus | None = None) -> Any:
    """The result of a call to `who`; errors are raised as ours."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayError as error:
        raise _translated(error, who, status) from error


def _translated(error: Exception, who: str, status: HeadStatus | None) -> LTEError:
    """Ray's error as ours: the one that was raised inside the actor, or that its process is gone."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, UserError):
        return RunError(f"{who}: {cause}")
    if isinstance(cause, LTEError):
        return cause
    if isinstance(error, ray.exceptions.RayActorError):
        at = f" at local step {status.step}" if status is not None and status.step else ""
        kind = CoordinatorLost if who == "the coordinator" else HeadLost
        return kind(f"The process of {who} died{at}: {error}")
    return RunError(f"{who} failed: {error}")

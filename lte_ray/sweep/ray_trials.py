"""Starts trials on Ray. Each has a placement group with a bundle for each of its actors of heads, and its driver is in it."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from lte_ray.errors import ConfigError, ResourceError
from lte_ray.runtime import placement as placing
from lte_ray.runtime.context import PickledObject
from lte_ray.runtime.ray_errors import PROCESS_DIED, to_lte_error
from lte_ray.sweep.engine import Progress, RunningTrial, failed_result
from lte_ray.sweep.trial_actor import TrialActor, TrialTask
from lte_ray.sweep.trials import Trial, TrialSettings

POLL = 0.3
"""Seconds between two looks at the trials."""

SAVING = 5.0
"""Seconds that interrupted trials have to save, at most."""

WARN_AFTER = 10.0
"""Seconds after which a warning says that a trial waits for room."""

log = logging.getLogger("lte_ray")


@dataclass
class RayTrials:
    """Starts trials on the connected Ray.

    Args:
        make: gives a trial's worker and settings.
        program: how ``run.toml`` names the worker.
        place: folder or URI of the sweep.
    """

    make: Callable[[Trial], TrialSettings]
    program: str
    place: str
    _waiting: _Waiting | None = field(default=None, init=False)

    def check(self, trials: Sequence[Trial]) -> None:
        """Checks that the cluster is large enough for each trial.

        Raises:
            ResourceError: it isn't.
        """
        for trial in trials:
            resolve(self.make(trial))

    def start(self, trial: Trial, alone: bool) -> RunningTrial | None:
        """Starts a trial once its placement group is there. Ray, and an autoscaler, see that it waits.

        Raises:
            ResourceError: the cluster is too small, or others use it, and no trial of this sweep will make room.
        """
        if self._waiting is None:
            self._waiting = _Waiting.begin(self.make(trial))
        waiting = self._waiting
        if not waiting.is_placed(alone):
            return None
        self._waiting = None
        worker = PickledObject.pickle(waiting.settings.worker)
        settings = TrialSettings(**{**vars(waiting.settings), "worker": None})
        task = TrialTask(trial, settings, worker, self.program, self.place, os.getcwd())
        return RayTrial.begin(task, waiting.group)

    def wait(self, running: Sequence[RunningTrial]) -> None:
        """Waits a moment, or until a trial ends."""
        references = [each.result for each in running if isinstance(each, RayTrial)]
        if references:
            ray.wait(references, timeout=POLL)
        elif self._waiting is not None:
            self._waiting.group.wait(1)

    def close(self, running: Sequence[RunningTrial]) -> None:
        """Interrupts trials that still run, gives them a moment to save, and ends them."""
        trials = [each for each in running if isinstance(each, RayTrial)]
        try:
            for each in trials:
                each.actor.interrupt.remote()
            if trials:
                ray.wait([each.result for each in trials], num_returns=len(trials), timeout=SAVING)
        finally:
            for each in trials:
                each.end()
            if self._waiting is not None:
                remove_placement_group(self._waiting.group)
                self._waiting = None


def resolve(settings: TrialSettings) -> placing.Placement:
    """Returns the resources of a trial.

    Raises:
        ConfigError: its processes would reserve for themselves.
        ResourceError: the cluster lacks them.
    """
    if settings.train.baseline_processes > 1:
        raise ConfigError(
            f"lte-ray sweep takes no --baseline-processes {settings.train.baseline_processes}: Ray Train reserves for several "
            "processes itself, so trials would wait for each other. Leave it out: one process takes the same steps."
        )
    return placing.resolve_run(settings.placement, settings.lte, settings.train)


@dataclass
class _Waiting:
    """A trial that waits for its placement group."""

    settings: TrialSettings
    placement: placing.Placement
    group: Any
    since: float
    warned: bool = False

    @classmethod
    def begin(cls, settings: TrialSettings) -> _Waiting:
        placement = resolve(settings)
        heads = 1 if settings.train.baseline else settings.lte.num_heads
        group = placing.make_group(placement, math.ceil(heads / placement.heads))
        return cls(settings, placement, group, time.monotonic())

    def is_placed(self, alone: bool) -> bool:
        """Whether the group is there.

        Raises:
            ResourceError: as `RayTrials.start`.
        """
        if placement_group_table(self.group)["state"] == "CREATED":
            return True
        patience, waited = max(self.placement.timeout, placing.PATIENCE), time.monotonic() - self.since
        if not alone:
            self.since = time.monotonic()  # another trial will make room
        elif waited > patience:
            raise ResourceError(
                f"A trial needs {len(self.group.bundle_specs)} bundles of {self.placement.bundle}, which couldn't be placed "
                f"within {patience:g} s. Others use the cluster, or no node is large enough for a head. Wait, ask for less, or "
                "give --resource-timeout."
            )
        elif waited > WARN_AFTER and not self.warned:
            self.warned = True
            log.warning("A trial waits for room in the cluster. %.0f s more.", patience - waited)
        return False


@dataclass
class RayTrial:
    """A trial whose driver is an actor."""

    trial: Trial
    actor: Any
    group: Any
    result: Any
    _polled: Any = None
    _points: int = 0
    _notes: int = 0

    @classmethod
    def begin(cls, task: TrialTask, group: Any) -> RayTrial:
        """Starts the actor in the first bundle, of which it takes nothing."""
        strategy = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
        kind = ray.remote(concurrency_groups={"ctl": 2})(TrialActor)
        actor = kind.options(num_cpus=0, max_restarts=0, scheduling_strategy=strategy).remote(task)
        return cls(task.trial, actor, group, actor.run.remote())

    def poll(self) -> Progress:
        """Returns what is new; after the end, all that was left."""
        ended = bool(ray.wait([self.result], timeout=0)[0])
        if self._polled is None or ended:
            self._polled = self.actor.poll.remote(self._points, self._notes)
        ready = ray.wait([self._polled], timeout=5.0 if ended else 0)[0]
        progress, result, lost = Progress(), None, ""
        if ready:
            reference, self._polled = self._polled, None
            try:
                progress = ray.get(reference)
                self._points += len(progress.points)
                self._notes += len(progress.notes)
            except ray.exceptions.RayError:
                ended = True
        if ended:
            try:
                result = ray.get(self.result, timeout=5.0)
                lost = "" if result is not None else "It was interrupted."
            except ray.exceptions.GetTimeoutError:
                pass
            except PROCESS_DIED as error:
                lost = f"Its process died: {str(error).strip().splitlines()[0]}"
            except ray.exceptions.RayError as error:
                result = failed_result(self.trial, str(to_lte_error(error, self.trial.name)).strip().splitlines()[0])
        return Progress(progress.step, progress.points, progress.notes, result, lost)

    def stop(self, reason: str) -> None:
        """Ends the run after the merge under way."""
        self.actor.stop.remote(reason)

    def end(self) -> None:
        """Ends the actor, with it all that it has started, and frees its placement group."""
        ray.kill(self.actor)
        remove_placement_group(self.group)

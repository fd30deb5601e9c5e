"""Runs the trials of a sweep next to each other, ends the worse ones, and keeps what is done. Knows no Ray."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lte_ray.errors import RunError
from lte_ray.ladder import Figure, Point, ResultsFile
from lte_ray.sweep.halving import Halving
from lte_ray.sweep.trials import Trial, TrialResult

MAX_RESTARTS = 3
"""How often the process of a trial is started again after it was lost."""

MAX_FAILED = 3
"""Trials that may fail before the first one gives a result."""


@dataclass(frozen=True)
class Progress:
    """What has happened to a trial since it was asked last.

    Attributes:
        step: local steps of each head.
        points: evaluations.
        notes: warnings.
        result: what it gave, once it has ended.
        lost: why its process is gone; it can be started again.
    """

    step: int = 0
    points: Sequence[Point] = ()
    notes: Sequence[str] = ()
    result: TrialResult | None = None
    lost: str = ""


class RunningTrial(Protocol):
    """A trial that trains."""

    def poll(self) -> Progress:
        """Returns what is new. Doesn't wait."""
        ...

    def stop(self, reason: str) -> None:
        """Ends it after the merge under way: it saves and evaluates, and then has a result. Doesn't wait."""
        ...

    def end(self) -> None:
        """Ends its processes at once, if they still run, and frees what was reserved for them."""
        ...


class Launcher(Protocol):
    """Starts trials where there is room."""

    def start(self, trial: Trial, alone: bool) -> RunningTrial | None:
        """Starts a trial, or returns None if the cluster has no room now.

        Args:
            alone: whether no other trial of the sweep runs, so that none will make room.

        Raises:
            UserError: the cluster will never have room.
        """
        ...

    def wait(self, running: Sequence[RunningTrial]) -> None:
        """Waits a moment, or until one of them ends."""
        ...

    def close(self, running: Sequence[RunningTrial]) -> None:
        """Gives trials that still run a moment to save, ends them, and frees what is reserved."""
        ...


class Listener(Protocol):
    """Shows a sweep to people."""

    def begin(self, trial: Trial) -> None: ...

    def advance(self, trial: Trial, progress: Progress) -> None: ...

    def end(self, trial: Trial, result: TrialResult, earlier: bool) -> None: ...

    def note(self, trial: Trial, text: str) -> None: ...


@dataclass
class SweepEngine:
    """Runs trials, as many at once as `launcher` has room for.

    Args:
        results: of the sweep. Trials that are there aren't trained again, except those that failed.
        launcher: starts trials.
        figure: that is compared.
        listener: is told what happens.
        halving: ends trials; None: none.
        max_concurrent: trials at the same time, at most; 0: any number.
    """

    results: ResultsFile[TrialResult]
    launcher: Launcher
    figure: Figure
    listener: Listener
    halving: Halving | None = None
    max_concurrent: int = 0
    _running: dict[Trial, RunningTrial] = field(default_factory=dict, init=False)
    _restarts: dict[Trial, int] = field(default_factory=dict, init=False)
    _stopping: set[Trial] = field(default_factory=set, init=False)

    def run(self, trials: Sequence[Trial], halves: bool = True) -> list[TrialResult]:
        """Trains the trials that have no result yet. Returns the results of all, in their order.

        Args:
            halves: whether trials may end early.

        Raises:
            RunError: the first ones all failed.
            KeyboardInterrupt: those that ran have saved what they could.
        """
        waiting: deque[Trial] = deque()
        for trial in trials:
            earlier = self.results.get(trial)
            if earlier is None or earlier.failed:
                waiting.append(trial)
                continue
            if halves:
                self._judge(trial, earlier.points)
            self.listener.end(trial, earlier, True)
        with self._ending():
            while waiting or self._running:
                while waiting and not (self.max_concurrent and len(self._running) >= self.max_concurrent):
                    handle = self.launcher.start(waiting[0], alone=not self._running)
                    if handle is None:
                        break
                    self.listener.begin(waiting[0])
                    self._running[waiting.popleft()] = handle
                self.launcher.wait(list(self._running.values()))
                waiting.extend(trial for trial in list(self._running) if self._follow(trial, halves))
        return [result for trial in trials if (result := self.results.get(trial)) is not None]

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        """Ends what is left after the block: if it raised, trials may still run."""
        try:
            yield
        finally:
            self.launcher.close(list(self._running.values()))
            self._running.clear()

    def _follow(self, trial: Trial, halves: bool) -> bool:
        """Looks at a running trial. Returns whether it must be started again, since its process was lost.

        Raises:
            RunError: as `run`.
        """
        handle = self._running[trial]
        progress = handle.poll()
        for text in progress.notes:
            self.listener.note(trial, text)
        self.listener.advance(trial, progress)
        if halves and (reason := self._judge(trial, progress.points)) and trial not in self._stopping:
            self._stopping.add(trial)
            handle.stop(reason)
        result = progress.result
        if progress.lost:
            self._restarts[trial] = self._restarts.get(trial, 0) + 1
            if self._restarts[trial] <= MAX_RESTARTS:
                del self._running[trial]
                self._stopping.discard(trial)
                handle.end()
                self.listener.note(trial, f"{progress.lost} It is started again.")
                return True
            result = failed_result(trial, progress.lost)
        if result is not None:
            del self._running[trial]
            handle.end()
            self.results.add(result)
            self.listener.end(trial, result, False)
            self._check_failures(result)
        return False

    def _judge(self, trial: Trial, points: Sequence[Point]) -> str:
        """Returns why the trial is to end; empty if it goes on."""
        reason = ""
        for point in points if self.halving is not None else ():
            cost = self.figure.cost(point.figures.get(self.figure.name, float("nan")))
            reason = reason or self.halving.record(trial.key, point.samples, cost)  # type: ignore[union-attr]
        return reason

    def _check_failures(self, result: TrialResult) -> None:
        """Raises RunError if the first trials all failed: the others would, too."""
        results = self.results.all()
        if result.failed and len(results) >= MAX_FAILED and all(each.failed for each in results):
            raise RunError(f"The first {len(results)} trials failed. The last one, {result.name}: {result.failed}")


def failed_result(trial: Trial, why: str, points: Sequence[Point] = (), seconds: float = 0.0) -> TrialResult:
    """The result of a trial that failed."""
    return TrialResult(trial.key, trial.name, trial.number, dict(trial.values), trial.seed, tuple(points), seconds, failed=why)

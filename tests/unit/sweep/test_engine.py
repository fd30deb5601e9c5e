"""The engine of a sweep with made-up trials: side by side, ended early, interrupted, continued, failed, lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lte_ray.errors import RunError
from lte_ray.ladder import Figure, Point, ResultsFile
from lte_ray.storage import RunDirectory
from lte_ray.sweep import Halving, SweepEngine, Trial, TrialResult
from lte_ray.sweep.engine import Progress, RunningTrial, failed_result

STEPS = 10


@dataclass
class MadeUpTrial:
    """Takes a step a look, and has an evaluation of its number after each: 10 samples a step."""

    trial: Trial
    fails: str = ""
    dies: bool = False
    step: int = 0
    points: list[Point] = field(default_factory=list)
    reason: str = ""
    ended: bool = False

    def poll(self) -> Progress:
        if self.dies and self.step == 2:
            return Progress(self.step, lost="Its process died.")
        if self.fails:
            return Progress(self.step, result=failed_result(self.trial, self.fails))
        if self.reason or self.step == STEPS:
            trial = self.trial
            result = TrialResult(
                trial.key, trial.name, trial.number, dict(trial.values), trial.seed, tuple(self.points), 1.0, 0, self.reason
            )
            return Progress(self.step, result=result)
        self.step += 1
        point = Point(self.step, 10 * self.step, {"loss": float(self.trial.values[0][1])})
        self.points.append(point)
        return Progress(self.step, [point], ["a warning"] if self.step == 1 else [])

    def stop(self, reason: str) -> None:
        self.reason = reason

    def end(self) -> None:
        self.ended = True


@dataclass
class MadeUpLauncher:
    """Has room for some trials, and remembers what it started."""

    room: int = 2
    make: Callable[[Trial], MadeUpTrial] = MadeUpTrial
    started: list[MadeUpTrial] = field(default_factory=list)
    most: int = 0
    interrupt_after: int = 0
    waits: int = 0

    def start(self, trial: Trial, alone: bool) -> RunningTrial | None:
        training = [each for each in self.started if not each.ended]
        assert alone == (not training)
        if len(training) >= self.room:
            return None
        self.started.append(self.make(trial))
        self.most = max(self.most, len(training) + 1)
        return self.started[-1]

    def wait(self, running: Sequence[RunningTrial]) -> None:
        self.waits += 1
        if self.waits == self.interrupt_after:
            raise KeyboardInterrupt

    def close(self, running: Sequence[RunningTrial]) -> None:
        for each in running:
            each.end()


@dataclass
class Heard:
    """A listener that remembers."""

    lines: list[str] = field(default_factory=list)

    def begin(self, trial: Trial) -> None:
        self.lines.append(f"begin {trial.name}")

    def advance(self, trial: Trial, progress: Progress) -> None: ...

    def end(self, trial: Trial, result: TrialResult, earlier: bool) -> None:
        self.lines.append(f"end {trial.name}{' earlier' if earlier else ''}")

    def note(self, trial: Trial, text: str) -> None:
        self.lines.append(f"{trial.name}: {text}")


def trials(*losses: float) -> list[Trial]:
    return [Trial.make(number, (("loss", str(loss)),), 0) for number, loss in enumerate(losses)]


def engine(folder: Path, launcher: MadeUpLauncher, halving: Halving | None = None, concurrent: int = 0) -> SweepEngine:
    file = ResultsFile(RunDirectory.open(str(folder), "sweep"), "sweep.json", {"steps": STEPS}, TrialResult)
    file.load()
    return SweepEngine(file, launcher, Figure("loss"), Heard(), halving, concurrent)


def test_trials_run_side_by_side_as_far_as_there_is_room(tmp_path: Path) -> None:
    """And at most as many as --max-concurrent says. Results come in the order of the trials; warnings are passed on."""
    for concurrent, most in ((0, 2), (1, 1)):
        launcher = MadeUpLauncher()
        sweep = engine(tmp_path / str(concurrent), launcher, concurrent=concurrent)
        results = sweep.run(trials(3, 1, 2))
        assert [each.last("loss") for each in results] == [3, 1, 2]
        assert launcher.most == most
        assert "trial-001: a warning" in sweep.listener.lines  # type: ignore[attr-defined]


def test_worse_trials_end_early(tmp_path: Path) -> None:
    """Asked to stop, a trial ends by itself, and its result says why."""
    results = engine(tmp_path, MadeUpLauncher(room=1), Halving(10, 100, 3)).run(trials(1, 2, 3, 0.5))
    assert [each.samples for each in results] == [100, 10, 10, 100]
    assert [bool(each.stopped) for each in results] == [False, True, True, False]
    assert results[1].stopped == "1 of 2 trainings were better after 10 samples"


def test_an_interrupted_sweep_continues(tmp_path: Path) -> None:
    """What is done isn't trained again, and still ends others; what ran is started again."""
    launcher = MadeUpLauncher(room=1, interrupt_after=14)
    with pytest.raises(KeyboardInterrupt):
        engine(tmp_path, launcher, Halving(10, 100, 3)).run(trials(1, 0.5, 2))
    assert [each.ended for each in launcher.started] == [True, True]
    again = MadeUpLauncher(room=1)
    sweep = engine(tmp_path, again, Halving(10, 100, 3))
    results = sweep.run(trials(1, 0.5, 2))
    assert [each.trial.name for each in again.started] == ["trial-001", "trial-002"]
    assert "end trial-000 earlier" in sweep.listener.lines  # type: ignore[attr-defined]
    assert [each.samples for each in results] == [100, 100, 10]


def test_a_trial_that_fails_leaves_the_others_alone(tmp_path: Path) -> None:
    """It is tried again by the next call, unlike those that are done."""
    launcher = MadeUpLauncher(make=lambda trial: MadeUpTrial(trial, "out of memory" if trial.number == 0 else ""))
    results = engine(tmp_path, launcher).run(trials(1, 2))
    assert [each.failed for each in results] == ["out of memory", ""]
    again = MadeUpLauncher()
    assert [each.failed for each in engine(tmp_path, again).run(trials(1, 2))] == ["", ""]
    assert [each.trial.number for each in again.started] == [0]


def test_a_sweep_whose_first_trials_all_fail_ends(tmp_path: Path) -> None:
    """The others would fail, too. The message has the last reason."""
    launcher = MadeUpLauncher(make=lambda trial: MadeUpTrial(trial, "no such file"))
    with pytest.raises(RunError, match=r"The first 3 trials failed\. The last one, trial-002: no such file"):
        engine(tmp_path, launcher).run(trials(*range(10)))
    assert len(launcher.started) <= 4


def test_a_trial_whose_process_dies_is_started_again(tmp_path: Path) -> None:
    """Three times; then it has failed."""
    launcher = MadeUpLauncher(room=1, make=lambda trial: MadeUpTrial(trial, dies=trial.number == 0))
    results = engine(tmp_path, launcher).run(trials(1, 2))
    assert [each.trial.number for each in launcher.started] == [0, 1, 0, 0, 0]
    assert [each.failed for each in results] == ["Its process died.", ""]

"""When versions are evaluated, and what happens when the evaluator dies or hangs, with a fake in its place."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from lte_ray import FailureConfig
from lte_ray.config import TrainConfig
from lte_ray.engine.failure_policy import FailurePolicy
from lte_ray.engine.hang_detector import HangDetector
from lte_ray.errors import RunError, WorkerFailed
from lte_ray.runtime.context import RetentionPolicy
from lte_ray.runtime.controller import evaluation
from lte_ray.runtime.controller.evaluation import FIRST_ANSWER, Evaluations
from lte_ray.runtime.controller.run_state import PendingEvaluation, RunState
from lte_ray.runtime.coordinator_state import CoordinatorState
from lte_ray.storage import RunDirectory


class Evaluator:
    """Answers, once `ready`, each call with what `answers` has for its method; an exception is raised."""

    def __init__(self) -> None:
        self.ready = True
        self.answers: dict[str, Any] = {"evaluate": {"loss": 1.0}, "alive": True, "sample": "text"}

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *args: (self, name))


class Run:
    """A run with an evaluator, which isn't started yet."""

    def __init__(self, path: Path, config: FailureConfig) -> None:
        directory = RunDirectory.open(str(path), "run")
        directory.create()
        self.state = RunState(directory, 2, CoordinatorState(0, None))
        self.started: list[Evaluator] = []
        launcher: Any = SimpleNamespace(launch_evaluator=self.launch, end=lambda actor: None)
        self.context: Any = SimpleNamespace(directory=directory, retention=RetentionPolicy(), evaluates=True)
        heads: Any = SimpleNamespace(slots=[])
        self.evaluations = Evaluations(self.state, self.context, heads, launcher, FailurePolicy(config), HangDetector())

    def launch(self, head_actors: int) -> Evaluator:
        self.started.append(Evaluator())
        return self.started[-1]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replaces Ray's calls by the evaluator's answers; the time is what the list says."""
    clock = [1000.0]

    def get(ref: Any) -> Any:
        evaluator, name = ref
        if isinstance(evaluator.answers[name], Exception):
            raise evaluator.answers[name]
        return evaluator.answers[name]

    monkeypatch.setattr(ray, "wait", lambda refs, timeout: (refs, []) if refs[0][0].ready else ([], refs))
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(evaluation, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    return clock


@pytest.mark.usefixtures("clock")
def test_versions_are_evaluated_one_after_another(tmp_path: Path) -> None:
    """The final version is added unless it is evaluated, or will be."""
    run = Run(tmp_path, FailureConfig())
    run.state.queue.extend([PendingEvaluation(0, 0, "base 0"), PendingEvaluation(4, 8, "base 4")])
    run.evaluations.add_final(4, "base 4")
    assert len(run.state.queue) == 2
    while run.evaluations.busy:
        run.evaluations.poll()
    assert [(each.version, each.step, each.values) for each in run.state.evaluations] == [
        (0, 0, {"loss": 1.0}),
        (4, 8, {"loss": 1.0}),
    ]
    run.evaluations.add_final(6, "base 6")
    assert [pending.version for pending in run.state.queue] == [6]
    assert len(run.started) == 1


@pytest.mark.parametrize(("ema", "every", "version"), [(0.9, 10, 0), (0.0, 10, 0), (0.9, 0, 0), (0.9, 10, 4)])
def test_the_initial_weights_are_evaluated_first(tmp_path: Path, ema: float, every: int, version: int) -> None:
    """With a moving average, which they are, too; not if the run continues, or evaluates at its end only."""
    run = Run(tmp_path, FailureConfig())
    run.context.settings = SimpleNamespace(train=TrainConfig(ema=ema, eval_every=every))
    run.evaluations.add_first(CoordinatorState(version, "base"))
    expected = [PendingEvaluation(0, 0, "base", "base" if ema else None)] if every and not version else []
    assert list(run.state.queue) == expected


def test_an_evaluator_that_hangs_is_replaced_and_its_evaluation_is_missing(tmp_path: Path, clock: list[float]) -> None:
    """It doesn't answer a ping for `FIRST_ANSWER` seconds; an evaluation alone may take longer."""
    run = Run(tmp_path, FailureConfig())
    run.state.queue.extend([PendingEvaluation(2, 4, "base 2"), PendingEvaluation(4, 8, "base 4")])
    run.evaluations.poll()
    run.started[0].ready = False
    for _ in range(3):
        run.evaluations.poll()
        clock[0] += FIRST_ANSWER / 2 + 1
    run.evaluations.poll()
    run.evaluations.poll()
    assert [each.version for each in run.state.evaluations] == [4]
    assert len(run.started) == 2


def test_an_evaluator_that_hangs_too_often_ends_the_run(tmp_path: Path, clock: list[float]) -> None:
    """It counts against `max_failures`."""
    run = Run(tmp_path, FailureConfig(max_failures=0))
    run.state.queue.append(PendingEvaluation(2, 4, "base 2"))
    run.evaluations.poll()
    run.started[0].ready = False
    run.evaluations.poll()
    clock[0] += FIRST_ANSWER + 1
    with pytest.raises(RunError, match="hasn't answered for 121 s"):
        run.evaluations.poll()


@pytest.mark.usefixtures("clock")
def test_a_sample_that_fails_is_no_failure_of_the_run(tmp_path: Path) -> None:
    """Its result says why there is none; an evaluation that raises ends the run."""
    run = Run(tmp_path, FailureConfig())
    assert run.evaluations.sample("base") == "text"
    failed = WorkerFailed("the evaluator", None, "Traceback\nValueError: no")
    error = ray.exceptions.RayTaskError("sample", "Traceback", failed)
    run.started[0].answers |= {"sample": error, "evaluate": error}
    assert run.evaluations.sample("base") == "sample() raised: ValueError: no"
    run.state.queue.append(PendingEvaluation(2, 4, "base 2"))
    run.evaluations.poll()
    with pytest.raises(WorkerFailed):
        run.evaluations.poll()

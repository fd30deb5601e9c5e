"""Callbacks: what they are told, when they raise, and how they are given."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import lte_ray
from lte_ray.config import TrainConfig
from lte_ray.errors import ConfigError
from lte_ray.messages import MergeRecord
from lte_ray.run.callbacks import Callback, CallbackList, Run, load_callbacks
from lte_ray.run.error_log import ERRORS
from lte_ray.run.metrics import Evaluation, MetricsLog
from lte_ray.run.stopping import Stop, StopRules
from lte_ray.storage import RunDirectory


class Recorder(Callback):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def on_run_start(self, run: Run) -> None:
        self.calls.append(("start", run.name))

    def on_merge(self, run: Run, row: dict[str, Any]) -> None:
        self.calls.append(("merge", row["version"]))

    def on_evaluation(self, run: Run, row: dict[str, Any]) -> None:
        self.calls.append(("evaluation", row["values"]))

    def on_checkpoint(self, run: Run, version: int) -> None:
        self.calls.append(("checkpoint", version))

    def on_event(self, run: Run, row: dict[str, Any]) -> None:
        self.calls.append(("event", row["event"]))

    def on_failure(self, run: Run, row: dict[str, Any]) -> None:
        self.calls.append(("failure", row["event"]))

    def on_run_end(self, run: Run, outcome: Any) -> None:
        self.calls.append(("end", outcome))


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    """Of a run without rows."""
    directory = RunDirectory.open(str(tmp_path), "r")
    directory.create()
    return directory


def follow(directory: RunDirectory, *callbacks: Callback) -> CallbackList:
    run = Run("r", directory.path, {"steps": 7}, StopRules(TrainConfig(), "", 0.0))
    return CallbackList(callbacks, run, directory)


def test_a_callback_is_told_of_everything_once_and_in_order(directory: RunDirectory) -> None:
    """A failure is an event, too; the end has the result."""
    recorder = Recorder()
    following, log = follow(directory, recorder), MetricsLog(directory)
    log.listeners.append(following.handle_row)
    with following.running() as results:
        log.record_merge(MergeRecord(1, 1.0, (0,), 1, 1, {}, 0, 0, 1))
        log.record_evaluation(Evaluation(1, 1, {"loss": 2.0}))
        following.handle_checkpoint(1)
        log.record_event("head_restarts")
        log.record_event("head_lost", why="it died")
        results.append("the result")
    assert recorder.calls == [
        ("start", "r"),
        ("merge", 1),
        ("evaluation", {"loss": 2.0}),
        ("checkpoint", 1),
        ("event", "head_restarts"),
        ("event", "head_lost"),
        ("failure", "head_lost"),
        ("end", "the result"),
    ]


def test_the_end_of_a_run_that_fails_has_its_error(directory: RunDirectory) -> None:
    """Also an interrupt; the error goes on."""
    recorder = Recorder()
    with pytest.raises(KeyboardInterrupt), follow(directory, recorder).running():
        raise KeyboardInterrupt
    assert isinstance(recorder.calls[-1][1], KeyboardInterrupt)


@pytest.mark.parametrize("method", ["on_run_start", "on_merge", "on_run_end"])
def test_a_callback_that_raises_is_switched_off(directory: RunDirectory, caplog: pytest.LogCaptureFixture, method: str) -> None:
    """One warning, the traceback in errors.log; the others go on."""

    class Broken(Recorder):
        pass

    def fail(*_: object) -> None:
        raise ValueError("no room")

    setattr(Broken, method, fail)
    broken, recorder = Broken(), Recorder()
    following = follow(directory, broken, recorder)
    with following.running() as results:
        following.handle_row({"kind": "merge", "version": 1})
        following.handle_row({"kind": "merge", "version": 2})
        results.append(None)
    assert [name for name, _ in recorder.calls] == ["start", "merge", "merge", "end"]
    heard = {"on_run_start": 0, "on_merge": 1, "on_run_end": 3}[method]
    assert [name for name, _ in broken.calls] == ["start", "merge", "merge"][:heard]
    (record,) = caplog.records
    assert f"The callback Broken raised ValueError in {method}: no room. It isn't called again; the run goes on." in (
        record.getMessage()
    )
    assert record.getMessage().endswith(ERRORS)
    assert 'raise ValueError("no room")' in directory.read(ERRORS).decode()


def test_rows_are_the_callbacks_own(directory: RunDirectory) -> None:
    """A callback that changes its row doesn't change what others get."""

    class Spoiler(Recorder):
        def on_event(self, run: Run, row: dict[str, Any]) -> None:
            row.clear()

        def on_merge(self, run: Run, row: dict[str, Any]) -> None:
            row["version"] = -1
            del row["kind"]

    recorder = Recorder()
    following, log = follow(directory, Spoiler(), recorder), MetricsLog(directory)
    seen: list[dict[str, Any]] = []
    log.listeners += [following.handle_row, seen.append]
    log.record_merge(MergeRecord(1, 1.0, (0,), 1, 1, {}, 0, 0, 1))
    log.record_event("head_lost", why="it died")
    assert recorder.calls == [("merge", 1), ("event", "head_lost"), ("failure", "head_lost")]
    assert [row["kind"] for row in seen] == ["merge", "event"]


def test_a_callback_that_exits_does_not_end_the_process(directory: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    """`sys.exit` counts as an error: the run would end without its checkpoint, and with the code of a success."""

    class Leaver(Recorder):
        def on_merge(self, run: Run, row: dict[str, Any]) -> None:
            sys.exit(0)

    with follow(directory, Leaver()).running() as results:
        follow(directory, Leaver()).handle_row({"kind": "merge", "version": 1})
        results.append(None)
    assert "The callback Leaver raised SystemExit in on_merge: 0" in caplog.text


def test_an_interrupt_in_a_callback_silences_them(directory: RunDirectory) -> None:
    """The process must end soon: of what is still recorded, no callback is told but of the end."""

    class Slow(Recorder):
        def on_merge(self, run: Run, row: dict[str, Any]) -> None:
            raise KeyboardInterrupt

    slow = Slow()
    following = follow(directory, slow)

    def train_and_save() -> None:
        with following.running():
            try:
                following.handle_row({"kind": "merge", "version": 1})
            finally:
                following.handle_row({"kind": "merge", "version": 2})
                following.handle_row({"kind": "event", "event": "saved"})

    with pytest.raises(KeyboardInterrupt):
        train_and_save()
    assert [name for name, _ in slow.calls] == ["start", "end"]


def test_a_callback_can_end_the_run(directory: RunDirectory) -> None:
    """The reason is kept for the record."""

    class Impatient(Callback):
        def on_merge(self, run: Run, row: dict[str, Any]) -> None:
            assert run.settings["steps"] == 7
            run.stop("enough")

    following = follow(directory, Impatient())
    following.handle_row({"kind": "merge", "version": 1})
    assert following.rules.stop == Stop("request", "enough")


def test_callbacks_are_given_as_objects_classes_or_by_name(tmp_path: Path) -> None:
    """A name means a class or an instance in a file."""
    path = tmp_path / "mine.py"
    path.write_text("import lte_ray\n\nclass One(lte_ray.Callback):\n    pass\n\ntwo = One()\n")
    one = Recorder()
    loaded = load_callbacks([one, Recorder], [f"{path}:One", f"{path}:two"])
    assert loaded[0] is one
    assert [type(each).__name__ for each in loaded] == ["Recorder", "Recorder", "One", "One"]
    assert issubclass(Recorder, lte_ray.Callback)


@pytest.mark.parametrize(
    ("given", "spec", "says"),
    [
        ([3], "", "callbacks has 3, but int isn't a callback. Derive it from lte_ray.Callback"),
        ([dict], "", "but dict isn't a callback"),
        ([], "Other", "--callback is '.*:Other', but Other isn't a callback"),
        ([], "Needs", "--callback is '.*:Needs', which can't be made without arguments: TypeError"),
        ([], "Nothing", "has no Nothing. Its classes are: Other, Needs"),
        ([], "", "--callback is .*, but it must be package.module:Class or path/to/file.py:Class"),
    ],
)
def test_what_is_no_callback_is_refused_before_the_run(tmp_path: Path, given: list[object], spec: str, says: str) -> None:
    """The error names it, and says what it must be."""
    path = tmp_path / "mine.py"
    path.write_text(
        "import lte_ray\n\nclass Other:\n    pass\n\nclass Needs(lte_ray.Callback):\n    def __init__(self, a):\n        pass\n"
    )
    specs = [] if given else [f"{path}:{spec}" if spec else str(path)]
    with pytest.raises(ConfigError, match=says):
        load_callbacks(given, specs)

"""`lte-ray stop`, without Ray: the request, the waiting, and what it says."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lte_ray.cli import run_status
from lte_ray.cli import stop as stopping
from lte_ray.cli.main import main
from lte_ray.run.stop_request import REQUEST, read_request
from lte_ray.storage import RunDirectory, exclusive_lock
from tests.support.run_folders import add_checkpoint, add_model, add_rows, event_row, leave_lock, make_run, merge_row

NOW = time.time()


class Driver:
    """A driver that answers a request once `stop` waits, in the way that the test sets."""

    def __init__(self, run: RunDirectory, folder: Path) -> None:
        self.run, self.folder, self.lock = run, folder, ExitStack()
        self.lock.enter_context(exclusive_lock(run))
        self.answer: Callable[[], None] = lambda: self.end(event_row("stopped", NOW, why=read_request(run), by="request"))

    def end(self, *rows: dict[str, object]) -> None:
        """Ends the run with these last rows."""
        add_checkpoint(self.folder, 1)
        add_model(self.folder)
        add_rows(self.folder, *rows, event_row("finished", NOW + 1, version=1))
        self.lock.close()


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """Of a run with one merge."""
    made = Driver(make_run(tmp_path / "r", merge_row(1, NOW - 5)), tmp_path / "r")
    monkeypatch.setattr(run_status, "sleep", lambda seconds: made.answer())
    yield made
    made.lock.close()


def test_stop_waits_until_the_run_has_saved_and_ended(driver: Driver, capsys: pytest.CaptureFixture[str]) -> None:
    """It says what is kept, and how to go on."""
    assert main(["stop", str(driver.folder), "--reason", "good enough"]) == 0
    seen = capsys.readouterr()
    assert seen.err == f"{driver.folder} is asked to end after the merge that is under way.\n"
    assert seen.out == (
        f"{driver.folder}: stopped before its last step: good enough\n"
        f"The merged weights are exported. Continue it from checkpoint 1: lte-ray resume {driver.folder}\n"
    )


def test_a_run_that_finishes_first_is_finished(driver: Driver, capsys: pytest.CaptureFixture[str]) -> None:
    """That is no error, and JSON says it, too."""
    driver.answer = driver.end
    assert main(["stop", str(driver.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "finished"


def test_a_run_that_fails_meanwhile_is_an_error(driver: Driver, capsys: pytest.CaptureFixture[str]) -> None:
    """75, since it can be resumed."""

    def fail() -> None:
        add_checkpoint(driver.folder, 1)
        add_rows(driver.folder, event_row("ended_early", NOW, why="HeadLost: x"))
        driver.lock.close()

    driver.answer = fail
    assert main(["stop", str(driver.folder)]) == 75
    assert "has ended in another way: ended early: HeadLost: x. Continue it from checkpoint 1" in capsys.readouterr().err


def test_without_a_timeout_it_only_asks(driver: Driver, capsys: pytest.CaptureFixture[str]) -> None:
    """The reason names the machine."""
    assert main(["stop", str(driver.folder), "--timeout", "0"]) == 0
    assert capsys.readouterr().out == ""
    assert (read_request(driver.run) or "").startswith("lte-ray stop on ")


def test_a_run_that_takes_longer_is_still_asked(
    driver: Driver, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the timeout it says so, and leaves the request to the driver, which is alive."""
    now = iter(range(100))
    driver.answer = lambda: None
    monkeypatch.setattr(stopping.time, "monotonic", lambda: float(next(now)))
    assert main(["stop", str(driver.folder), "--timeout", "3s"]) == 1
    assert "hasn't ended within 3 s (--timeout). It is still asked to." in capsys.readouterr().err
    assert (driver.folder / REQUEST).exists()


def test_nobody_who_answers_is_no_reason_to_leave_the_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine, or in a bucket, only an answer tells that a driver is alive."""
    make_run(tmp_path / "r", merge_row(1, NOW - 5))
    leave_lock(tmp_path / "r", "1 on another-machine")
    now = iter(range(100))
    monkeypatch.setattr(stopping.time, "monotonic", lambda: float(next(now)))
    monkeypatch.setattr(run_status, "sleep", lambda seconds: None)
    assert main(["stop", str(tmp_path / "r"), "--timeout", "3"]) == 1
    assert "Nothing has answered in 3 s" in capsys.readouterr().err
    assert not (tmp_path / "r" / REQUEST).exists()


@pytest.mark.parametrize("last", [event_row("finished", NOW), merge_row(2, NOW)], ids=["finished", "killed"])
def test_a_run_that_nobody_trains_is_one_clear_error(
    tmp_path: Path, last: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    """No request is left behind."""
    make_run(tmp_path / "r", merge_row(1, NOW - 5), last)
    assert main(["stop", str(tmp_path / "r")]) == 2
    assert f"No process trains {tmp_path / 'r'}, so there is nothing to stop: " in capsys.readouterr().err
    assert not (tmp_path / "r" / REQUEST).exists()

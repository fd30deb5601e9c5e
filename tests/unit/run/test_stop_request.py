"""Requests to end a run, as a file in its directory."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

from lte_ray.config import TrainConfig
from lte_ray.errors import StorageError
from lte_ray.run import stop_request
from lte_ray.run.stop_request import REQUEST, StopRequests, read_request, remove_request, request_stop
from lte_ray.run.stopping import Stop, StopRules
from lte_ray.storage import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """An empty directory."""
    return RunDirectory.open(str(tmp_path), "", patience=0.0)


def rules() -> StopRules:
    return StopRules(TrainConfig(), "", time.monotonic())


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are read in the caller's thread, every time."""

    def call(function: object) -> Future[object]:
        future: Future[object] = Future()
        future.set_result(function())  # type: ignore[operator]
        return future

    monkeypatch.setattr(stop_request, "run_in_thread", call)
    monkeypatch.setattr(stop_request, "LOCAL_INTERVAL", 0.0)


def test_a_request_ends_the_run_with_its_reason(run: RunDirectory, at_once: None) -> None:
    """From then on the directory isn't looked at any more."""
    stops = rules()
    requests = StopRequests(run, stops)
    requests.poll()
    requests.poll()
    assert stops.stop is None
    request_stop(run, "the loss is good")
    requests.poll()
    requests.poll()
    assert stops.stop == Stop("request", "the loss is good")
    remove_request(run)
    assert read_request(run) is None
    remove_request(run)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b"[" * 4000,
        b"x" * 5000,
        b'{"reason": ""}',
        b'{"reason": null, "command": "rm"}',
        b'"reason"',
    ],
    ids=lambda content: str(content[:12]),
)
def test_whatever_the_file_holds_it_only_stops(run: RunDirectory, content: bytes) -> None:
    """That it is there is the request. Nothing but a reason is read of it."""
    run.write(REQUEST, content)
    assert read_request(run) in ("lte-ray stop", "None")


def test_a_reason_is_short_plain_text(run: RunDirectory, tmp_path: Path) -> None:
    """Without control characters and credentials; where a link leads isn't read."""
    request_stop(run, "\x1b[2Jsee s3://key:hunter2@bucket/x\n" + "long " * 1000)
    reason = read_request(run)
    assert reason is not None
    assert reason.isprintable() and len(reason) <= 200 and "hunter2" not in reason
    (tmp_path / "secret").write_text(json.dumps({"reason": "secret"}))
    (tmp_path / REQUEST).unlink()
    (tmp_path / REQUEST).symlink_to(tmp_path / "secret")
    assert read_request(run) == "lte-ray stop"
    remove_request(run)
    assert (tmp_path / "secret").exists()
    assert not (tmp_path / REQUEST).is_symlink()


def test_storage_that_fails_asks_for_nothing(run: RunDirectory, at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on, and looks again."""

    def fail(*_: object) -> bool:
        raise StorageError("no network")

    stops = rules()
    requests = StopRequests(run, stops)
    request_stop(run, "x")
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "exists", fail)
        requests.poll()
        requests.poll()
    assert stops.stop is None
    requests.poll()
    requests.poll()
    assert stops.stop == Stop("request", "x")


def test_storage_that_hangs_does_not_hang_the_run(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One look at a time, in another thread."""
    released, looks = threading.Event(), []

    def hang(*_: object) -> bool:
        looks.append(threading.current_thread())
        released.wait(60)
        return False

    monkeypatch.setattr(RunDirectory, "exists", hang)
    monkeypatch.setattr(stop_request, "LOCAL_INTERVAL", 0.0)
    requests = StopRequests(run, rules())
    for _ in range(5):
        requests.poll()
    released.set()
    assert len(looks) == 1
    assert looks[0] is not threading.main_thread()

"""Storage that fails: transient failures are retried, permanent ones are reported at once, and nothing is torn or doubled."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lte_ray import storage
from lte_ray.errors import StorageError
from lte_ray.storage import RunDirectory, retry
from tests.support.faulty_storage import FakeClock, fail, faulty

TRANSIENT = ["ENOSPC", "EIO", "ECONNRESET", "ETIMEDOUT", "ESTALE", "EDQUOT", "EAGAIN", "EBUSY"]
PERMANENT = ["ENOENT", "EACCES", "EPERM", "EROFS", "EISDIR", "ENOTDIR", "ENAMETOOLONG"]


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """Replaces the real clock."""
    made = FakeClock()
    monkeypatch.setattr(retry, "clock", lambda: made.now)
    monkeypatch.setattr(retry, "sleep", made.sleep)
    return made


@pytest.mark.parametrize("code", TRANSIENT)
def test_a_transient_failure_is_retried(tmp_path: Path, time: FakeClock, code: str) -> None:
    """Three failures, then success: waits double from 0.1 s, and one file exists."""
    directory, script = faulty(tmp_path)
    script.write(fail(nth=[1, 2, 3], errno=code))
    directory.write("a/file", b"content")
    assert time.waits == pytest.approx([0.1, 0.2, 0.4])
    assert (directory.read("a/file"), directory.list_names("a")) == (b"content", ["file"])
    assert storage.pending_problem() == ""


@pytest.mark.parametrize("code", PERMANENT)
def test_a_permanent_failure_is_reported_at_once(tmp_path: Path, time: FakeClock, code: str) -> None:
    """Without a wait, in the system's own words."""
    directory, script = faulty(tmp_path)
    script.write(fail(errno=code))
    with pytest.raises(StorageError, match=f"run/file can't be written: .*{os.strerror(getattr(errno, code))}"):
        directory.write("file", b"content")
    assert (time.waits, script.count_met()) == ([], 1)


def test_patience_ends(tmp_path: Path, time: FakeClock) -> None:
    """After a minute the error says how often and how long it was tried. No wait is longer than 5 s; nothing is left behind."""
    directory, script = faulty(tmp_path)
    script.write(fail("tear", errno="ENOSPC"))
    with pytest.raises(StorageError, match=r"No space left on device. It was tried 18 times in 60 s \(--storage-patience\)"):
        directory.write("file", b"content")
    assert time.waits[:7] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0])
    assert max(time.waits) == 5
    assert time.now == pytest.approx(60)
    assert directory.list_names() == []
    assert storage.pending_problem() == ""


@pytest.mark.parametrize(("seconds", "most"), [(0.0, 1), (0.1, 2), (1.0, 5)])
def test_patience_is_a_setting(tmp_path: Path, time: FakeClock, seconds: float, most: int) -> None:
    """Without patience there is one attempt. The last attempt is made when the patience ends."""
    directory, script = faulty(tmp_path, patience=seconds)
    script.write(fail())
    with pytest.raises(StorageError, match="can't be written"):
        directory.write("file", b"content")
    assert (script.count_met(), time.now) == (most, pytest.approx(seconds))


OPERATIONS: dict[str, tuple[str, str, Callable[[RunDirectory], object]]] = {
    "write": ("write", "writing", lambda d: d.write("file", b"new")),
    "rename": ("move", "writing", lambda d: d.write("file", b"new")),
    "folder": ("make", "writing", lambda d: d.write("file", b"new")),
    "append": ("read", "reading", lambda d: d.append("file", b"+")),
    "read": ("read", "reading", lambda d: d.read("file")),
    "exists": ("look", "looking for", lambda d: d.exists("file")),
    "names": ("look", "listing", lambda d: d.list_names()),
    "size": ("look", "looking for", lambda d: d.size("file")),
    "delete": ("delete", "removing", lambda d: d.delete("file")),
    "create": ("make", "making", lambda d: d.create()),
}


@pytest.mark.parametrize("case", list(OPERATIONS))
def test_every_operation_is_retried_and_reported(tmp_path: Path, time: FakeClock, case: str) -> None:
    """`pending_problem` describes each while it waits. The outcome is the same as without failures."""
    op, verb, act = OPERATIONS[case]
    directory, script = faulty(tmp_path)
    directory.write("file", b"old")
    expected_value, expected_state = _outcome(directory, act)
    directory.write("file", b"old")
    reported: list[str] = []
    time.meanwhile = lambda: reported.append(storage.pending_problem())
    script.write(fail(op=op, nth=[1, 2], errno="ECONNRESET"))
    assert _outcome(directory, act) == (expected_value, expected_state)
    assert [text.split(" has failed ")[0].split(" /")[0] for text in reported] == [verb, verb]
    assert reported[0].endswith("has failed once (Connection reset by peer); trying for 60 s more")
    assert reported[1].endswith("has failed 2 times in 0 s (Connection reset by peer); trying for 60 s more")


def _outcome(directory: RunDirectory, act: Callable[[RunDirectory], object]) -> tuple[object, list[tuple[str, bytes]]]:
    value = act(directory)
    return value, [(name, Path(directory.path, name).read_bytes()) for name in sorted(os.listdir(directory.path))]


def test_a_pending_problem_counts_up(tmp_path: Path, time: FakeClock) -> None:
    """How often it failed, for how long, why, and how long it will be retried."""
    directory, script = faulty(tmp_path)
    script.write(fail(errno="ENOSPC"))
    reported: list[str] = []
    time.meanwhile = lambda: reported.append(storage.pending_problem())
    with pytest.raises(StorageError):
        directory.write("checkpoints/000040/base.safetensors", b"x")
    place = f"writing {directory.path}/checkpoints/000040/base.safetensors"
    assert reported[7] == f"{place} has failed 8 times in 11 s (No space left on device); trying for 49 s more"


def test_the_log_has_the_first_failure_and_the_end(tmp_path: Path, time: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    """One warning at the first failure and one at the end, good or bad; none without failures."""
    directory, script = faulty(tmp_path, patience=3)
    with caplog.at_level(logging.WARNING, logger="lte_ray.storage"):
        directory.write("file", b"x")
        assert caplog.messages == []
        script.write(fail(nth=[1, 2, 3], errno="EIO"))
        directory.write("file", b"x")
        first, last = caplog.messages
        assert first.endswith("run/file has failed (Input/output error); trying for 3 s more.")
        assert last.endswith("run/file has failed 3 times in 1 s (Input/output error), and has worked now.")
        caplog.clear()
        script.write(fail(errno="EIO"))
        with pytest.raises(StorageError):
            directory.write("file", b"x")
        assert len(caplog.messages) == 2
        assert caplog.messages[1].endswith("in 3 s (Input/output error): given up.")


def test_an_operation_that_does_not_return_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another thread, once it has lasted more than ten seconds, with or without an earlier failure."""
    now = [0.0]
    monkeypatch.setattr(retry, "clock", lambda: now[0])
    monkeypatch.setattr(retry, "sleep", lambda seconds: None)
    inside, resume = threading.Event(), threading.Event()
    failures = iter([OSError(errno.EIO, "no")])

    def hang() -> str:
        if now[0] > 30 and (error := next(failures, None)):
            raise error
        inside.set()
        assert resume.wait(60)
        return "done"

    def run() -> None:
        retry.retry(hang, "writing X", "X can't be written", 60)

    for begin, prefix in ((0.0, "writing X"), (100.0, "writing X has failed once (Input/output error); this try")):
        now[0] = begin
        inside.clear()
        resume.clear()
        thread = threading.Thread(target=run)
        thread.start()
        assert inside.wait(60)
        now[0] = begin + 10
        assert "going on" not in storage.pending_problem()
        now[0] = begin + 34
        assert storage.pending_problem() == f"{prefix} has been going on for 34 s"
        resume.set()
        thread.join()
        assert storage.pending_problem() == ""


class Stopped(BaseException):
    """Raised by the signal handler."""


def test_the_main_thread_handles_signals_and_logs_what_it_waits_for_while_storage_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A call that doesn't return is logged repeatedly, and a signal ends the wait."""
    assert threading.current_thread() is threading.main_thread()
    resume, warned, reported = threading.Event(), threading.Semaphore(0), list[str]()
    monkeypatch.setattr(retry, "SLOW_AFTER", 0.0)
    monkeypatch.setattr(retry, "LOG_INTERVAL", 0.01)
    monkeypatch.setattr(retry.log, "warning", lambda *words: (reported.append(words[0] % words[1:]), warned.release()))

    def stop(*_: object) -> None:
        raise Stopped

    def ends_it() -> None:
        assert warned.acquire(timeout=60)
        assert warned.acquire(timeout=60)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)  # type: ignore[arg-type]

    before = signal.signal(signal.SIGUSR1, stop)
    ender = threading.Thread(target=ends_it)
    try:
        ender.start()
        with pytest.raises(Stopped):
            retry.retry(lambda: resume.wait(60), "writing X", "X can't be written", 60)
    finally:
        signal.signal(signal.SIGUSR1, before)
        resume.set()
        ender.join()
    assert all(text.startswith("writing X has been going on for 0 s") for text in reported)
    assert storage.pending_problem() == ""


def test_a_few_pending_problems_are_described_and_the_rest_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of five operations that hang are described."""
    now = [0.0]
    monkeypatch.setattr(retry, "clock", lambda: now[0])
    inside, resume = threading.Semaphore(0), threading.Event()

    def hang() -> None:
        inside.release()
        assert resume.wait(60)

    threads = [threading.Thread(target=retry.retry, args=(hang, f"reading {n}", f"{n} can't be read", 60)) for n in range(5)]
    for thread in threads:
        thread.start()
        assert inside.acquire(timeout=60)
    now[0] = 20.0
    text = storage.pending_problem()
    resume.set()
    for thread in threads:
        thread.join()
    assert text == "; ".join([f"reading {n} has been going on for 20 s" for n in range(3)] + ["and 2 more"])


def test_a_program_error_is_not_retried(tmp_path: Path, time: FakeClock) -> None:
    """Text instead of bytes is the caller's mistake."""
    directory, _ = faulty(tmp_path)
    with pytest.raises(TypeError):
        directory.write("file", "text")  # type: ignore[arg-type]
    assert (time.waits, directory.list_names(), storage.pending_problem()) == ([], [], "")


@pytest.mark.parametrize(
    ("text", "permanent"),
    [
        ("AWS Error ACCESS_DENIED during PutObject operation: Access Denied", True),
        ("AWS Error NO_SUCH_BUCKET during CreateMultipartUpload operation", True),
        ("AWS Error SLOW_DOWN during PutObject operation: Please reduce your request rate.", False),
        ("AWS Error NETWORK_CONNECTION during PutObject operation: curlCode: 7, Couldn't connect to server", False),
        ("google::cloud::Status(PERMISSION_DENIED: no access)", True),
        ("google::cloud::Status(UNAVAILABLE: try again)", False),
    ],
)
def test_object_stores_report_errors_in_words(time: FakeClock, text: str, permanent: bool) -> None:
    """They give no error number. A missing permission or bucket is permanent, a slow or lost network isn't."""
    errors = iter([OSError(text)])

    def attempt() -> str:
        for error in errors:
            raise error
        return "done"

    if permanent:
        with pytest.raises(StorageError, match="X can't be written"):
            retry.retry(attempt, "writing X", "X can't be written", 60)
    else:
        assert retry.retry(attempt, "writing X", "X can't be written", 60) == "done"
    assert len(time.waits) == (0 if permanent else 1)


def test_credentials_are_in_no_message(time: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    """Neither in the error, nor in the log, nor in pending problems."""
    reported: list[str] = []
    time.meanwhile = lambda: reported.append(storage.pending_problem())

    def attempt() -> None:
        raise OSError("no answer from s3://key:hunter2secret@bucket/run")

    with caplog.at_level(logging.WARNING, logger="lte_ray.storage"), pytest.raises(StorageError) as caught:
        retry.retry(attempt, "writing s3://key:hunter2secret@bucket/run", "it can't be written", 1)
    assert reported
    assert caplog.messages
    assert all("hunter2" not in text for text in [str(caught.value), *reported, *caplog.messages])


def _write_there(pickled: bytes) -> None:
    pickle.loads(pickled).write("file", b"from there")


def test_faults_reach_other_processes(tmp_path: Path) -> None:
    """Storage fails there, too, until a flag is removed, and both processes count together."""
    directory, script = faulty(tmp_path)
    flag = tmp_path / "down"
    flag.touch()
    script.write(fail(errno="ECONNRESET", **{"while": str(flag)}))
    process = multiprocessing.get_context("spawn").Process(target=_write_there, args=(pickle.dumps(directory),))
    process.start()
    while script.count_met() < 2:
        process.join(0.02)
        assert process.is_alive()
    assert directory.list_names() == []
    flag.unlink()
    process.join(60)
    assert (process.exitcode, directory.read("file")) == (0, b"from there")

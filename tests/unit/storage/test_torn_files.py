"""Writes that break off half-way: files are complete or absent, and each row is there once."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lte_ray.errors import StorageError
from lte_ray.storage import RunDirectory, filesystem, retry
from tests.support.faulty_storage import FakeClock, fail, faulty


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """Replaces the real clock."""
    made = FakeClock()
    monkeypatch.setattr(retry, "clock", lambda: made.now)
    monkeypatch.setattr(retry, "sleep", made.sleep)
    return made


@pytest.mark.parametrize("kind", ["tear", "swallow"])
def test_a_torn_write_never_shows(tmp_path: Path, time: FakeClock, kind: str) -> None:
    """Whether storage reports the torn write or not, the old file stays until the new one is complete."""
    directory, script = faulty(tmp_path)
    directory.write("file", b"old")
    script.write(fail(kind, nth=[1, 2]))
    seen: list[bytes] = []
    time.meanwhile = lambda: seen.append(Path(directory.path, "file").read_bytes())
    directory.write("file", b"a new one")
    assert seen == [b"old", b"old"]
    assert (directory.read("file"), directory.list_names()) == (b"a new one", ["file"])


def test_a_silently_torn_file_is_an_error(tmp_path: Path, time: FakeClock) -> None:
    """If storage never takes all bytes, the error says so."""
    directory, script = faulty(tmp_path, patience=1)
    script.write(fail("swallow"))
    with pytest.raises(StorageError, match="4 of 8 bytes have arrived"):
        directory.write("file", b"12345678")
    assert directory.list_names() == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.binary(max_size=40), min_size=1, max_size=6),
    st.lists(st.integers(1, 20), max_size=8),
    st.sampled_from(["fail", "tear", "swallow"]),
    st.sampled_from(["write", "read", "look", "move", "*"]),
)
def test_appending_never_doubles_or_loses(
    tmp_path_factory: pytest.TempPathFactory, rows: list[bytes], nth: list[int], kind: str, op: str
) -> None:
    """Whichever operations fail, and however: all rows are there, once and in order."""
    directory, script = faulty(tmp_path_factory.mktemp("rows"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retry, "sleep", lambda seconds: None)
        script.write(fail(kind, op, nth=nth))
        for row in rows:
            directory.append("metrics.jsonl", row)
        assert directory.read("metrics.jsonl") == b"".join(rows)


class TearingFilesystem:
    """A local filesystem whose first appends take only some of the bytes."""

    type_name = "local"

    def __init__(self, inner: Any, takes: list[int], silent: bool) -> None:
        self._inner, self._takes, self._silent = inner, takes, silent

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def open_append_stream(self, path: str) -> Any:
        stream = self._inner.open_append_stream(path)
        return _TearingStream(stream, self._takes.pop(0), self._silent) if self._takes else stream


class _TearingStream:
    def __init__(self, stream: Any, takes: int, silent: bool) -> None:
        self._stream, self._takes, self._silent = stream, takes, silent

    def __enter__(self) -> _TearingStream:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()

    def write(self, data: bytes) -> None:
        self._stream.write(data[: self._takes])
        if not self._silent:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 5), max_size=4), st.booleans())
def test_a_local_append_that_broke_off_is_cut_off(
    tmp_path_factory: pytest.TempPathFactory, takes: list[int], silent: bool
) -> None:
    """However many bytes of the row arrived, and whether the disk reported it or not."""
    place = RunDirectory.open(str(tmp_path_factory.mktemp("local")), "run")
    place.create()
    directory = RunDirectory(TearingFilesystem(place.filesystem, list(takes), silent), place.path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retry, "sleep", lambda seconds: None)
        for row in (b"first\n", b"other\n"):
            directory.append("metrics.jsonl", row)
    assert place.read("metrics.jsonl") == b"first\nother\n"


def test_a_local_append_that_is_given_up_leaves_the_file_as_it_was(tmp_path: Path, time: FakeClock) -> None:
    """No part of a row is left behind."""
    place = RunDirectory.open(str(tmp_path), "run")
    place.create()
    place.append("rows", b"first\n")
    directory = RunDirectory(TearingFilesystem(place.filesystem, [3] * 100, False), place.path, patience=1)
    with pytest.raises(StorageError, match=r"rows can't be written: .*No space left"):
        directory.append("rows", b"second\n")
    assert place.read("rows") == b"first\n"


def test_a_real_disk_that_is_full(tmp_path: Path, time: FakeClock) -> None:
    """The system's limit on file sizes breaks off a write and an append half-way. Both succeed once it is lifted."""
    directory = RunDirectory.open(str(tmp_path), "run")
    directory.create()
    directory.append("rows", b"x" * 60_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    content = os.urandom(200_000)
    seen: list[int] = []

    def lift() -> None:
        seen.append(Path(directory.path, "rows").stat().st_size)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    time.meanwhile = lift
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        directory.append("rows", content)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        directory.write("file", content)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(time.waits) == 2
    assert 60_000 < seen[0] < 260_000  # the append did break off half-way
    assert directory.read("rows") == b"x" * 60_000 + content
    assert (directory.read("file"), directory.list_names()) == (content, ["file", "rows"])


def test_two_processes_may_remove_the_same_folder(tmp_path: Path, time: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that the other process has removed first is no failure."""
    directory = RunDirectory.open(str(tmp_path), "run")
    directory.write("a/b", b"x")

    class Racing:
        """Another process removes the file when this one is about to remove the folder."""

        type_name = "local"

        def __getattr__(self, name: str) -> Any:
            return getattr(directory.filesystem, name)

        def delete_dir(self, path: str) -> None:
            Path(path, "b").unlink(missing_ok=True)
            if not time.waits:
                raise FileNotFoundError(errno.ENOENT, "b")
            directory.filesystem.delete_dir(path)

    RunDirectory(Racing(), directory.path).delete("a")
    assert (directory.exists("a"), len(time.waits)) == (False, 1)


def test_a_read_has_a_bound(tmp_path: Path) -> None:
    """A file that is larger than expected isn't read, nor is a folder or a pipe."""
    directory = RunDirectory.open(str(tmp_path), "run")
    directory.write("file", b"12345")
    assert directory.read("file", limit=5) == b"12345"
    with pytest.raises(StorageError, match="file can't be read: it has 5 bytes where at most 4 are expected"):
        directory.read("file", limit=4)
    os.mkfifo(tmp_path / "run" / "pipe")
    with pytest.raises(StorageError, match=r"pipe can't be read: .*it isn't a regular file"):
        directory.read("pipe")
    with pytest.raises(StorageError, match=r"run can't be read: .*it is a folder"):
        directory.read("")


def test_renaming_where_files_are_not_replaced(tmp_path: Path) -> None:
    """As on HDFS: the old file is removed first."""
    place = RunDirectory.open(str(tmp_path), "run")

    class Strict:
        type_name = "hdfs"

        def __getattr__(self, name: str) -> Any:
            return getattr(place.filesystem, name)

        def move(self, first: str, path: str) -> None:
            if os.path.exists(path):
                raise OSError("rename failed")
            place.filesystem.move(first, path)

    for data in (b"old", b"new"):
        filesystem.write_file(Strict(), f"{place.path}/file", data)
    assert (place.read("file"), place.list_names()) == (b"new", ["file"])

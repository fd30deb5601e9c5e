"""Files on storage that breaks off half-way: whole or not at all, each row once, nothing of others removed."""

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
from tests.support.faulty_storage import Time, fail, faulty


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    """In place of the real clock."""
    made = Time()
    monkeypatch.setattr(retry, "clock", lambda: made.now)
    monkeypatch.setattr(retry, "sleep", made.sleep)
    return made


@pytest.mark.parametrize("kind", ["tear", "swallow"])
def test_a_torn_write_never_shows(tmp_path: Path, time: Time, kind: str) -> None:
    """Whether storage says that it took half, or not: the old file stays until the new one is whole."""
    directory, script = faulty(tmp_path)
    directory.write("file", b"old")
    script.write(fail(kind, nth=[1, 2]))
    seen: list[bytes] = []
    time.meanwhile = lambda: seen.append(Path(directory.path, "file").read_bytes())
    directory.write("file", b"a new one")
    assert seen == [b"old", b"old"]
    assert (directory.read("file"), directory.list_names()) == (b"a new one", ["file"])


def test_half_a_file_that_storage_keeps_silent_about_is_an_error(tmp_path: Path, time: Time) -> None:
    """If it never takes the whole, that is what the error says."""
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
    """Whichever operations fail, in whatever way: all rows are there, once, in order."""
    directory, script = faulty(tmp_path_factory.mktemp("rows"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retry, "sleep", lambda seconds: None)
        script.write(fail(kind, op, nth=nth))
        for row in rows:
            directory.append("metrics.jsonl", row)
        assert directory.read("metrics.jsonl") == b"".join(rows)


class Worn:
    """A local filesystem whose appending takes only some of the bytes, a number of times."""

    type_name = "local"

    def __init__(self, inner: Any, takes: list[int], silent: bool) -> None:
        self._inner, self._takes, self._silent = inner, takes, silent

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def open_append_stream(self, path: str) -> Any:
        stream = self._inner.open_append_stream(path)
        return _Short(stream, self._takes.pop(0), self._silent) if self._takes else stream


class _Short:
    def __init__(self, stream: Any, takes: int, silent: bool) -> None:
        self._stream, self._takes, self._silent = stream, takes, silent

    def __enter__(self) -> _Short:
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
    """However many bytes of the row got there before, and whether the disk said so."""
    place = RunDirectory.open(str(tmp_path_factory.mktemp("local")), "run")
    place.create()
    directory = RunDirectory(Worn(place.filesystem, list(takes), silent), place.path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retry, "sleep", lambda seconds: None)
        for row in (b"first\n", b"other\n"):
            directory.append("metrics.jsonl", row)
    assert place.read("metrics.jsonl") == b"first\nother\n"


def test_a_local_append_that_is_given_up_leaves_the_file_as_it_was(tmp_path: Path, time: Time) -> None:
    """Half a row isn't left behind."""
    place = RunDirectory.open(str(tmp_path), "run")
    place.create()
    place.append("rows", b"first\n")
    directory = RunDirectory(Worn(place.filesystem, [3] * 100, False), place.path, patience=1)
    with pytest.raises(StorageError, match=r"rows can't be written: .*No space left"):
        directory.append("rows", b"second\n")
    assert place.read("rows") == b"first\n"


def test_a_real_disk_that_is_full(tmp_path: Path, time: Time) -> None:
    """The system's own limit on file sizes breaks off a write and an append half-way; both work once it is lifted."""
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
    assert 60_000 < seen[0] < 260_000  # it did break off half-way
    assert directory.read("rows") == b"x" * 60_000 + content
    assert (directory.read("file"), directory.list_names()) == (content, ["file", "rows"])


def test_two_that_remove_the_same_folder(tmp_path: Path, time: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other has removed first is no failure."""
    directory = RunDirectory.open(str(tmp_path), "run")
    directory.write("a/b", b"x")

    class Racing:
        """Somebody else removes the file when this one is about to remove the folder."""

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
    """A file that is larger than expected isn't read; a folder and a pipe aren't files."""
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


def test_renaming_where_names_are_not_replaced(tmp_path: Path) -> None:
    """As on HDFS: the old file goes first."""
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
        filesystem.write(Strict(), f"{place.path}/file", data)
    assert (place.read("file"), place.list_names()) == (b"new", ["file"])

"""The run directory on local disks and on fsspec's filesystems: files appear complete or not at all."""

from __future__ import annotations

import pickle
import posixpath
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lte_ray.errors import StorageError
from lte_ray.storage import RunDirectory, split_run_path

NAME = "a run"


@pytest.fixture(params=["local", "file", "memory"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> RunDirectory:
    """A run directory that doesn't exist yet: in a folder, under file:// and under fsspec's memory://."""
    places = {"local": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory://{uuid.uuid4()}"}
    return RunDirectory.open(places[request.param], NAME)


def test_what_is_written_is_read_back(directory: RunDirectory) -> None:
    """Any bytes, in folders that are created as needed. A second write replaces the first."""
    for data in (bytes(range(256)) * 9, b"", b"short"):
        directory.write("deep/er/file.bin", data)
        assert directory.read("deep/er/file.bin") == data
    assert directory.list_names("deep/er") == ["file.bin"]


def test_create_leaves_an_empty_folder(directory: RunDirectory) -> None:
    """The folder exists afterwards, without the file that proved it writable."""
    assert not directory.exists()
    directory.create()
    assert directory.exists()
    assert directory.list_names() == []


def test_names_are_sorted_and_empty_without_a_folder(directory: RunDirectory) -> None:
    """Files and folders by name."""
    assert directory.list_names("nothing") == []
    for name in ("b", "a", "c/d"):
        directory.write(name, b"x")
    assert directory.list_names() == ["a", "b", "c"]


def test_append_creates_and_extends_a_file(directory: RunDirectory) -> None:
    """Every append adds to the end."""
    directory.create()
    for line in (b"one\n", b"two\n", b"", b"three\n"):
        directory.append("metrics.jsonl", line)
    assert directory.read("metrics.jsonl") == b"one\ntwo\nthree\n"


def test_delete_removes_files_and_folders_and_ignores_missing_ones(directory: RunDirectory) -> None:
    """Their neighbors stay."""
    for name in ("a", "b", "c/d", "c/e/f"):
        directory.write(name, b"x")
    directory.delete("a")
    directory.delete("c")
    directory.delete("never")
    assert (directory.list_names(), directory.exists("c/d"), directory.exists("b")) == (["b"], False, True)
    directory.delete()
    assert not directory.exists()


def test_reading_a_missing_file_is_a_storage_error(directory: RunDirectory) -> None:
    """It names the path."""
    directory.create()
    with pytest.raises(StorageError, match="a run/nothing can't be read"):
        directory.read("nothing")


def test_a_run_directory_crosses_processes(directory: RunDirectory) -> None:
    """A pickled copy reads the same files."""
    directory.write("a", b"x")
    copy = pickle.loads(pickle.dumps(directory))
    assert (copy.path, copy.read("a")) == (directory.path, b"x")


def test_a_local_write_leaves_no_part(tmp_path: Path) -> None:
    """Only complete files under their final names exist, also after a failed write."""
    directory = RunDirectory.open(str(tmp_path), NAME)
    directory.write("file", b"x")
    (tmp_path / NAME / "taken").mkdir()
    (tmp_path / NAME / "taken" / "inside").touch()
    with pytest.raises(StorageError, match="taken can't be written"):
        directory.write("taken", b"x")
    with pytest.raises(TypeError):
        directory.write("text", "not bytes")  # type: ignore[arg-type]
    assert directory.list_names() == ["file", "taken"]


def test_a_place_below_a_regular_file_is_a_storage_error(tmp_path: Path) -> None:
    """Nothing can be written there, nothing exists there, and the error names the place and the flag."""
    (tmp_path / "file").touch()
    directory = RunDirectory.open(str(tmp_path / "file"), NAME)
    assert not directory.exists()
    with pytest.raises(StorageError, match=r"file/a run can't be written: .* Give another place with --storage"):
        directory.create()
    with pytest.raises(StorageError, match="a run/x can't be written"):
        directory.write("x", b"x")
    with pytest.raises(StorageError, match="a run/x can't be written"):
        directory.append("x", b"x")
    with pytest.raises(StorageError, match="a run/x can't be read"):
        directory.read("x")


def test_a_uri_of_an_unknown_scheme_is_a_storage_error() -> None:
    """The error names the flag and the URI."""
    with pytest.raises(StorageError, match="--storage is 'nosuch://bucket', which can't be opened"):
        RunDirectory.open("nosuch://bucket", NAME)


def test_relative_and_home_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative storage is below the current folder, ~ is the home folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert RunDirectory.open("runs", NAME).path == str(tmp_path / "runs" / NAME)
    assert RunDirectory.open("~/runs", NAME).path == str(tmp_path / "home" / "runs" / NAME)
    assert RunDirectory.open(f"file://{tmp_path}", NAME).is_local


def test_a_local_place_is_shown_as_its_path(tmp_path: Path) -> None:
    """`display` is what the user could give again."""
    assert RunDirectory.open(str(tmp_path), NAME).display == f"{tmp_path}/{NAME}"


def test_a_place_of_fsspec_is_shown_as_its_uri() -> None:
    """`display` is what the user wrote, not the name of the library that opens it."""
    assert RunDirectory.open("memory://bucket", NAME).display in ("memory://bucket/a run", "memory:///bucket/a run")


def test_a_given_filesystem_is_used(tmp_path: Path) -> None:
    """With a filesystem, the storage is a path in it."""
    import pyarrow.fs as pafs

    sub = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    RunDirectory.open("runs", NAME, sub).write("a", b"x")
    assert (tmp_path / "runs" / NAME / "a").read_bytes() == b"x"


ESCAPES = ["../x", "..", "a/../../x", "/etc/passwd", "a//b", "a/", "./a", "a/.", "a\0b", "a\\..\\b", "\0"]


@pytest.mark.parametrize("name", ESCAPES)
def test_no_name_leads_out_of_the_run_directory(directory: RunDirectory, name: str) -> None:
    """Every operation rejects it before storage sees it."""
    directory.create()
    for act in (directory.read, directory.exists, directory.list_names, directory.delete, directory.size, directory.path_to):
        with pytest.raises(StorageError, match="isn't a path inside the run directory"):
            act(name)
    for write in (directory.write, directory.append):
        with pytest.raises(StorageError, match="isn't a path inside the run directory"):
            write(name, b"x")
    assert directory.list_names() == []


@given(st.text(max_size=12))
def test_any_name_is_inside_or_rejected(name: str) -> None:
    """`path_to` gives a normalized path that begins with the run's."""
    directory = RunDirectory.open("/storage", "run")
    try:
        path = directory.path_to(name)
    except StorageError:
        return
    assert posixpath.normpath(path) == path
    assert path == "/storage/run" or path.startswith("/storage/run/")


def test_sizes_are_those_of_files(directory: RunDirectory) -> None:
    """A folder and a missing file have none."""
    directory.write("a/b", b"12345")
    assert [directory.size(name) for name in ("a/b", "a", "c")] == [5, None, None]


def test_a_link_is_removed_and_not_its_target(tmp_path: Path) -> None:
    """The target stays, whatever it is."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").write_bytes(b"x")
    directory = RunDirectory.open(str(tmp_path), NAME)
    directory.create()
    (tmp_path / NAME / "folder").symlink_to(other)
    (tmp_path / NAME / "file").symlink_to(other / "file")
    (tmp_path / NAME / "nowhere").symlink_to(tmp_path / "nothing")
    for name in ("folder", "file", "nowhere"):
        assert directory.is_link(name)
        directory.delete(name)
    assert (directory.list_names(), (other / "file").read_bytes()) == ([], b"x")


def test_patience_belongs_to_the_directory(tmp_path: Path) -> None:
    """Other processes get it with the directory. It is a minute by default."""
    assert RunDirectory.open(str(tmp_path), NAME).patience == 60
    directory = RunDirectory.open(str(tmp_path), NAME, patience=3)
    assert pickle.loads(pickle.dumps(directory)).patience == 3


@pytest.mark.parametrize(
    ("run", "storage", "name"),
    [
        ("/data/runs/a", "/data/runs", "a"),
        ("/data/runs/what?", "/data/runs", "what?"),
        ("/a/", "/", "a"),
        ("/a", "/", "a"),
        ("a", ".", "a"),
        ("a/", ".", "a"),
        ("./a", ".", "a"),
        ("runs/a", "runs", "a"),
        ("/", "/", ""),
        ("what?", ".", "what?"),
        ("s3://bucket/runs/a", "s3://bucket/runs", "a"),
        (
            "s3://bucket/runs/a/?endpoint_override=10.0.0.1:9000&scheme=http",
            "s3://bucket/runs?endpoint_override=10.0.0.1:9000&scheme=http",
            "a",
        ),
    ],
)
def test_a_run_path_is_split_into_storage_and_name(run: str, storage: str, name: str) -> None:
    """A name alone is in the current folder. The parameters of a URI belong to the storage."""
    assert split_run_path(run) == (storage, name)


def test_a_folder_that_ray_removes_after_a_job_is_no_place_for_a_run(tmp_path: Path) -> None:
    """A relative path of a job leads there. Elsewhere nothing is wrong."""
    place = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_ab" / "runs"
    with pytest.raises(StorageError, match=r"in the folder of this job, which Ray removes after the job.*s3://bucket/runs"):
        RunDirectory.open(str(place), "a").check_lasting()
    RunDirectory.open(str(tmp_path), "a").check_lasting()
    RunDirectory.open("memory://runtime_resources/working_dir_files/x", "a").check_lasting()

"""Run directories, checkpoints and leases on object stores: real clients against servers of their protocols."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
import torch

from lte_ray import checkpoint
from lte_ray.data import local_copy, read_records
from lte_ray.data.records import fingerprint
from lte_ray.errors import DataError, StorageError
from lte_ray.run.history import read_rows
from lte_ray.run.metrics import Evaluation, MetricsLog
from lte_ray.run.metrics_files import list_files
from lte_ray.storage import PART_SUFFIX, RunDirectory, exclusive_lock, find_driver
from lte_ray.storage.conditional import ConditionalObject
from tests.support.checkpoint_damage import PLAN, write_checkpoint
from tests.support.object_stores import (
    BUCKET,
    KEYS,
    azure_server,
    gcs_generations,
    gcs_server,
    s3_server,
    s3_storage,
)
from tests.support.ray_runs import ROOT


class Place:
    """A folder on a server.

    Attributes:
        storage, filesystem: as of `RunDirectory.open`.
        wrong: a storage that doesn't exist.
    """

    def __init__(self, storage: str, filesystem: Any = None) -> None:
        self.storage, self.filesystem = storage, filesystem
        self.wrong = storage.replace(BUCKET, "no-such-bucket")

    def open(self, name: str, **settings: Any) -> RunDirectory:
        return RunDirectory.open(self.storage, name, self.filesystem, **settings)


@pytest.fixture(scope="module")
def s3() -> Iterator[Place]:
    with s3_server() as server:
        yield Place(s3_storage(server))


@pytest.fixture(scope="module", params=["s3", "gcs", "azure"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Each store whose server can be started here."""
    if request.param == "s3":
        yield request.getfixturevalue("s3")
    elif request.param == "gcs":
        with gcs_server() as server:
            yield Place(f"gs://anonymous@{BUCKET}/runs?scheme=http&endpoint_override={server}")
    else:
        with azure_server() as filesystem:
            yield Place(f"{BUCKET}/runs", filesystem)


def test_a_run_directory_works_as_on_a_disk(place: Place) -> None:
    """It is created once; files are written, appended to, listed, and removed. A wrong bucket is an immediate error."""
    directory = place.open("first")
    directory.create(exclusive=True)
    with pytest.raises(StorageError, match="another run has just taken this name"):
        directory.create(exclusive=True)
    directory.write("a/b", b"one")
    directory.write("a/b", b"other")
    directory.append("rows", b"1\n")
    directory.append("rows", b"2\n")
    assert (directory.read("a/b"), directory.read("rows"), directory.size("rows")) == (b"other", b"1\n2\n", 4)
    assert directory.read_range("rows", 1, 2) == b"\n2"
    assert [name for name in directory.list_names() if not name.startswith(".")] == ["a", "rows"]
    assert directory.list_sizes() == {"rows": 4}
    assert not any(name.endswith(PART_SUFFIX) for name in directory.list_names("a"))
    directory.delete("a")
    assert not directory.exists("a/b")
    directory.delete()
    assert not directory.exists()
    if place.filesystem is None:  # Azure's makes missing containers
        with pytest.raises(StorageError, match="can't be written"):
            RunDirectory.open(place.wrong, "r", patience=1.0).create()


def test_checkpoints_are_written_read_and_pruned(place: Place) -> None:
    """Incomplete checkpoints are removed and old ones pruned; a damaged one is named, and the one before it is used."""
    directory = place.open("second")
    for version in (1, 2, 3):
        write_checkpoint(directory, version)
    checkpoint.write_base(directory, 4, PLAN, torch.zeros(PLAN.base.size))
    assert checkpoint.complete_versions(directory) == [1, 2, 3]
    checkpoint.remove_incomplete(directory)
    checkpoint.prune(directory, 2)
    assert checkpoint.complete_versions(directory) == [2, 3]
    intact = directory.read("checkpoints/000003/head-0001.safetensors")
    directory.write("checkpoints/000003/head-0001.safetensors", intact[:-1] + bytes([intact[-1] ^ 1]))
    manifest, passed = checkpoint.read_newest_intact(directory)
    assert manifest.version == 2
    assert "000003/head-0001.safetensors is damaged" in passed[0]


def test_metrics_are_written_in_segments(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """And read as one; a resumed run removes what it repeats."""
    monkeypatch.setattr("lte_ray.run.metrics_files.SEGMENT_BYTES", 200)
    directory = place.open("segments")
    directory.create()
    log = MetricsLog(directory)
    for version in range(1, 9):
        log.record_evaluation(Evaluation(version, version, {"loss": 1.0}))
        log.close()
    assert len(list_files(directory)) > 2
    log = MetricsLog(directory)
    log.rewind(5)
    log.close()
    assert [row["version"] for row in read_rows(directory)] == [1, 2, 3, 4, 5]


def test_data_are_read_from_a_store(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file, a folder and a pattern, with pyarrow alone; what is missing or forbidden is one sentence."""
    if place.filesystem is not None:
        pytest.skip("a URI can't hold a key for a plain HTTP server")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    directory = place.open("data")
    for name, content in {"train/a.jsonl": b'{"n": 1}\n', "train/b.jsonl": b'{"n": 2}\n', "note.md": b"read me"}.items():
        directory.write(name, content)
    root, _, query = place.storage.partition("?")

    def url(name: str) -> str:
        return f"{root}/data/{name}?{query}"

    assert [record["n"] for _, record in read_records(url("train/b.jsonl"))] == [2]
    assert [record["n"] for _, record in read_records(url("train"))] == [1, 2]
    assert [record["n"] for _, record in read_records(url("train/*.jsonl"))] == [1, 2]
    assert [place for place, _ in read_records(url("train/a.jsonl"))] == [
        f"{place.storage.partition('://')[0]}://{BUCKET}/runs/data/train/a.jsonl, line 1"
    ]
    folder = Path(local_copy(url("")))
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")) == [
        "note.md",
        "train/a.jsonl",
        "train/b.jsonl",
    ]
    before = fingerprint(url("train"))
    directory.write("train/b.jsonl", b'{"n": 3, "more": 1}\n')
    assert fingerprint(url("train")) != before
    assert [record["n"] for _, record in read_records(url("train"))] == [1, 3]
    with pytest.raises(DataError, match=r"There is no file \w+://"):
        local_copy(url("nothing.jsonl"))


@pytest.fixture(params=["s3", "azure", "gcs"])
def lease_directory(request: pytest.FixtureRequest) -> Iterator[RunDirectory]:
    """A run directory on each store, for its lease."""
    pytest.importorskip("obstore")
    if request.param == "s3":
        yield request.getfixturevalue("s3").open("lease")
    elif request.param == "azure":
        with azure_server() as filesystem:
            yield RunDirectory.open(f"{BUCKET}/runs", "lease", filesystem)
    else:
        with gcs_generations() as server:
            filesystem = pafs.GcsFileSystem(anonymous=True, scheme="http", endpoint_override=server)
            yield RunDirectory.open(f"{BUCKET}/runs", "lease", filesystem)


def test_conditional_writes_are_refused_if_the_object_has_changed(lease_directory: RunDirectory) -> None:
    """Also with the state that was read; an object that is gone counts as changed."""
    first, other = (ConditionalObject(lease_directory, ".lease-test") for _ in range(2))
    assert first.read() is None
    tag = first.create(b"1")
    assert tag is not None
    assert other.create(b"2") is None
    assert other.read() == (b"1", tag)
    newer = other.replace(b"2", tag)
    assert newer is not None
    assert newer != tag
    assert first.replace(b"3", tag) is None
    assert first.read() == (b"2", newer)


HOLDER = """
import sys, time
from lte_ray.errors import LTEError
from lte_ray.storage import RunDirectory, exclusive_lock, lease
lease.LIFETIME, lease.SAFE, lease.RENEW_INTERVAL, lease.LOOK_INTERVAL = 2.0, 1.2, 0.2, 0.1
try:
    with exclusive_lock(RunDirectory.open(sys.argv[1], sys.argv[2])) as directory:
        print("holds", flush=True)
        for line in sys.stdin:
            directory.check_lease()
            directory.write("winner", line.encode())
            print("wrote", flush=True)
    print("released", flush=True)
except LTEError as error:
    print(type(error).__name__, error, flush=True)
"""


class Driver:
    """A process that holds a run's lease. For each line that it gets, it writes the line into a file."""

    def __init__(self, place: Place, name: str) -> None:
        command = [sys.executable, "-c", HOLDER, place.storage, name]
        environment = {**os.environ, **KEYS}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def write(self, line: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.read()

    def end(self) -> str:
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.read()


@pytest.fixture
def drivers() -> Iterator[list[Driver]]:
    pytest.importorskip("obstore")
    started: list[Driver] = []
    yield started
    for driver in started:
        driver.process.kill()
        driver.process.wait()


@pytest.mark.slow
def test_two_drivers_of_one_run_are_kept_apart(s3: Place, drivers: list[Driver]) -> None:
    """Real processes: started at once, one gets the run and the other says who trains it. A driver that hangs loses the run to
    the next one, and writes nothing when it goes on. One that is killed is followed, too, and one that ends at once."""
    drivers += [Driver(s3, "race") for _ in range(2)]
    answers = [driver.read() for driver in drivers]
    assert sorted(answer.partition(" ")[0] for answer in answers) == ["StorageError", "holds"]
    refused = next(answer for answer in answers if answer != "holds")
    first = drivers[answers.index("holds")]
    assert f"by process {first.process.pid} on " in refused
    assert first.write("first") == "wrote"
    os.kill(first.process.pid, signal.SIGSTOP)
    drivers.append(second := Driver(s3, "race"))
    assert second.read() == "holds"
    assert second.write("second") == "wrote"
    os.kill(first.process.pid, signal.SIGCONT)
    words = first.write("first again")
    assert words.startswith("LeaseLost")
    assert f"process {second.process.pid} on " in words
    assert "writes nothing more" in words
    assert s3.open("race").read("winner") == b"second\n"
    second.process.kill()
    drivers.append(third := Driver(s3, "race"))
    assert third.read() == "holds"
    assert third.end() == "released"
    assert find_driver(s3.open("race")).alive is False
    with exclusive_lock(s3.open("race")) as directory:
        assert directory.owner


def test_without_obstore_the_log_says_that_drivers_are_not_kept_apart(
    s3: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, with what to install."""
    monkeypatch.setitem(sys.modules, "obstore", None)
    with exclusive_lock(s3.open("alone")) as directory:
        assert directory.owner == ""
    assert [record.message for record in caplog.records if record.name.startswith("lte_ray")] == [
        f"Nothing keeps a second driver from training the run in {s3.open('alone').display} at the same time: the package "
        "obstore isn't installed: pip install 'lte-ray[cloud]'. Start it only once."
    ]

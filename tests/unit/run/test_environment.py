"""environment.json: with what, where and how each start of a run was made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lte_ray.errors import StorageError
from lte_ray.run.environment import (
    ENVIRONMENT,
    EnvironmentRecord,
    describe_environment,
    describe_git,
    redact_command,
    worker_folder,
)
from lte_ray.storage import RunDirectory
from workers.regression import Regression


def content(directory: RunDirectory) -> dict[str, object]:
    """The file."""
    return dict(json.loads(directory.read(ENVIRONMENT)))


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    """Of a run."""
    directory = RunDirectory.open(str(tmp_path), "r")
    directory.create()
    return directory


def test_versions_machine_and_command_are_described(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also the folder, and no secrets."""
    monkeypatch.setattr(sys, "argv", ["lte-ray", "train", "--worker.api-token", "HIDDEN"])
    found = describe_environment(tmp_path)
    assert {"lte-ray", "python", "torch", "ray", "numpy"} <= found["versions"].keys()
    assert found["command"] == ["lte-ray", "train", "--worker.api-token", "***"]
    assert found["host"]
    assert found["platform"]
    assert found["cpus"]
    assert found["folder"]
    assert "git" not in found


def test_the_git_commit_is_that_of_the_workers_folder(tmp_path: Path) -> None:
    """With whether tracked files have changed; files that git doesn't track don't count."""

    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("commit", "-q", "-m", "one")
    (tmp_path / "b.py").write_text("1")
    commit = git("rev-parse", "HEAD")
    assert describe_git(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "a.py").write_text("2")
    assert describe_git(tmp_path) == {"commit": commit, "dirty": True}
    assert describe_git(tmp_path / "missing") == {}
    assert worker_folder(Regression()) == str(Path(__file__).parents[3] / "workers")


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["--worker.api-token=X"], ["--worker.api-token=***"]),
        (["--worker.password", "X", "--steps", "3"], ["--worker.password", "***", "--steps", "3"]),
        (["--worker.password", "--steps", "3"], ["--worker.password", "--steps", "3"]),
        (["--storage", "s3://KEY:X@bucket/runs"], ["--storage", "s3://bucket/runs"]),
        (["--storage=s3://KEY:X@bucket/runs"], ["--storage=s3://bucket/runs"]),
        (["--worker.tokens", "5"], ["--worker.tokens", "5"]),
    ],
)
def test_the_command_line_has_no_secrets(given: list[str], shown: list[str]) -> None:
    """Values of flags with a secret's name, and credentials in URIs."""
    assert redact_command(given) == shown


def test_each_start_of_a_run_is_recorded_under_one_id(directory: RunDirectory) -> None:
    """A resumed run adds one, and what is known later joins it."""
    first = EnvironmentRecord.start(directory, {"host": "a"}, version=0, config={"steps": 1})
    second = EnvironmentRecord.start(directory, {"host": "b"}, version=3)
    second.add(devices={"0": "cpu"})
    assert first.id == second.id == content(directory)["id"]
    one, two = content(directory)["starts"]  # type: ignore[misc]
    assert (one["host"], one["version"], one["config"]) == ("a", 0, {"steps": 1})
    assert (two["host"], two["version"], two["devices"]) == ("b", 3, {"0": "cpu"})
    assert one["at"].endswith("Z")


@pytest.mark.parametrize("damage", [b"", b"[1]", b'{"id": "../x", "starts": []}', b'{"id": "ab", "starts": 5}', b"\xff"])
def test_a_damaged_file_never_stops_a_run(directory: RunDirectory, damage: bytes) -> None:
    """The run gets another id."""
    directory.write(ENVIRONMENT, damage)
    record = EnvironmentRecord.start(directory, {"host": "a"})
    assert record.id.isalnum()
    assert [start["host"] for start in content(directory)["starts"]] == ["a"]  # type: ignore[attr-defined]


def test_storage_that_fails_costs_only_the_file(directory: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on."""

    def fails(*_: object) -> None:
        raise StorageError("no")

    monkeypatch.setattr(RunDirectory, "write", fails)
    EnvironmentRecord.start(directory, {"host": "a"}).add(devices={})
    assert not directory.exists(ENVIRONMENT)

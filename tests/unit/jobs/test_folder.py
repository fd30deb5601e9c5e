"""What of a folder goes with a job."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from lte_ray.errors import ConfigError
from lte_ray.jobs import folder as jobs_folder
from lte_ray.jobs.folder import read_folder


def write(root: Path, **files: str) -> Path:
    """Writes files whose names are keys with "__" for "/" and "_" for "."."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_environments_repositories_caches_and_runs_stay_here(tmp_path: Path) -> None:
    """By their names, or by what is in them."""
    write(tmp_path, mine_py="a", data__x_txt="bcd")
    for name in (
        ".git/HEAD",
        ".venv/x",
        "sub/__pycache__/x.pyc",
        "my-env/pyvenv.cfg",
        "my-env/big",
        "out/a/run.toml",
        "out/a/m",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x" * 1000)
    folder = read_folder(tmp_path)
    assert folder.files == {"data/x.txt": 3, "mine.py": 1}
    assert folder.size == 4
    assert folder.left_out == {
        ".git": "lte-ray submit never sends it",
        ".venv": "lte-ray submit never sends it",
        "sub/__pycache__": "lte-ray submit never sends it",
        "my-env": "it is a virtual environment",
        "out/a": "it is a run of lte-ray (lte-ray export makes a file of it)",
    }
    assert folder.why_left_out("out/a/checkpoints/1") == "it is a run of lte-ray (lte-ray export makes a file of it)"
    assert folder.why_left_out("mine.py") is None


def test_ignore_files_count_as_in_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the folder that they are in and below; a pattern with a slash at its end is for folders."""
    write(tmp_path, mine_py="a", runs__a="x", b__data_csv="x", b__keep_csv="x", c__data_csv="x")
    (tmp_path / ".gitignore").write_text("runs/\n# a comment\n")
    (tmp_path / "b" / ".rayignore").write_text("*.csv\n!keep.csv\n")
    folder = read_folder(tmp_path)
    assert set(folder.files) == {".gitignore", "b/.rayignore", "b/keep.csv", "c/data.csv", "mine.py"}
    assert folder.left_out == {"runs": ".gitignore excludes it", "b/data.csv": "b/.rayignore excludes it"}
    monkeypatch.setenv("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "1")
    assert "runs/a" in read_folder(tmp_path).files


def test_links_pipes_and_unreadable_files_are_no_trap(tmp_path: Path) -> None:
    """Links to files and folders are followed, but not in a circle; a pipe would never end."""
    inner = write(tmp_path / "job", mine_py="a", sub__x_py="b")
    outside = write(tmp_path / "data", a_txt="abc")
    (inner / "data").symlink_to(outside)
    (inner / "sub" / "up").symlink_to(inner)
    (inner / "gone").symlink_to(tmp_path / "missing")
    os.mkfifo(inner / "pipe")
    folder = read_folder(inner)
    assert folder.files == {"data/a.txt": 3, "mine.py": 1, "sub/x.py": 1}
    assert folder.left_out == {
        "gone": "it is no regular file",
        "pipe": "it is no regular file",
        "sub/up": "it is a link to a folder around it",
    }


def test_a_folder_that_is_too_large_names_its_largest_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And says what to do, before anything is read."""
    write(tmp_path, mine_py="a", big_bin="x" * 900, small_bin="x" * 200, b__middle_bin="x" * 400, tiny_bin="x" * 20)
    monkeypatch.setattr(jobs_folder, "LIMIT", 1500)
    with pytest.raises(ConfigError, match=r"largest files are big.bin \(900 B\), b/middle.bin \(400 B\), small.bin \(200 B\)"):
        read_folder(tmp_path)
    (tmp_path / ".rayignore").write_text("big.bin\n")
    assert read_folder(tmp_path).size < 1500


def test_a_home_directory_is_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has keys and everything else. A missing folder is an error, too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="which holds more than a job's files"):
        read_folder(tmp_path)
    with pytest.raises(ConfigError, match="there is no such folder"):
        read_folder(tmp_path / "missing")


def test_equal_folders_give_equal_archives(tmp_path: Path) -> None:
    """So Ray takes an unchanged folder once. Files keep their bytes and permissions."""
    files = {"mine_py": "print(1)", "sub__run_sh": "#!/bin/sh"}
    first, second = write(tmp_path / "a", **files), write(tmp_path / "b", **files)
    for root in (first, second):
        (root / "sub" / "run.sh").chmod(0o755)
        read_folder(root).archive(root.with_suffix(".zip"))
    os.utime(second / "mine.py", (1, 1))
    read_folder(second).archive(tmp_path / "again.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes() == (tmp_path / "again.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.read("mine.py") == b"print(1)"
        assert archive.getinfo("sub/run.sh").external_attr >> 16 & 0o777 == 0o755

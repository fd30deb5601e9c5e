"""What `errors.log` has of an error."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest

import lte_ray
from lte_ray.errors import HeadLost, StorageError, WorkerFailed
from lte_ray.run.error_log import ERRORS, ErrorLog, reason, summarize, users_frames
from lte_ray.storage import RunDirectory

FRAMEWORK = Path(lte_ray.__file__).parent / "engine" / "head" / "head.py"

TRACEBACK = f"""Traceback (most recent call last):
  File "{FRAMEWORK}", line 480, in _calling
    yield
  File "/home/me/net.py", line 20, in loss
    raise ValueError("sample 17\\nis broken")
    ^^^^^^^^^^^
  File "/env/lib/python3.11/site-packages/torch/nn/functional.py", line 1, in relu
    return x
ValueError: sample 17
is broken
"""


def logged(tmp_path: Path) -> ErrorLog:
    directory = RunDirectory.open(str(tmp_path), "run")
    directory.create()
    return ErrorLog(directory)


def test_the_users_own_lines_come_first(tmp_path: Path) -> None:
    """Then the whole traceback, and the next error below; the path is returned."""
    log, file = logged(tmp_path), tmp_path / "run" / ERRORS
    for step in (5, 6):
        assert log.record(WorkerFailed("head 1", step, TRACEBACK), "head 1, process 0") == str(file)
    first, second = file.read_text().split("local step 6")
    assert "head 1, process 0: The worker failed in head 1 at local step 5: ValueError: sample 17" in first
    assert first.index('In your code:\n  File "/home/me/net.py", line 20') < first.index(f"All of it:\n{TRACEBACK}")
    assert second.count("All of it:") == 1


def test_only_frames_of_the_users_files_are_the_users() -> None:
    """Neither those of lte-ray, nor of installed packages, nor of Python itself."""
    assert users_frames(TRACEBACK).splitlines()[0] == '  File "/home/me/net.py", line 20, in loss'
    assert users_frames(TRACEBACK).count("File") == 1
    try:
        Path(tmp := "missing").read_text()
    except FileNotFoundError:
        text = traceback.format_exc()
    assert tmp in reason(text)
    assert [line.split('"')[1] for line in users_frames(text).splitlines() if "File" in line] == [__file__]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (TRACEBACK, "ValueError: sample 17"),
        (
            TRACEBACK + "\nDuring handling of the above exception, another exception occurred:\n\n" + TRACEBACK[:-10],
            "ValueError: sample 17",
        ),
        ("Ray gave this head a GPU, but ...", "Ray gave this head a GPU, but ..."),
        ("", ""),
    ],
)
def test_the_reason_is_the_line_of_the_exception(text: str, line: str) -> None:
    """Not the last line of its message; text without frames is its own reason."""
    assert reason(text) == line


def test_a_death_is_summarized_by_its_first_line(tmp_path: Path) -> None:
    """What Ray says below goes to the file."""
    error = HeadLost("The process of head 1 died: The actor died.\n\tclass_name: HeadActor")
    assert summarize(error) == "The process of head 1 died: The actor died."
    logged(tmp_path).record(error, "head 1, process 0")
    assert "class_name: HeadActor" in (tmp_path / "run" / ERRORS).read_text()


def test_storage_that_fails_costs_only_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no path to name then."""

    def fails(*_: object) -> None:
        raise StorageError("no")

    log = logged(tmp_path)
    monkeypatch.setattr(RunDirectory, "append", fails)
    assert log.record(HeadLost("it died"), "head 1, process 0") == ""

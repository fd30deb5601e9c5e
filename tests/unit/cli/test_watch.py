"""`lte-ray runs`, `status`, `watch` and `logs`, on runs made by hand."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lte_ray.cli import run_status
from lte_ray.cli.main import main
from lte_ray.run.error_log import ERRORS
from lte_ray.storage import RUN, exclusive_lock
from tests.support.run_folders import add_checkpoint, add_rows, evaluation_row, event_row, make_run, merge_row

NOW = time.time()


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A finished run with an event and a traceback."""
    rows = [merge_row(1, NOW - 9), event_row("head_lost", NOW - 8, heads=[1], why="killed", remedy="restart")]
    rows += [merge_row(2, NOW - 7), evaluation_row(2, NOW - 6, loss=0.25), event_row("finished", NOW - 5, version=2)]
    make_run(tmp_path / "done", *rows)
    (tmp_path / "done" / ERRORS).write_text("2026-01-02 03:04:05 head 1: killed\n\n\tat line 3\n")
    return tmp_path / "done"


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command prints, which must end well."""
    assert main([*arguments]) == 0
    return capsys.readouterr().out


def test_status_shows_state_progress_figures_and_events(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By path and by name."""
    text = shown(capsys, "status", str(finished))
    assert text.startswith(f"{finished}: finished\n")
    for part in ("step 20/100", "base v2", "loss 0.25 (v2)", "head_lost  heads 1  remedy restart: killed"):
        assert part in text
    assert shown(capsys, "status", "done", "--storage", str(finished.parent)) == text


def test_status_as_json_is_one_object(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the fields that the documentation names."""
    status = json.loads(shown(capsys, "status", str(finished), "--json"))
    assert (status["state"], status["step"], status["steps"], status["evaluation"]) == (
        "finished",
        20,
        100,
        {"version": 2, "loss": 0.25},
    )
    assert status["heads"]["1"] == {"step": 20, "samples": 160, "loss": 1.5, "version": 2, "state": "", "device": "cuda:0"}
    assert [row["event"] for row in status["events"]] == ["head_lost", "finished"]


def test_a_run_that_can_be_resumed_says_how(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its folder is named as `resume` takes it."""
    make_run(tmp_path / "r", merge_row(1, NOW - 9), event_row("ended_early", NOW - 8, why="Ctrl-C"))
    add_checkpoint(tmp_path / "r", 1)
    text = shown(capsys, "status", str(tmp_path / "r"))
    assert "ended early: Ctrl-C\n" in text
    assert f"Continue it from checkpoint 1: lte-ray resume {tmp_path / 'r'}\n" in text


def test_what_is_missing_is_said(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rest is shown."""
    (finished / RUN).write_text("steps = [")
    text = shown(capsys, "status", str(finished))
    assert "Missing: " in text
    assert "run.toml is damaged" in text
    assert "base v2" in text


def test_runs_lists_a_storage_newest_first(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a table, and as JSON. A folder without runs says so."""
    make_run(finished.parent / "newer", merge_row(1, NOW - 2))
    lines = shown(capsys, "runs", str(finished.parent)).splitlines()
    assert [line.split()[0] for line in lines] == ["run", "newer", "done"]
    assert "finished" in lines[2]
    listed = json.loads(shown(capsys, "runs", str(finished.parent), "--json"))
    assert [each["name"] for each in listed["runs"]] == ["newer", "done"]
    (finished.parent / "empty").mkdir()
    assert "There are no runs in" in shown(capsys, "runs", str(finished.parent / "empty"))


def test_logs_are_events_and_tracebacks(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In this order. As JSON, one object a line."""
    lines = shown(capsys, "logs", str(finished)).splitlines()
    assert [line.split("  ")[1] for line in lines[:2]] == ["head_lost", "finished"]
    assert lines[2:] == ["2026-01-02 03:04:05 head 1: killed", "", "    at line 3"]
    rows = [json.loads(line) for line in shown(capsys, "logs", str(finished), "--json").splitlines()]
    assert [row.get("event") for row in rows[:2]] == ["head_lost", "finished"]
    assert rows[-1] == {"error_log": "\tat line 3"}


def test_logs_of_a_quiet_run_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is no error."""
    make_run(tmp_path / "r", merge_row(1, NOW))
    assert shown(capsys, "logs", str(tmp_path / "r")) == f"{tmp_path / 'r'} has no events and no errors yet.\n"


def test_a_runs_files_can_not_change_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Control characters in rows and tracebacks, which anyone who can write there may put there."""
    evil = "a\x1b]0;title\x07\x1b[2Jb"
    run = make_run(tmp_path / "r", merge_row(1, NOW), evaluation_row(1, NOW, **{evil: 1.0}))
    add_rows(tmp_path / "r", event_row("ended_early", NOW, why=evil, **{evil: evil}))
    run.append(ERRORS, f"{evil}\n".encode())
    for command in (
        ["status", str(tmp_path / "r")],
        ["logs", str(tmp_path / "r")],
        ["runs", str(tmp_path)],
        ["watch", str(tmp_path / "r")],
    ):
        assert "\x1b" not in shown(capsys, *command), command


Steps = Callable[[list[Callable[[], object]]], None]


@pytest.fixture
def while_waiting(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """Replaces waiting: each time, the next of these calls is made."""

    def use(calls: list[Callable[[], object]]) -> None:
        remaining = iter(calls)
        monkeypatch.setattr(run_status, "sleep", lambda seconds: next(remaining)())

    return use


def test_watch_ends_with_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], while_waiting: Steps) -> None:
    """A line for each evaluation, and the state at the end."""
    run = make_run(tmp_path / "r", merge_row(1, NOW), evaluation_row(1, NOW, loss=0.5))
    lock = exclusive_lock(run)
    lock.__enter__()
    while_waiting(
        [
            lambda: add_rows(tmp_path / "r", merge_row(2, NOW + 1), evaluation_row(2, NOW + 1, loss=0.25)),
            lambda: add_rows(tmp_path / "r", event_row("finished", NOW + 2, version=2)),
            lambda: lock.__exit__(None, None, None),
        ]
    )
    lines = shown(capsys, "watch", str(tmp_path / "r")).splitlines()
    assert ["loss 0.5 (v1)" in lines[0], "loss 0.25 (v2)" in lines[1], lines[-1]] == [True, True, f"{tmp_path / 'r'}: finished"]


def test_watch_as_json_is_an_object_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], while_waiting: Steps) -> None:
    """Each as `status --json` has it."""
    run = make_run(tmp_path / "r", merge_row(1, NOW))
    lock = exclusive_lock(run)
    lock.__enter__()
    while_waiting([lambda: add_rows(tmp_path / "r", merge_row(2, NOW + 1)), lambda: lock.__exit__(None, None, None)])
    lines = [json.loads(line) for line in shown(capsys, "watch", str(tmp_path / "r"), "--json").splitlines()]
    assert [(line["state"], line["version"]) for line in lines] == [("running", 1), ("running", 2), ("silent", 2)]


def test_ctrl_c_leaves_the_run_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str], while_waiting: Steps) -> None:
    """Nothing in its folder changes."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    run = make_run(tmp_path / "r", merge_row(1, NOW))
    with exclusive_lock(run):
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "r").iterdir()}
        for command in ("watch", "logs"):
            while_waiting([interrupt])
            assert main([command, str(tmp_path / "r"), *(["--follow"] if command == "logs" else [])]) == 130
            assert "The run isn't affected." in capsys.readouterr().err
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "r").iterdir()} == before


def test_logs_follow_until_the_run_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str], while_waiting: Steps) -> None:
    """What comes between is shown once."""
    run = make_run(tmp_path / "r", event_row("resumed", NOW, version=1))
    lock = exclusive_lock(run)
    lock.__enter__()
    while_waiting(
        [
            lambda: add_rows(tmp_path / "r", event_row("still", NOW + 1, seconds=30, why="x")),
            lambda: (add_rows(tmp_path / "r", event_row("finished", NOW + 2)), lock.__exit__(None, None, None)),
        ]
    )
    lines = shown(capsys, "logs", str(tmp_path / "r"), "--follow").splitlines()
    assert [line.split("  ")[1].rstrip(":") for line in lines] == ["resumed", "still", "finished"]


def test_storage_that_fails_for_a_while_is_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], while_waiting: Steps
) -> None:
    """Then the display goes on."""
    run = make_run(tmp_path / "r", merge_row(1, NOW), event_row("finished", NOW + 1))
    path = tmp_path / "r" / RUN
    lock = exclusive_lock(run)
    lock.__enter__()
    while_waiting(
        [lambda: path.rename(tmp_path / "away"), lambda: ((tmp_path / "away").rename(path), lock.__exit__(None, None, None))]
    )
    lines = [json.loads(line) for line in shown(capsys, "watch", str(tmp_path / "r"), "--json").splitlines()]
    assert [line["state"] for line in lines] == ["running", "running", "finished"]
    assert "it has no run.toml" in lines[1]["note"]


@pytest.mark.parametrize("command", ["status", "watch", "logs"])
def test_a_folder_that_is_no_run_is_one_clear_error(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And a name that isn't there."""
    assert main([command, str(tmp_path)]) == 2
    assert "There is no run in" in capsys.readouterr().err
    assert main([command, "nothing", "--storage", str(tmp_path)]) == 2
    assert f"There is no run in {tmp_path}/nothing: it has no run.toml." in capsys.readouterr().err


def test_neither_torch_nor_ray_is_imported(finished: Path) -> None:
    """All four answer fast."""
    calls = [["runs", str(finished.parent)], *([command, str(finished)] for command in ("status", "watch", "logs"))]
    code = (
        f"import sys\nfrom lte_ray.cli.main import main\nfor call in {calls!r}: main(call)\n"
        "assert not {'torch', 'ray'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

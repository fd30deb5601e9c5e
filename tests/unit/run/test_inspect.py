"""What a run's files tell about it: its state, its progress, and what can't be read."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from lte_ray.errors import StorageError
from lte_ray.run import inspect as inspecting
from lte_ray.run.inspect import inspect_run, inspect_runs, list_runs
from lte_ray.run.metrics_files import METRICS
from lte_ray.storage import RUN, RunDirectory
from tests.support.run_folders import (
    add_checkpoint,
    add_model,
    add_rows,
    driver,
    evaluation_row,
    event_row,
    leave_lock,
    make_run,
    merge_row,
    write_start,
)

NOW = math.floor(time.time())


@pytest.fixture(autouse=True)
def now() -> None:
    """The suite may run for minutes before a test does."""
    globals()["NOW"] = math.floor(time.time())


def three_merges(folder: Path, **settings: object) -> RunDirectory:
    """A run with three merges, a second apart, and an evaluation."""
    rows = [merge_row(version, NOW - 10 + version) for version in (1, 2, 3)]
    return make_run(folder, *rows, evaluation_row(3, NOW - 6, loss=0.25), **settings)


def test_a_run_that_goes_on_is_shown_as_its_driver_shows_it(tmp_path: Path) -> None:
    """Steps, samples, rate, losses, devices, the evaluation and the time that remains."""
    run = three_merges(tmp_path / "r")
    add_checkpoint(tmp_path / "r", 2)
    with driver(run):
        status = inspect_run(run)
    p = status.progress
    assert (status.state, status.driver.alive, status.is_over, status.missing) == ("running", True, False, ())
    assert status.driver.name.startswith(f"{os.getpid()} on ")
    assert (p.run, p.step, p.steps, p.samples, p.version, p.checkpoint, p.note) == ("r", 30, 100, 480, 3, 2, "")
    assert p.samples_per_second == pytest.approx(160)
    assert p.remaining == pytest.approx(7.0)
    assert [(h.head, h.step, h.loss, h.version, h.device) for h in p.heads] == [
        (0, 30, pytest.approx(1 / 3), 3, "cpu"),
        (1, 30, pytest.approx(4 / 3), 3, "cuda:0"),
    ]
    assert p.evaluation is not None
    assert (p.evaluation.version, p.evaluation.values) == (3, {"loss": 0.25})


def test_a_run_that_has_finished_is_finished(tmp_path: Path) -> None:
    """Its event says so, whatever its files' times are."""
    run = three_merges(tmp_path / "r")
    add_rows(tmp_path / "r", event_row("finished", NOW - 5, version=3))
    status = inspect_run(run)
    assert (status.state, status.why, status.is_over, status.is_resumable) == ("finished", "", True, False)
    assert status.progress.remaining is None
    assert status.progress.seconds == pytest.approx(5, abs=2)


def test_a_finished_run_of_an_older_release_is_known_by_its_model(tmp_path: Path) -> None:
    """It was written after `run.toml`. A model of before the newest start says nothing."""
    run = three_merges(tmp_path / "r")
    add_model(tmp_path / "r")
    os.utime(tmp_path / "r" / RUN, (NOW - 20, NOW - 20))
    assert inspect_run(run).state == "finished"
    os.utime(tmp_path / "r" / "model.safetensors", (NOW - 30, NOW - 30))
    assert inspect_run(run).state == "silent"


def test_a_run_that_was_stopped_says_why(tmp_path: Path) -> None:
    """It finished before its last step. Until it has, it goes on."""
    run = three_merges(tmp_path / "r")
    add_rows(tmp_path / "r", event_row("stopped", NOW - 5, by="patience", why="loss hasn't improved", version=3))
    add_checkpoint(tmp_path / "r", 3)
    with driver(run):
        going_on = inspect_run(run)
    assert (going_on.state, going_on.progress.note) == ("running", "ends early: loss hasn't improved")
    add_rows(tmp_path / "r", event_row("finished", NOW - 4, version=3))
    status = inspect_run(run)
    assert (status.state, status.why, status.is_resumable) == ("stopped", "loss hasn't improved", True)


def test_a_run_that_ended_early_says_why(tmp_path: Path) -> None:
    """Rows of merges may follow, which it recorded while it saved."""
    run = three_merges(tmp_path / "r")
    add_rows(tmp_path / "r", event_row("ended_early", NOW - 4, why="HeadLost: head 1 died"), merge_row(4, NOW - 3))
    status = inspect_run(run)
    assert (status.state, status.why, status.is_resumable) == ("ended-early", "HeadLost: head 1 died", False)
    add_checkpoint(tmp_path / "r", 4)
    assert inspect_run(run).is_resumable


def test_what_an_earlier_start_said_does_not_count(tmp_path: Path) -> None:
    """A resumed run that was killed has no last words, though it had some before."""
    run = three_merges(tmp_path / "r")
    add_rows(tmp_path / "r", event_row("ended_early", NOW - 4, why="Ctrl-C"))
    write_start(tmp_path / "r", NOW - 2)  # from its beginning: without a checkpoint there is no event "resumed"
    assert inspect_run(run).state == "silent"
    (tmp_path / "r" / "environment.json").unlink()
    assert inspect_run(run).state == "ended-early"
    add_rows(tmp_path / "r", event_row("resumed", NOW - 2, version=3, heads=2, anew=[]))
    assert inspect_run(run).state == "silent"


def test_a_driver_that_was_killed_leaves_no_sign_of_life(tmp_path: Path) -> None:
    """Its lock is free again, and names it."""
    run = three_merges(tmp_path / "r")
    leave_lock(tmp_path / "r", f"1 on {os.uname().nodename}")
    status = inspect_run(run)
    assert (status.state, status.why, status.is_over) == ("silent", "its driver ended without saying why", True)
    assert status.since == NOW - 6


def test_where_nothing_tells_whether_the_driver_is_alive_rows_do(tmp_path: Path) -> None:
    """In a bucket, and for a driver on another machine: a run counts as running while rows come."""
    three_merges(tmp_path / "r")
    leave_lock(tmp_path / "r", "1 on another-machine")
    elsewhere = RunDirectory(pafs.SubTreeFileSystem("/", pafs.LocalFileSystem()), str(tmp_path / "r"), "s3://bucket/r", 0.0)
    for run in (RunDirectory.open(str(tmp_path), "r"), elsewhere):
        status = inspect_run(run)
        assert (status.state, status.driver.alive, status.is_over) == ("running", None, False)
    old = [merge_row(version, NOW - 1000 + version) for version in (1, 2)]
    run = dataclasses.replace(make_run(tmp_path / "old", *old), filesystem=elsewhere.filesystem)
    status = inspect_run(run)
    assert (status.state, status.is_over) == ("silent", False)
    assert status.why.startswith("no row for ")


def test_rare_merges_are_not_taken_for_silence(tmp_path: Path) -> None:
    """A merge an hour is as often as before."""
    rows = [merge_row(version, NOW - 3600 * (4 - version)) for version in (1, 2, 3)]
    make_run(tmp_path / "r", *rows)
    leave_lock(tmp_path / "r", "1 on another-machine")
    assert inspect_run(RunDirectory.open(str(tmp_path), "r")).state == "running"


def test_a_run_without_rows_starts(tmp_path: Path) -> None:
    """Nothing was merged yet."""
    run = make_run(tmp_path / "r", started=NOW)
    with driver(run):
        status = inspect_run(run)
    assert (status.state, status.progress.step, status.progress.note) == ("running", 0, "no merge yet since the start")
    assert status.missing == ()
    assert inspect_run(run).missing == (f"There is no {METRICS}: nothing was merged or reported yet.",)


def test_shared_steps_count_together(tmp_path: Path) -> None:
    """Without waiting, all heads together take steps times heads."""
    rows = [merge_row(1, NOW - 3, (0,), steps=30), merge_row(2, NOW - 2, (1,), steps=5)]
    assert inspect_run(make_run(tmp_path / "r", *rows, wait=False)).progress.step == 20


def test_heads_that_were_dropped_do_not_hold_the_run_up(tmp_path: Path) -> None:
    """The others' steps count, and the display says what happened."""
    rows = [merge_row(1, NOW - 4), event_row("head_dropped", NOW - 3, heads=[1], why="died"), merge_row(2, NOW - 2, (0,))]
    progress = inspect_run(make_run(tmp_path / "r", *rows)).progress
    assert progress.step == 20
    assert [h.state for h in progress.heads] == ["", "dropped"]


def test_a_stall_is_told(tmp_path: Path) -> None:
    """As long as nothing was merged since."""
    run = three_merges(tmp_path / "r")
    add_rows(tmp_path / "r", event_row("still", NOW - 2, seconds=30, why="head 1 is training"))
    with driver(run):
        assert inspect_run(run).progress.note == "nothing has moved: head 1 is training"
        add_rows(tmp_path / "r", merge_row(4, NOW - 1))
        assert inspect_run(run).progress.note == ""


def test_an_old_evaluation_is_found_behind_many_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows between are neither parsed nor kept."""
    monkeypatch.setattr("lte_ray.run.newest_rows.MOST_BYTES", 5000)
    monkeypatch.setattr("lte_ray.run.newest_rows.LEAST_BYTES", 1000)
    monkeypatch.setattr("lte_ray.run.tail.BLOCK", 700)
    rows = [evaluation_row(1, NOW - 1000, loss=0.5), *(merge_row(v, NOW - 900 + v) for v in range(1, 400))]
    progress = inspect_run(make_run(tmp_path / "r", *rows, eval_every=1000)).progress
    assert progress.evaluation is not None
    assert progress.evaluation.values == {"loss": 0.5}
    assert progress.version == 399


def test_what_is_damaged_is_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    """Settings, environment, a row and the end of the last one."""
    run, folder = three_merges(tmp_path / "r"), tmp_path / "r"
    (folder / RUN).write_text('steps = "many"\n')
    (folder / "environment.json").write_text("{")
    with (folder / METRICS).open("ab") as file:
        file.write(b'\xff\x00 no row\n[1]\n{"kind": "merge", "ver')
    status = inspect_run(run)
    assert status.progress.version == 3
    assert "run.toml: steps" in status.missing[0] or "steps is 'many'" in status.missing[0]
    assert status.missing[1].startswith("environment.json can't be read")
    assert status.missing[2:] == (
        f"2 of the newest lines of {METRICS} can't be read and are left out.",
        f"The last line of {METRICS} is incomplete and is left out.",
    )
    (folder / RUN).write_text("= no TOML")
    assert "run.toml is damaged" in inspect_run(run).missing[0]


@pytest.mark.parametrize(
    "row",
    [
        {"kind": "merge"},
        {"kind": "merge", "at": "soon", "version": None, "step": [], "heads": 3, "train_loss": [1], "held": "x"},
        {"kind": "merge", "at": 1e400, "version": 4, "heads": ["0", None, 1], "train_loss": {"1": None}, "held": {"1": 2}},
        {"kind": "evaluation", "values": [1]},
        {"kind": "event"},
        {"kind": "event", "event": "head_dropped", "heads": "all", "at": None},
        {"kind": "event", "event": ["finished"], "why": {}},
        {"kind": "of the future", "at": 3},
    ],
    ids=str,
)
def test_rows_of_another_format_never_end_in_an_error(tmp_path: Path, row: dict[str, object]) -> None:
    """They count as far as they can be understood."""
    run = make_run(tmp_path / "r", merge_row(1, NOW - 3), row)
    assert inspect_run(run).progress.steps == 100
    assert inspect_run(run).as_dict()["steps"] == 100


def test_rows_of_an_older_release_have_no_samples_of_heads(tmp_path: Path) -> None:
    """Their step is that of the merge, and a sentence says what is missing."""
    rows = [{name: value for name, value in merge_row(v, NOW - 5 + v).items() if name != "held"} for v in (1, 2)]
    status = inspect_run(make_run(tmp_path / "r", *rows))
    assert (status.progress.step, status.progress.samples) == (20, 0)
    assert "older release" in status.missing[0]


def test_a_folder_that_is_no_run_is_one_clear_error(tmp_path: Path) -> None:
    """It names the file that a run would have."""
    (tmp_path / "other").mkdir()
    with pytest.raises(StorageError, match=r"There is no run in .*other: it has no run.toml"):
        inspect_run(RunDirectory.open(str(tmp_path), "other"))


def test_runs_of_a_storage_are_listed(tmp_path: Path) -> None:
    """Folders without run.toml aren't, and a run that can't be read costs no other."""
    three_merges(tmp_path / "a")
    three_merges(tmp_path / "b")
    (tmp_path / "other").mkdir()
    found = list_runs(str(tmp_path))
    assert [run.path.rpartition("/")[2] for run in found] == ["a", "b"]
    (tmp_path / "a" / RUN).unlink()
    (tmp_path / "a" / RUN).mkdir()
    broken, whole = inspect_runs(found)
    assert not isinstance(whole, StorageError)
    assert isinstance(broken, StorageError) or broken.missing
    with pytest.raises(StorageError, match="is a run, not a folder of runs"):
        list_runs(str(tmp_path / "b"))
    with pytest.raises(StorageError, match="There is no folder"):
        list_runs(str(tmp_path / "nowhere"))


def test_states_are_few(tmp_path: Path) -> None:
    """Every value of JSON's state is documented."""
    page = (Path(inspecting.__file__).parents[2] / "docs" / "watch.md").read_text()
    for state in inspecting.State.__args__:
        assert f"`{state}`" in page

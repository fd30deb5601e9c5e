"""The rows of a run where files can't be appended to: segments instead of one file, read as one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lte_ray.run import metrics_files, tail
from lte_ray.run.history import read_rows
from lte_ray.run.metrics import Evaluation, MetricsLog
from lte_ray.run.metrics_files import METRICS, MetricsReader, list_files, segment_name
from lte_ray.run.tail import LineFollower, is_event, read_lines, read_lines_back
from lte_ray.storage import RunDirectory
from tests.support.faulty_storage import FaultScript, fail, faulty


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment holds about three rows."""
    monkeypatch.setattr(metrics_files, "SEGMENT_BYTES", 250)


def store(path: Path) -> tuple[RunDirectory, FaultScript]:
    """A run directory that isn't on a local disk, as far as lte-ray can tell."""
    path.mkdir(exist_ok=True)
    directory, script = faulty(path, patience=0.0)
    directory.create()
    return directory, script


def add(log: MetricsLog, *versions: int) -> None:
    """Adds an evaluation and an event for each version, each in a write of its own."""
    for version in versions:
        log.record_evaluation(Evaluation(version, 10 * version, {"loss": 1.0 / version}))
        log.record_event("seen", number=version)
        log.close()


def summary(directory: RunDirectory) -> list[tuple[str, int]]:
    return [(row["kind"], row.get("version", row.get("number"))) for row in read_rows(directory)]


def both(*versions: int) -> list[tuple[str, int]]:
    return [each for version in versions for each in (("evaluation", version), ("event", version))]


def test_a_write_repeats_one_segment_and_not_all_rows(tmp_path: Path) -> None:
    """Full segments are never written again, so the bytes of all writes grow with the rows, not with their square."""
    directory, _ = store(tmp_path)
    log, written = MetricsLog(directory), list[tuple[str, int]]()
    write = RunDirectory.write

    def count(self: RunDirectory, relative: str, data: bytes) -> None:
        written.append((relative, len(data)))
        write(self, relative, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "write", count)
        add(log, *range(1, 41))
    names = list(list_files(directory))
    assert len(names) > 10
    assert names == [segment_name(n + 1) for n in range(len(names))]
    assert not directory.exists(METRICS)
    assert [name for name, _ in written] == sorted(name for name, _ in written)
    assert max(size for _, size in written) < 600
    assert summary(directory) == both(*range(1, 41))


def test_a_local_folder_keeps_one_file(tmp_path: Path) -> None:
    """A disk can append."""
    directory = RunDirectory.open(str(tmp_path), "r")
    directory.create()
    add(MetricsLog(directory), *range(1, 21))
    assert list(list_files(directory)) == [METRICS]


def test_every_reader_reads_segments_as_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, back, as a whole, and following; also after a run of the older layout was continued."""
    directory, _ = store(tmp_path)
    old = b"".join(json.dumps({"kind": "event", "event": "old", "number": n}).encode() + b"\n" for n in range(3))
    directory.write(METRICS, old)
    monkeypatch.setattr(tail, "BLOCK", 100)
    follower = LineFollower(MetricsReader(directory), is_event)
    seen = follower.poll()
    log = MetricsLog(directory)
    for version in range(1, 9):
        add(log, version)
        seen += follower.poll()
    data = b"".join(directory.read(name) for name in (METRICS, *sorted(set(list_files(directory)) - {METRICS})))
    assert directory.read(METRICS) == old
    assert MetricsReader(directory).read() == data
    assert MetricsReader(directory).size() == len(data)
    assert list(read_lines(MetricsReader(directory))) == data.splitlines()
    assert list(read_lines_back(MetricsReader(directory), 10**6)) == data.splitlines()[::-1]
    assert seen == [line for line in data.splitlines() if is_event(line)]


def test_a_resumed_run_removes_what_it_repeats_from_all_segments(tmp_path: Path) -> None:
    """Events stay where they are; rows of later versions go, also from the file of the older layout."""
    directory, _ = store(tmp_path)
    local = RunDirectory.open(str(tmp_path / "storage"), "run")
    add(MetricsLog(local), *range(1, 6))
    add(MetricsLog(directory), *range(6, 21))
    log = MetricsLog(directory)
    log.rewind(4)
    log.close()
    assert summary(directory) == [*both(1, 2, 3, 4), *(("event", n) for n in range(5, 21))]
    add(log, 5, 6)
    assert summary(directory)[-4:] == both(5, 6)


def test_a_run_copied_to_a_disk_is_continued_there(tmp_path: Path) -> None:
    """Its last segment is appended to, so that the order stays."""
    directory, _ = store(tmp_path / "from")
    add(MetricsLog(directory), *range(1, 8))
    shutil.copytree(directory.path, tmp_path / "to" / "r")
    copy = RunDirectory.open(str(tmp_path / "to"), "r")
    before = set(list_files(copy))
    log = MetricsLog(copy)
    log.rewind(6)
    add(log, 7, 8)
    assert summary(copy) == [*both(1, 2, 3, 4, 5, 6), ("event", 7), *both(7, 8)]
    assert set(list_files(copy)) == before


def test_a_long_run_is_not_read_whole_when_it_is_resumed(tmp_path: Path) -> None:
    """The search for rows to remove ends at a segment with merges that all stay."""
    directory, script = store(tmp_path)
    for number in range(1, 51):
        row = {"kind": "merge", "version": number}
        directory.write(segment_name(number), json.dumps(row).encode() + b"\n")
    script.write(fail("slow", "read", seconds=0.0))
    log = MetricsLog(directory)
    log.rewind(48)
    log.close()
    assert script.count_met() == 3
    assert [row["version"] for row in read_rows(directory)] == list(range(1, 49))


@hypothesis_settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from(["add", "rewind", "crash"]), min_size=1, max_size=12),
    st.lists(st.integers(1, 30), max_size=8),
    st.sampled_from(["fail", "tear", "swallow"]),
    st.sampled_from(["write", "read", "look", "move", "*"]),
)
def test_rows_are_neither_lost_nor_doubled(
    tmp_path_factory: pytest.TempPathFactory, actions: list[str], nth: list[int], kind: str, op: str
) -> None:
    """Whatever fails, and wherever a driver dies: the next one writes what is missing, and each row is there once.

    A crash loses the rows that weren't written, and the run goes back to a version, as with a checkpoint.
    """
    directory, script = store(tmp_path_factory.mktemp("rows"))
    script.write(fail(kind, op, nth=nth))
    log, kept, events, version, number = MetricsLog(directory), list[int](), list[int](), 0, 0
    for action in actions:
        if action == "add":
            version, number = version + 1, number + 1
            log.record_evaluation(Evaluation(version, version, {}))
            log.record_event("seen", number=number)
            kept, events = [*kept, version], [*events, number]
            log.close()
            continue
        if action == "crash":
            while log.problem:  # otherwise what the driver had not written would be lost, rightly
                log.close()
            log = MetricsLog(directory)
        version = max(0, version - 2)
        kept = kept[:version]
        log.rewind(version)
    for _ in range(60):
        log.close()
    script.write()
    rows: list[dict[str, Any]] = read_rows(directory)
    assert [row["version"] for row in rows if row["kind"] == "evaluation"] == kept
    assert [row["number"] for row in rows if row["kind"] == "event"] == events


def test_a_crash_in_the_middle_of_going_back_leaves_rows_that_the_next_resume_removes(tmp_path: Path) -> None:
    """Segments are rewritten one after another, from the last one."""
    directory, script = store(tmp_path)
    add(MetricsLog(directory), *range(1, 13))
    script.write(fail("fail", "write", nth=list(range(2, 50))))
    MetricsLog(directory).rewind(2)
    script.write()
    assert len(summary(directory)) > 14
    log = MetricsLog(directory)
    log.rewind(2)
    add(log, 3)
    assert [version for kind, version in summary(directory) if kind == "evaluation"] == [1, 2, 3]
    assert [number for kind, number in summary(directory) if kind == "event"] == [*range(1, 13), 3]

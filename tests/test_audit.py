"""The audit: a run's rows are judged clean, and each forgery is found."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lte_ray.audit import audit, read_rows
from lte_ray.cli.main import main
from lte_ray.data.lanes import Lanes, advance, initial, joined, split

SIZE = 8
"""Samples of a batch."""


class Run:
    """Writes the rows of a run whose heads train a batch a step and are merged one by one."""

    def __init__(self, heads: int) -> None:
        self.lanes: dict[int, Lanes] = {head: initial(head, heads) for head in range(heads)}
        self.held = {head: {"incarnation": 0, "sequence": 0, "step": 0, "samples": 0, "batches": 0} for head in range(heads)}
        self.known = set(self.lanes)
        self.rows: list[dict[str, Any]] = []
        self.version = 0

    def trains(self, head: int, batches: int, gives_to: int | None = None) -> None:
        """The head takes batches and contributes them; before that it may give half of its lanes away."""
        self.lanes[head], held = advance(self.lanes[head], batches), self.held[head]
        if gives_to is not None:
            self.lanes[head], self.lanes[gives_to] = split(self.lanes[head])
        held["sequence"] += 1
        for name, more in (("step", batches), ("batches", batches), ("samples", SIZE * batches)):
            held[name] += more
        self.version += 1
        row = {"kind": "merge", "at": float(self.version), "version": self.version, "heads": [head]}
        stand = {**held, "version": self.version, "lanes": [list(lane) for lane in self.lanes[head]]}
        self.rows.append({**row, "samples": SIZE * batches, "head_steps": {str(head): batches}, "held": {str(head): stand}})

    def dies(self, head: int, unmerged: int) -> None:
        """Its process is lost after so many steps that were in no contribution; the next goes on from what was merged."""
        step = self.held[head]["step"] + unmerged
        self.rows.append({"kind": "event", "at": float(self.version), "event": "head_lost", "heads": [head], "step": step})
        self.held[head]["incarnation"] += 1

    def joins(self, head: int, giver: int, before: int) -> None:
        """A new head gets half of another's lanes, which that splits after `before` more batches."""
        self.trains(giver, before, gives_to=head)
        self.known.add(head)
        self.held[head] = {"incarnation": 0, "sequence": 0, "step": 0, "samples": 0, "batches": 0}

    def leaves(self, head: int, to: int) -> None:
        """The head is dropped; another one gets its lanes."""
        self.lanes[to] = joined((*self.lanes[to], *self.lanes.pop(head)))
        self.rows.append({"kind": "event", "at": float(self.version), "event": "head_dropped", "heads": [head]})
        del self.held[head]


def usual() -> Run:
    """Three heads; one is restarted."""
    run = Run(3)
    for head, batches in ((0, 5), (1, 4), (2, 5), (0, 3), (1, 5)):
        run.trains(head, batches)
    run.dies(1, unmerged=2)
    for head, batches in ((0, 5), (2, 5), (1, 5), (1, 4)):
        run.trains(head, batches)
    return run


def test_a_run_whose_head_was_restarted_is_clean() -> None:
    """Nothing lost, nothing doubled; what the dead head had trained beyond its contributions is told."""
    found = audit(usual().rows)
    assert found.clean, found.problems
    assert (found.merges, found.contributions, found.batches, found.samples) == (9, 9, 41, 41 * SIZE)
    assert found.reissued == 2


@given(st.lists(st.tuples(st.sampled_from("ttttdjl"), st.integers(0, 7), st.integers(1, 6)), max_size=40))
def test_runs_whose_heads_come_and_go_are_clean(happens: list[tuple[str, int, int]]) -> None:
    """Lanes that are split and handed over neither repeat a batch nor leave one out."""
    run = Run(2)
    for what, who, batches in happens:
        heads = sorted(run.lanes)
        head = heads[who % len(heads)]
        if what == "t":
            run.trains(head, batches)
        elif what == "d":
            run.dies(head, batches)
        elif what == "j" and len(heads) < 6:
            run.joins(max(run.known) + 1, head, batches)
        elif what == "l" and len(heads) > 1:
            run.leaves(head, heads[who % len(heads) - 1])
    for head in run.lanes:
        run.trains(head, 1)
    found = audit(run.rows)
    assert found.clean, found.problems


def test_versions_without_rows_are_judged_by_those_after_them() -> None:
    """Rows that died with the driver are counted; what they held is in the next row's sums."""
    rows = usual().rows
    del rows[3], rows[0]
    found = audit(rows)
    assert found.clean, found.problems
    assert (found.unlogged, found.merges, found.batches) == (2, 7, 41)


def forged(change: Any) -> list[dict[str, Any]]:
    rows = copy.deepcopy(usual().rows)
    change(rows, [row for row in rows if row["kind"] == "merge"])
    return rows


def held(row: dict[str, Any]) -> dict[str, Any]:
    return next(iter(row["held"].values()))


def skip(rows: Any, merges: Any) -> None:
    """The restarted head goes on two batches too far."""
    for row in (merges[7], merges[8]):
        held(row)["lanes"] = [list(lane) for lane in advance(held(row)["lanes"], 2)]


def again(rows: Any, merges: Any) -> None:
    """The restarted head takes two batches that were merged before."""
    for row in (merges[7], merges[8]):
        held(row)["lanes"] = [[first - 6, stride] for first, stride in held(row)["lanes"]]


def back(rows: Any, merges: Any) -> None:
    """A head's last merge leaves it before where it was."""
    held(merges[8])["lanes"] = held(merges[4])["lanes"]


def twice(rows: Any, merges: Any) -> None:
    """One contribution is in two versions."""
    merged = copy.deepcopy(merges[8])
    merged["version"] = 10
    held(merged)["samples"] += 4 * SIZE
    rows.append(merged)


def same_version(rows: Any, merges: Any) -> None:
    """A version is made twice."""
    merges[6]["version"] = 6


def unpaid(rows: Any, merges: Any) -> None:
    """A merge holds fewer steps than the batches by which its head moved."""
    merges[4]["head_steps"]["1"] -= 2


def taken_over(rows: Any, merges: Any) -> None:
    """Head 2 goes on with head 1's lane, and head 1 too."""
    held(merges[6])["lanes"] = [[25, 3]]


@pytest.mark.parametrize(
    ("forge", "lost", "doubled", "says"),
    [
        (skip, 2, 0, "2 batches more than were trained"),
        (again, 0, 2, "2 batches fewer than were trained"),
        (back, 0, 9, "takes head 1 back"),
        (twice, 0, 4, "contribution 4 (incarnation 1) of head 1"),
        (same_version, 0, 0, "version 6 comes after version 6"),
        (unpaid, 2, 0, "up to version 5, the merge of head 1, by 2 batches more"),
        (taken_over, None, None, "heads 1 and 2 own the same batches"),
    ],
)
def test_forged_rows_are_found(forge: Any, lost: int | None, doubled: int | None, says: str) -> None:
    """Each forgery is told in words, and counted in batches where that is what is wrong."""
    found = audit(forged(forge))
    assert not found.clean
    assert any(says in problem for problem in found.problems), found.problems
    if lost is not None:
        assert (found.lost, found.doubled) == (lost, doubled), found.problems


def test_rows_that_say_too_little_are_a_problem() -> None:
    """Rows of an older release have no `held`; an empty run has nothing wrong."""
    rows = usual().rows
    del rows[2]["held"]
    assert "version 3 lacks what an audit needs" in audit(rows).problems[0]
    assert audit([]).clean


def test_a_batch_lost_in_a_handover_shows_in_the_sums() -> None:
    """The new owner of a lane starts one batch too far."""
    run = Run(2)
    for head in (0, 1, 0):
        run.trains(head, 5)
    run.joins(2, 0, 3)
    run.lanes[2] = advance(run.lanes[2], 1)
    for head in (2, 0, 1, 2):
        run.trains(head, 4)
    found = audit(run.rows)
    assert (found.lost, found.doubled) == (1, 0), found.problems


@given(st.integers(0, 2**32))
def test_a_dropped_row_is_never_called_lost_and_a_repeated_one_never_clean(seed: int) -> None:
    """Whatever row it is, unless it is a head's last."""
    draw, rows = random.Random(seed), [row for row in usual().rows if row["kind"] == "merge"]
    number = draw.randrange(len(rows))
    dropped = audit(rows[:number] + rows[number + 1 :])
    assert dropped.clean, dropped.problems
    assert not audit([*rows[: number + 1], *rows[number:]]).clean


def test_a_torn_last_row_is_left_out_and_another_is_an_error() -> None:
    """A driver that dies may leave half a row; anything else that can't be read is damage."""
    assert read_rows('{"kind": "event"}\n{"kind": "mer') == [{"kind": "event"}]
    with pytest.raises(ValueError, match="row 1 can't be read"):
        read_rows('{"kind": "mer\n{"kind": "event"}\n')
    with pytest.raises(ValueError, match="row 1 can't be read: it is a list"):
        read_rows("[1]\n{}\n")


def test_the_command_says_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0 for a clean run, 1 for one that isn't, 2 where there is no run."""
    (tmp_path / "run.toml").write_text("")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in usual().rows))
    assert main(["audit", str(tmp_path)]) == 0
    assert "9 contributions in 9 merges" in capsys.readouterr().out
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in forged(skip)))
    assert main(["audit", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "2 batches lost" in said.out
    assert "doesn't hold each contribution exactly once" in said.err
    (tmp_path / "metrics.jsonl").write_text("{\n{}\n")
    assert main(["audit", str(tmp_path)]) == 2
    assert "row 1 can't be read" in capsys.readouterr().err
    assert main(["audit", str(tmp_path / "absent")]) == 2

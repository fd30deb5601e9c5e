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
from lte_ray.data.partition import Partitions, advance, coalesce, initial_partitions, split

SIZE = 8
"""Samples of a batch."""


class Run:
    """Writes the rows of a run whose heads train a batch a step and are merged one by one."""

    def __init__(self, heads: int) -> None:
        self.lanes: dict[int, Partitions] = {head: initial_partitions(head, heads) for head in range(heads)}
        self.held = {head: new_head() for head in range(heads)}
        self.merged = {head: (self.lanes[head], new_head()) for head in range(heads)}
        self.saved = {0: {head: new_head() for head in range(heads)}}
        self.rows: list[dict[str, Any]] = []
        self.version = 0
        self.unheard: list[dict[str, Any]] = []
        self.versions: dict[int, int] = {}  # by head, of its last merge

    def trains(self, head: int, batches: int, gives_to: int | None = None) -> None:
        """The head takes batches and contributes them; before that it may give half of its lanes away."""
        self.takes(head, batches)
        held = self.held[head]
        if gives_to is not None:
            self.lanes[head], self.lanes[gives_to] = split(self.lanes[head])
        held["samples"] += SIZE * batches
        self.version += 1
        self.merged[head], self.versions[head] = (self.lanes[head], dict(held)), self.version
        self.saved[self.version] = {number: dict(merged) for number, (_, merged) in self.merged.items()}
        row = {"kind": "merge", "at": float(self.version), "version": self.version, "heads": [head]}
        stand = {**held, "version": self.version, "lanes": [list(lane) for lane in self.lanes[head]]}
        self.rows.append({**row, "samples": SIZE * batches, "head_steps": {str(head): batches}, "held": {str(head): stand}})

    def takes(self, head: int, batches: int) -> None:
        """The head trains, and makes a contribution."""
        self.lanes[head] = advance(self.lanes[head], batches)
        self.held[head]["sequence"] += 1
        for name in ("step", "batches"):
            self.held[head][name] += batches

    def is_refused(self, head: int, batches: int) -> None:
        """The head's contribution is poison: it goes on behind it."""
        self.takes(head, batches)
        self.tells("refused", head=head, sequence=self.held[head]["sequence"], why="", poison=True)

    def tells(self, event: str, **values: Any) -> None:
        """An event's row."""
        self.rows.append({"kind": "event", "at": float(self.version), "event": event, **values})

    def loses_its_coordinator(self, unheard: int) -> None:
        """The rows of the last merges die with it: the driver hadn't heard of them. The next says what its version holds."""
        for _ in range(unheard):
            if self.rows and self.rows[-1]["kind"] == "merge":
                self.unheard += [self.rows.pop()]
        held = {
            str(head): {**self.merged[head][1], "version": self.versions[head], "lanes": self.merged[head][0]}
            for head in self.held
            if self.merged[head][1]["sequence"]
        }
        self.tells("coordinator_restarts", epoch=1, version=self.version, reports=len(self.held), held=held)

    def dies(self, head: int, unmerged: int) -> None:
        """Its process is lost after so many steps that were in no contribution; the next goes on from what was merged."""
        self.tells("head_lost", heads=[head], step=self.held[head]["step"] + unmerged)
        incarnation = self.held[head]["incarnation"] + 1
        self.lanes[head], self.held[head] = self.merged[head][0], {**self.merged[head][1], "incarnation": incarnation}

    def joins(self, head: int, giver: int, before: int) -> None:
        """A new head gets half of another's lanes, which that splits after `before` more batches."""
        self.held[head] = new_head()
        self.merged[head] = ((), new_head())
        self.trains(giver, before, gives_to=head)
        self.merged[head] = (self.lanes[head], new_head())

    def leaves(self, head: int, to: int) -> None:
        """The head is dropped; another one gets its lanes, from where they were merged."""
        given = self.merged[head][0]
        self.lanes[to] = coalesce((*self.lanes[to], *given))
        self.merged[to] = (coalesce((*self.merged[to][0], *given)), self.merged[to][1])
        self.tells("head_dropped", heads=[head])
        del self.lanes[head], self.held[head]

    def goes_back(self, version: int) -> int:
        """All heads start again from a version's weights, with the data that come next; how many batches that skips."""
        before, self.version = self.saved[version], version
        skipped = sum(held["batches"] - before.get(head, new_head())["batches"] for head, (_, held) in self.merged.items())
        self.rows = [row for row in self.rows if row["kind"] == "event" or row["version"] <= version]
        self.unheard = [row for row in self.unheard if row["version"] <= version]
        self.tells("rolled_back", why="", version=version, skipped_batches=skipped)
        for head in self.held:
            lanes, held = self.merged[head]
            incarnation = self.held[head]["incarnation"] + 1
            self.held[head] = {**before[head], "batches": held["batches"], "incarnation": incarnation}
            self.lanes[head], self.merged[head] = lanes, (lanes, dict(self.held[head]))
        return skipped


def new_head() -> dict[str, int]:
    """What a head has done that has only just come."""
    return {"incarnation": 0, "sequence": 0, "step": 0, "samples": 0, "batches": 0}


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


def test_rows_that_died_with_the_coordinator_lose_nothing_though_their_heads_are_dropped() -> None:
    """Head 0 is dropped, and so never says again where its last merges had left it: the next coordinator did."""
    run = usual()
    run.trains(0, 5)
    run.trains(0, 4)
    run.loses_its_coordinator(2)
    run.leaves(0, to=1)
    for head, batches in ((1, 9), (2, 5), (1, 6), (2, 6)):
        run.trains(head, batches)
    found = audit(run.rows)
    assert found.clean, found.problems
    assert (found.unlogged, found.contributions, found.batches) == (2, 13, 41 + 9 + 26)
    silent = [row | {"held": {}} if row.get("event") == "coordinator_restarts" else row for row in run.rows]
    assert not audit(silent).clean


@given(st.lists(st.tuples(st.sampled_from("ttttdjlprbu"), st.integers(0, 7), st.integers(1, 6)), max_size=40))
def test_runs_whose_heads_come_and_go_are_clean(happens: list[tuple[str, int, int]]) -> None:
    """Lanes that are split and handed over neither repeat a batch nor leave one out; nor do poison and loss spikes, unsaid."""
    run, known = Run(2), {0, 1}
    for what, who, batches in happens:
        heads = sorted(run.held)
        head = heads[who % len(heads)]
        if what == "t":
            run.trains(head, batches)
        elif what == "d":
            run.dies(head, batches)
        elif what == "j" and len(heads) < 6:
            run.joins(max(known) + 1, head, batches)
            known.add(max(known) + 1)
        elif what == "l" and len(heads) > 1:
            run.leaves(head, heads[who % len(heads) - 1])
        elif what == "p":
            run.is_refused(head, batches)
        elif what == "u":
            run.loses_its_coordinator(batches % 3)
        elif what == "b" and run.held.keys() <= run.saved[max(0, run.version - batches)].keys():
            run.goes_back(max(0, run.version - batches))
    for head in run.held:
        run.trains(head, 1)
    found = audit(run.rows)
    assert found.clean, found.problems
    assert found.batches == sum(row["samples"] for row in [*run.rows, *run.unheard] if row["kind"] == "merge") // SIZE


def test_batches_of_refused_contributions_are_dropped_and_not_lost() -> None:
    """Those that the head went on behind; what died with it, or with its place, is trained again."""
    run = usual()
    for batches in (3, 2):
        run.is_refused(1, batches)
    run.trains(1, 4)
    run.is_refused(1, 3)
    run.dies(1, 0)
    run.trains(1, 4)
    found = audit(run.rows)
    assert found.clean, found.problems
    assert (found.dropped, found.skipped, found.batches) == (5, 0, 49)


def unsaid(rows: list[dict[str, Any]], event: dict[str, Any]) -> None:
    rows.remove(event)


def of_another(rows: list[dict[str, Any]], event: dict[str, Any]) -> None:
    event["head"] = 0


def before_the_last_merge(rows: list[dict[str, Any]], event: dict[str, Any]) -> None:
    event["sequence"] -= 1


def harmless(rows: list[dict[str, Any]], event: dict[str, Any]) -> None:
    event["poison"] = False


def too_far(rows: list[dict[str, Any]], event: dict[str, Any]) -> None:
    """The head went on eight batches further than its steps say."""
    rows[-1]["held"]["1"]["batches"] += 8
    rows[-1]["held"]["1"]["lanes"] = [[first + 24, stride] for first, stride in rows[-1]["held"]["1"]["lanes"]]


@pytest.mark.parametrize(
    ("forge", "lost", "dropped"),
    [(unsaid, 3, 0), (of_another, 3, 0), (before_the_last_merge, 3, 0), (harmless, 3, 0), (too_far, 8, 3)],
)
def test_what_no_refusal_accounts_for_is_lost(forge: Any, lost: int, dropped: int) -> None:
    """Only this head's, since its last merge, and only as many as it has trained."""
    run = usual()
    run.is_refused(1, 3)
    run.trains(1, 4)
    forge(run.rows, run.rows[-2])
    found = audit(run.rows)
    assert (found.lost, found.dropped, found.doubled) == (lost, dropped, 0), found.problems
    assert not found.clean


def went_back() -> Run:
    """Two heads; versions 3 to 6 are undone, which skips 14 batches, and of these versions 5 and 6 a second time."""
    run = Run(2)
    for head, batches in ((0, 5), (1, 4), (0, 3), (1, 5), (0, 4), (1, 2)):
        run.trains(head, batches)
    assert run.goes_back(2) == 14
    for head, batches in ((0, 5), (1, 4)):
        run.trains(head, batches)
    return run


def test_batches_that_were_skipped_after_a_spike_are_not_lost() -> None:
    """What was merged after the version that the run went back to; also if it goes back again, further or not as far."""
    run = went_back()
    found = audit(run.rows)
    assert found.clean, found.problems
    assert (found.skipped, found.dropped, found.batches) == (14, 0, 18)
    assert run.goes_back(3) == 4
    run.is_refused(1, 3)
    for head, batches in ((0, 5), (1, 4)):
        run.trains(head, batches)
    found = audit(run.rows)
    assert found.clean, found.problems
    assert (found.skipped, found.dropped, found.batches) == (18, 3, 23)
    assert run.goes_back(1) == 14 + 4 + 4 + 3 + 5 + 4 + 5
    for head, batches in ((0, 5), (1, 4)):
        run.trains(head, batches)
    found = audit(run.rows)
    assert found.clean, found.problems
    assert (found.skipped, found.dropped, found.batches) == (39, 0, 14)


def test_the_lanes_of_a_head_that_left_after_the_run_went_back_are_followed() -> None:
    """Its skipped batches show where another head goes on with its lanes."""
    run = went_back()
    assert run.goes_back(2) == 14 + 9
    run.leaves(1, to=0)
    run.trains(0, 5)
    found = audit(run.rows)
    assert found.clean, found.problems
    assert (found.skipped, found.batches) == (23, 14)


def test_more_than_the_run_says_it_skipped_is_lost() -> None:
    """Whether the event says too little, or a head goes on too far; and what it says too much excuses nothing later."""
    for said, lost, skipped in ((12, 2, 12), (0, 14, 0), (14, 0, 14), (99, 0, 14)):
        run = went_back()
        event = next(row for row in run.rows if row.get("event") == "rolled_back")
        event["skipped_batches"] = said
        assert (audit(run.rows).lost, audit(run.rows).skipped) == (lost, skipped)
        run.lanes[0] = advance(run.lanes[0], 2)
        run.trains(0, 1)
        assert (audit(run.rows).lost, audit(run.rows).skipped) == (lost + 2, skipped)


def test_an_event_that_says_too_little_is_a_problem() -> None:
    """It may bear on what is lost."""
    for row in (
        {"event": "refused", "poison": True, "head": 1},
        {"event": "rolled_back", "version": 3},
        {"event": "head_dropped"},
    ):
        assert f"the row of the event {row['event']} lacks what an audit needs" in audit([{"kind": "event", **row}]).problems[0]


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


def test_a_row_that_is_no_utf8_is_damage_like_any_other_and_left_out_where_it_is_the_last() -> None:
    """The error names the row; a last one may be torn in the middle of a character."""
    good = b'{"kind": "event"}\n'
    assert read_rows(good + '{"kind": "é'.encode()[:-1]) == [{"kind": "event"}]
    with pytest.raises(ValueError, match="row 2 can't be read: 'utf-8' codec can't decode byte 0xff in position 0"):
        read_rows(good + b"\xff\xfe garbage\n" + good)
    with pytest.raises(ValueError, match="row 1 can't be read: "):
        read_rows(b"[" * 100_000 + b"\n" + good)


def test_the_command_says_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0 for a clean run, 1 for one that isn't, 2 where there is no run."""
    (tmp_path / "run.toml").write_text("")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in usual().rows))
    assert main(["audit", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "9 contributions in 9 merges" in said
    assert "dropped" not in said
    run = went_back()
    run.is_refused(1, 3)
    run.trains(1, 4)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in run.rows))
    assert main(["audit", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "0 batches lost" in said
    assert "\n3 batches dropped with refused contributions, 14 skipped when the run went back.\n" in said
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in forged(skip)))
    assert main(["audit", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "2 batches lost" in out
    assert "doesn't hold each contribution exactly once" in err
    (tmp_path / "metrics.jsonl").write_text("{\n{}\n")
    assert main(["audit", str(tmp_path)]) == 2
    assert "row 1 can't be read" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_bytes("".join(json.dumps(row) + "\n" for row in usual().rows).encode() + b"\xff\xfe\n")
    assert main(["audit", str(tmp_path)]) == 0  # the last row may be torn
    assert "9 contributions in 9 merges" in capsys.readouterr().out
    assert main(["audit", str(tmp_path / "absent")]) == 2

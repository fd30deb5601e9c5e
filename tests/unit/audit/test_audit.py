"""The audit: a correct run is clean, and each forgery is found."""

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
    """Makes the rows of a run whose heads train one batch per step and are merged one by one."""

    def __init__(self, heads: int) -> None:
        self.lanes: dict[int, Partitions] = {head: initial_partitions(head, heads) for head in range(heads)}
        self.held = {head: new_head() for head in range(heads)}
        self.merged = {head: (self.lanes[head], new_head()) for head in range(heads)}
        self.saved = {0: {head: new_head() for head in range(heads)}}
        self.rows: list[dict[str, Any]] = []
        self.version = 0
        self.unlogged: list[dict[str, Any]] = []
        self.versions: dict[int, int] = {}  # by head, of its last merge

    def train(self, head: int, batches: int, gives_to: int | None = None) -> None:
        """The head trains batches and contributes them. Before, it may give half of its partitions to another head."""
        self.take_batches(head, batches)
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

    def take_batches(self, head: int, batches: int) -> None:
        """The head trains and makes a contribution."""
        self.lanes[head] = advance(self.lanes[head], batches)
        self.held[head]["sequence"] += 1
        for name in ("step", "batches"):
            self.held[head][name] += batches

    def refuse(self, head: int, batches: int) -> None:
        """The head's contribution is refused as harmful, and the head continues after it."""
        self.take_batches(head, batches)
        self.add_event("refused", head=head, sequence=self.held[head]["sequence"], why="", poison=True)

    def add_event(self, event: str, **values: Any) -> None:
        """Adds the row of an event."""
        self.rows.append({"kind": "event", "at": float(self.version), "event": event, **values})

    def lose_coordinator(self, unlogged: int) -> None:
        """The rows of the last merges are lost with the coordinator. The next one states what its version holds."""
        for _ in range(unlogged):
            if self.rows and self.rows[-1]["kind"] == "merge":
                self.unlogged += [self.rows.pop()]
        held = {
            str(head): {**self.merged[head][1], "version": self.versions[head], "lanes": self.merged[head][0]}
            for head in self.held
            if self.merged[head][1]["sequence"]
        }
        self.add_event("coordinator_restarts", epoch=1, version=self.version, reports=len(self.held), held=held)

    def kill(self, head: int, unmerged: int) -> None:
        """The head's process is lost after `unmerged` uncontributed steps. The next one continues from its last merge."""
        self.add_event("head_lost", heads=[head], step=self.held[head]["step"] + unmerged)
        incarnation = self.held[head]["incarnation"] + 1
        self.lanes[head], self.held[head] = self.merged[head][0], {**self.merged[head][1], "incarnation": incarnation}

    def join(self, head: int, giver: int, before: int) -> None:
        """A new head gets half of the partitions of another, which splits them after `before` more batches."""
        self.held[head] = new_head()
        self.merged[head] = ((), new_head())
        self.train(giver, before, gives_to=head)
        self.merged[head] = (self.lanes[head], new_head())

    def leave(self, head: int, to: int) -> None:
        """The head is dropped, and another one gets its partitions from where they were merged."""
        given = self.merged[head][0]
        self.lanes[to] = coalesce((*self.lanes[to], *given))
        self.merged[to] = (coalesce((*self.merged[to][0], *given)), self.merged[to][1])
        self.add_event("head_dropped", heads=[head])
        del self.lanes[head], self.held[head]

    def roll_back(self, version: int) -> int:
        """All heads start again from a version's weights with the next data. Returns how many batches that skips."""
        before, self.version = self.saved[version], version
        skipped = sum(held["batches"] - before.get(head, new_head())["batches"] for head, (_, held) in self.merged.items())
        self.rows = [row for row in self.rows if row["kind"] == "event" or row["version"] <= version]
        self.unlogged = [row for row in self.unlogged if row["version"] <= version]
        self.add_event("rolled_back", why="", version=version, skipped_batches=skipped)
        for head in self.held:
            lanes, held = self.merged[head]
            incarnation = self.held[head]["incarnation"] + 1
            self.held[head] = {**before[head], "batches": held["batches"], "incarnation": incarnation}
            self.lanes[head], self.merged[head] = lanes, (lanes, dict(self.held[head]))
        return skipped


def new_head() -> dict[str, int]:
    """The state of a new head."""
    return {"incarnation": 0, "sequence": 0, "step": 0, "samples": 0, "batches": 0}


def usual() -> Run:
    """A run with three heads, one of which is restarted."""
    run = Run(3)
    for head, batches in ((0, 5), (1, 4), (2, 5), (0, 3), (1, 5)):
        run.train(head, batches)
    run.kill(1, unmerged=2)
    for head, batches in ((0, 5), (2, 5), (1, 5), (1, 4)):
        run.train(head, batches)
    return run


def test_a_run_whose_head_was_restarted_is_clean() -> None:
    """Nothing is lost or doubled, and the steps of the dead process that weren't contributed are counted."""
    result = audit(usual().rows)
    assert result.clean, result.problems
    assert (result.merges, result.contributions, result.batches, result.samples) == (9, 9, 41, 41 * SIZE)
    assert result.reissued == 2


def test_rows_lost_with_the_coordinator_lose_no_batches_of_dropped_heads() -> None:
    """Head 0 is dropped, so no later row has the position after its last merges. The next coordinator states it."""
    run = usual()
    run.train(0, 5)
    run.train(0, 4)
    run.lose_coordinator(2)
    run.leave(0, to=1)
    for head, batches in ((1, 9), (2, 5), (1, 6), (2, 6)):
        run.train(head, batches)
    result = audit(run.rows)
    assert result.clean, result.problems
    assert (result.unlogged, result.contributions, result.batches) == (2, 13, 41 + 9 + 26)
    silent = [row | {"held": {}} if row.get("event") == "coordinator_restarts" else row for row in run.rows]
    assert not audit(silent).clean


@given(st.lists(st.tuples(st.sampled_from("ttttdjlprbu"), st.integers(0, 7), st.integers(1, 6)), max_size=40))
def test_runs_whose_heads_come_and_go_are_clean(happens: list[tuple[str, int, int]]) -> None:
    """Splitting and handing over partitions repeats or omits no batch, nor do harmful contributions and rollbacks."""
    run, known = Run(2), {0, 1}
    for what, who, batches in happens:
        heads = sorted(run.held)
        head = heads[who % len(heads)]
        if what == "t":
            run.train(head, batches)
        elif what == "d":
            run.kill(head, batches)
        elif what == "j" and len(heads) < 6:
            run.join(max(known) + 1, head, batches)
            known.add(max(known) + 1)
        elif what == "l" and len(heads) > 1:
            run.leave(head, heads[who % len(heads) - 1])
        elif what == "p":
            run.refuse(head, batches)
        elif what == "u":
            run.lose_coordinator(batches % 3)
        elif what == "b" and run.held.keys() <= run.saved[max(0, run.version - batches)].keys():
            run.roll_back(max(0, run.version - batches))
    for head in run.held:
        run.train(head, 1)
    result = audit(run.rows)
    assert result.clean, result.problems
    assert result.batches == sum(row["samples"] for row in [*run.rows, *run.unlogged] if row["kind"] == "merge") // SIZE


def test_batches_of_refused_contributions_are_dropped_and_not_lost() -> None:
    """Those after which the head continued; batches that were lost with a process are trained again."""
    run = usual()
    for batches in (3, 2):
        run.refuse(1, batches)
    run.train(1, 4)
    run.refuse(1, 3)
    run.kill(1, 0)
    run.train(1, 4)
    result = audit(run.rows)
    assert result.clean, result.problems
    assert (result.dropped, result.skipped, result.batches) == (5, 0, 49)


def unsaid(rows: list[dict[str, Any]], event: dict[str, Any]) -> None:
    rows.remove(event)


def of_another(rows: list[dict[str, Any]], event: dict[str, Any]) -> None:
    event["head"] = 0


def before_the_last_merge(rows: list[dict[str, Any]], event: dict[str, Any]) -> None:
    event["sequence"] -= 1


def harmless(rows: list[dict[str, Any]], event: dict[str, Any]) -> None:
    event["poison"] = False


def too_far(rows: list[dict[str, Any]], event: dict[str, Any]) -> None:
    """The head continued eight batches further than its steps say."""
    rows[-1]["held"]["1"]["batches"] += 8
    rows[-1]["held"]["1"]["lanes"] = [[first + 24, stride] for first, stride in rows[-1]["held"]["1"]["lanes"]]


@pytest.mark.parametrize(
    ("forge", "lost", "dropped"),
    [(unsaid, 3, 0), (of_another, 3, 0), (before_the_last_merge, 3, 0), (harmless, 3, 0), (too_far, 8, 3)],
)
def test_batches_without_a_refusal_are_lost(forge: Any, lost: int, dropped: int) -> None:
    """A refusal accounts only for this head, since its last merge, and for as many batches as it has trained."""
    run = usual()
    run.refuse(1, 3)
    run.train(1, 4)
    forge(run.rows, run.rows[-2])
    result = audit(run.rows)
    assert (result.lost, result.dropped, result.doubled) == (lost, dropped, 0), result.problems
    assert not result.clean


def went_back() -> Run:
    """A run with two heads. Versions 3 to 6 are undone, which skips 14 batches, and new versions 5 and 6 a second time."""
    run = Run(2)
    for head, batches in ((0, 5), (1, 4), (0, 3), (1, 5), (0, 4), (1, 2)):
        run.train(head, batches)
    assert run.roll_back(2) == 14
    for head, batches in ((0, 5), (1, 4)):
        run.train(head, batches)
    return run


def test_batches_that_a_rollback_skips_are_not_lost() -> None:
    """Those merged after the rollback version; also with a second rollback, to an earlier or a later version."""
    run = went_back()
    result = audit(run.rows)
    assert result.clean, result.problems
    assert (result.skipped, result.dropped, result.batches) == (14, 0, 18)
    assert run.roll_back(3) == 4
    run.refuse(1, 3)
    for head, batches in ((0, 5), (1, 4)):
        run.train(head, batches)
    result = audit(run.rows)
    assert result.clean, result.problems
    assert (result.skipped, result.dropped, result.batches) == (18, 3, 23)
    assert run.roll_back(1) == 14 + 4 + 4 + 3 + 5 + 4 + 5
    for head, batches in ((0, 5), (1, 4)):
        run.train(head, batches)
    result = audit(run.rows)
    assert result.clean, result.problems
    assert (result.skipped, result.dropped, result.batches) == (39, 0, 14)


def test_partitions_of_a_head_that_left_after_a_rollback_are_tracked() -> None:
    """Its skipped batches show when another head continues with its partitions."""
    run = went_back()
    assert run.roll_back(2) == 14 + 9
    run.leave(1, to=0)
    run.train(0, 5)
    result = audit(run.rows)
    assert result.clean, result.problems
    assert (result.skipped, result.batches) == (23, 14)


def test_more_batches_than_announced_are_lost() -> None:
    """If the event says too little, or a head continues too far. If it says too much, that excuses nothing later."""
    for said, lost, skipped in ((12, 2, 12), (0, 14, 0), (14, 0, 14), (99, 0, 14)):
        run = went_back()
        event = next(row for row in run.rows if row.get("event") == "rolled_back")
        event["skipped_batches"] = said
        assert (audit(run.rows).lost, audit(run.rows).skipped) == (lost, skipped)
        run.lanes[0] = advance(run.lanes[0], 2)
        run.train(0, 1)
        assert (audit(run.rows).lost, audit(run.rows).skipped) == (lost + 2, skipped)


def test_an_event_that_says_too_little_is_a_problem() -> None:
    """It may matter for what is lost."""
    for row in (
        {"event": "refused", "poison": True, "head": 1},
        {"event": "rolled_back", "version": 3},
        {"event": "head_dropped"},
    ):
        assert f"the row of the event {row['event']} lacks what an audit needs" in audit([{"kind": "event", **row}]).problems[0]


def test_versions_without_rows_are_checked_by_later_rows() -> None:
    """Rows that were lost with the driver are counted; the next row's sums contain what they held."""
    rows = usual().rows
    del rows[3], rows[0]
    result = audit(rows)
    assert result.clean, result.problems
    assert (result.unlogged, result.merges, result.batches) == (2, 7, 41)


def forged(change: Any) -> list[dict[str, Any]]:
    rows = copy.deepcopy(usual().rows)
    change(rows, [row for row in rows if row["kind"] == "merge"])
    return rows


def held(row: dict[str, Any]) -> dict[str, Any]:
    return next(iter(row["held"].values()))


def skip(rows: Any, merges: Any) -> None:
    """The restarted head continues two batches too far."""
    for row in (merges[7], merges[8]):
        held(row)["lanes"] = [list(lane) for lane in advance(held(row)["lanes"], 2)]


def again(rows: Any, merges: Any) -> None:
    """The restarted head trains two batches that were merged before."""
    for row in (merges[7], merges[8]):
        held(row)["lanes"] = [[first - 6, stride] for first, stride in held(row)["lanes"]]


def back(rows: Any, merges: Any) -> None:
    """A head's last merge leaves it before its earlier position."""
    held(merges[8])["lanes"] = held(merges[4])["lanes"]


def twice(rows: Any, merges: Any) -> None:
    """One contribution is in two versions."""
    merged = copy.deepcopy(merges[8])
    merged["version"] = 10
    held(merged)["samples"] += 4 * SIZE
    rows.append(merged)


def same_version(rows: Any, merges: Any) -> None:
    """A version appears twice."""
    merges[6]["version"] = 6


def unpaid(rows: Any, merges: Any) -> None:
    """A merge holds fewer steps than the batches by which its head advanced."""
    merges[4]["head_steps"]["1"] -= 2


def taken_over(rows: Any, merges: Any) -> None:
    """Heads 1 and 2 both continue with head 1's partition."""
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
    """Each forgery is described, and lost or doubled batches are counted."""
    result = audit(forged(forge))
    assert not result.clean
    assert any(says in problem for problem in result.problems), result.problems
    if lost is not None:
        assert (result.lost, result.doubled) == (lost, doubled), result.problems


def test_rows_that_say_too_little_are_a_problem() -> None:
    """Rows of an older release have no `held`. An empty run is clean."""
    rows = usual().rows
    del rows[2]["held"]
    assert "version 3 lacks what an audit needs" in audit(rows).problems[0]
    assert audit([]).clean


def test_a_batch_lost_in_a_handover_shows_in_the_sums() -> None:
    """The new owner of a partition starts one batch too far."""
    run = Run(2)
    for head in (0, 1, 0):
        run.train(head, 5)
    run.join(2, 0, 3)
    run.lanes[2] = advance(run.lanes[2], 1)
    for head in (2, 0, 1, 2):
        run.train(head, 4)
    result = audit(run.rows)
    assert (result.lost, result.doubled) == (1, 0), result.problems


@given(st.integers(0, 2**32))
def test_a_missing_row_is_never_a_loss_and_a_repeated_row_never_clean(seed: int) -> None:
    """For any row except a head's last."""
    draw, rows = random.Random(seed), [row for row in usual().rows if row["kind"] == "merge"]
    number = draw.randrange(len(rows))
    dropped = audit(rows[:number] + rows[number + 1 :])
    assert dropped.clean, dropped.problems
    assert not audit([*rows[: number + 1], *rows[number:]]).clean


def test_a_torn_last_row_is_left_out_and_another_is_an_error() -> None:
    """A driver that dies may leave a torn row. Any other row that can't be read is damage."""
    assert read_rows('{"kind": "event"}\n{"kind": "mer') == [{"kind": "event"}]
    with pytest.raises(ValueError, match="row 1 can't be read"):
        read_rows('{"kind": "mer\n{"kind": "event"}\n')
    with pytest.raises(ValueError, match="row 1 can't be read: it is a list"):
        read_rows("[1]\n{}\n")


def test_a_row_that_is_not_utf8_is_damage_unless_it_is_the_last() -> None:
    """The error names the row. The last row may be torn within a character."""
    good = b'{"kind": "event"}\n'
    assert read_rows(good + '{"kind": "é'.encode()[:-1]) == [{"kind": "event"}]
    with pytest.raises(ValueError, match="row 2 can't be read: 'utf-8' codec can't decode byte 0xff in position 0"):
        read_rows(good + b"\xff\xfe garbage\n" + good)
    with pytest.raises(ValueError, match="row 1 can't be read: "):
        read_rows(b"[" * 100_000 + b"\n" + good)


def test_the_command_prints_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0 for a clean run, 1 for another, 2 without a run."""
    (tmp_path / "run.toml").write_text("")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in usual().rows))
    assert main(["audit", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "9 contributions in 9 merges" in said
    assert "dropped" not in said
    run = went_back()
    run.refuse(1, 3)
    run.train(1, 4)
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

"""The names of figures in sinks, and the positions of rows."""

from __future__ import annotations

from typing import Any

from lte_ray.run.sinks.figures import MAX_HEADS, RowNaming, name_figures


def merge(version: int, step: int, **more: Any) -> dict[str, Any]:
    """A row of a merge of 100 samples."""
    return {"kind": "merge", "at": 5.0 + version, "version": version, "step": step, "samples": 100, "heads": [0], **more}


def evaluation(version: int, step: int, **values: float) -> dict[str, Any]:
    """A row of an evaluation."""
    return {"kind": "evaluation", "at": 9.0, "version": version, "step": step, "values": values}


def test_fields_have_the_names_that_tensorboard_and_wandb_group() -> None:
    """Losses by head, with their mean; tables by name; and numbers. What isn't finite or no number is left out."""
    row = merge(
        1, 10, train_loss={"0": 1.0, "2": 3.0, "3": None}, merge_seconds=0.5, bytes_up=7, bytes_instead={"ddp": 9},
        held={"0": {"step": 10}}, outer_step=None, wait=True, note="slow",
    )  # fmt: skip
    assert name_figures(row) == {
        "train/loss": 2.0,
        "train/loss/head_0": 1.0,
        "train/loss/head_2": 3.0,
        "merge/seconds": 0.5,
        "traffic/bytes_up": 7.0,
        "traffic/instead/ddp": 9.0,
    }
    assert name_figures(evaluation(1, 10, accuracy=0.5, nan=float("nan"))) == {"eval/accuracy": 0.5}


def test_new_fields_need_no_code() -> None:
    """Numbers, numbers by head, tables by name of either, and tables by head are figures of training; the run's come first."""
    row = merge(
        1, 10, rate=8,
        lr={"0": 0.1, "1": 0.3}, figures={"accuracy": {"0": 1.0}, "rate": {"0": 5.0}}, new={"0": {"top": 2}},
    )  # fmt: skip
    assert name_figures(row) == {
        "train/rate": 8.0,
        "train/lr": 0.2,
        "train/lr/head_0": 0.1,
        "train/lr/head_1": 0.3,
        "train/accuracy": 1.0,
        "train/accuracy/head_0": 1.0,
        "train/rate/head_0": 5.0,
        "train/new/top": 2.0,
        "train/new/top/head_0": 2.0,
    }


def test_many_heads_are_summed_up() -> None:
    """Their mean, lowest and highest."""
    losses = {str(head): float(head) for head in range(MAX_HEADS + 1)}
    assert name_figures(merge(1, 10, train_loss=losses)) == {
        "train/loss": MAX_HEADS / 2,
        "train/loss/min": 0.0,
        "train/loss/max": float(MAX_HEADS),
    }


def test_samples_are_summed_over_the_run() -> None:
    """From the rows of an earlier start on; an evaluation has those of its version, an event those of the last merge."""
    naming = RowNaming([merge(1, 10), evaluation(1, 10)])
    rows = [merge(2, 20), merge(3, 30), evaluation(2, 20, loss=1.0), {"kind": "event", "at": 1.0, "event": "still", "why": "x"}]
    named = [each for row in rows for each in naming.name(row)]
    assert [(each.kind, each.step, each.samples) for each in named] == [
        ("merge", 20, 200),
        ("merge", 30, 300),
        ("evaluation", 20, 200),
        ("event", 30, 300),
    ]
    assert named[2].figures == {"eval/loss": 1.0, "progress/samples": 200.0, "progress/version": 2.0}
    assert (named[3].text, dict(named[3].figures), named[3].raw) == ("still why=x", {}, rows[3])


def test_a_version_that_is_merged_again_rewinds() -> None:
    """Sinks are told from which step on rows don't count any more."""
    naming = RowNaming()
    rows = [merge(1, 10), merge(2, 20), merge(3, 30), merge(2, 21)]
    named = [each for row in rows for each in naming.name(row)]
    assert [(each.kind, each.version, each.step, each.samples) for each in named[3:]] == [
        ("rewind", 1, 10, 100),
        ("merge", 2, 21, 200),
    ]
    assert next(iter(naming.name(merge(1, 11)))).step == 0  # back to the beginning

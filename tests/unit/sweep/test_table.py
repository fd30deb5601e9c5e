"""The order of configurations, and what the table says of them."""

from __future__ import annotations

from lte_ray.ladder import Figure, Point
from lte_ray.sweep import TrialResult, rank
from lte_ray.sweep.table import explain, make_cells, make_markdown

LOSS = Figure("loss")


def result(number: int, loss: float, seed: int = 0, samples: int = 100, stopped: str = "", failed: str = "") -> TrialResult:
    points = () if failed else (Point(10, samples, {"loss": loss, "accuracy": 1 - loss}),)
    return TrialResult(
        f"{number}-{seed}", f"trial-{number:03d}", number, {"lora-r": str(2**number)}, seed, points, 61.0, 0, stopped, failed
    )


RESULTS = [
    result(0, 0.3),
    result(1, 0.2),
    result(1, 0.4, seed=1),
    result(2, 0.25),
    result(2, 0.25, seed=1),
    result(3, 0.1, samples=10, stopped="2 of 4 trainings were better"),
    result(4, 0.9, samples=30, stopped="2 of 3 trainings were better"),
    result(5, 0.0, failed="out of memory"),
]


def test_the_best_come_first() -> None:
    """By the mean of all seeds; then those of one seed; then what was stopped, the longest trained first; then what failed."""
    assert [each.first.number for each in rank(RESULTS, LOSS)] == [2, 1, 0, 4, 3, 5]
    assert [each.first.number for each in rank(RESULTS[:1] + RESULTS[3:4], Figure("accuracy", True))] == [2, 0]


def test_the_table_has_the_values_and_the_spread() -> None:
    """A column for each flag, mean and standard deviation over seeds, and what didn't end."""
    header, *rows = make_cells(rank(RESULTS, LOSS), LOSS)
    assert header == ["trial", "lora-r", "loss", "samples", "sent", "time", ""]
    assert rows[1] == ["001", "2", "0.3 ± 0.14", "100", "-", "2:02", "2 seeds"]
    assert rows[3] == ["004", "16", "0.9", "30", "-", "1:01", "stopped"]
    assert rows[5] == ["005", "32", "-", "-", "-", "1:01", "failed"]


def test_the_text_says_how_it_was_compared() -> None:
    """Seeds, those that were stopped, and the reason of each failure; Markdown has the command, too."""
    ranked = rank(RESULTS, LOSS)
    text = explain(ranked, LOSS, [0, 1])
    assert "All configurations were trained with seed 0, the best 2 with all seeds: 0, 1." in text[1]
    assert text[2].startswith("stopped: 2 ended early")
    assert text[3] == "trial-005 (lora-r=32) failed: out of memory"
    markdown = make_markdown(ranked, LOSS, "gpt", text, "lte-ray train gpt --lora-r 4")
    assert "| 002 | 4 | 0.25 ± 0 |" in markdown
    assert markdown.endswith("```sh\nlte-ray train gpt --lora-r 4\n```\n")

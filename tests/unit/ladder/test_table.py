"""The table and the picture of a ladder."""

from __future__ import annotations

import io
import math
import sys
import xml.etree.ElementTree as ET

import pytest
from rich.console import Console

from lte_ray.errors import ConfigError
from lte_ray.ladder import Summary
from lte_ray.ladder.picture import draw
from lte_ray.ladder.table import explain, make_cells, make_markdown, make_table, tuning
from tests.support.ladders import DOUBLE, HALF, ONE, make_rung, make_summaries

TITLE = "workers.gpt:GPT: 2 heads, 700 steps, 22,400 samples"


def summaries(seeds: int = 3) -> list[Summary]:
    return make_summaries(
        make_rung("ordinary", [2.0] * seeds),
        make_rung("mhlora", [1.9, 2.0, 2.1][:seeds], best=DOUBLE, sweep={HALF: 4.0, ONE: 3.0}),
        make_rung("merge_iter=1", [1.0] * seeds, sent=16_000),
        make_rung("merge_iter=10", [2.5] * seeds, sent=1600),
        make_rung("merge_iter=50", [math.nan] * seeds, sent=320),
    )


def test_cells_hold_the_figures_of_each_rung() -> None:
    """Mean with spread, ratio, samples and bytes relative to ordinary training; a mark for rates on the edge."""
    assert make_cells(summaries()) == [
        ["rung", "rate", "loss", "ratio", "samples", "sent", "time"],
        ["ordinary", "x1", "2 ± 0", "1.000", "1.00x", "4 kB", "1:05"],
        ["mhlora", "x2*", "2 ± 0.1", "1.000", "1.00x", "-", "1:05"],
        ["merge_iter=1", "x1", "1 ± 0", "0.500", "0.75x", "8 kB (2.0x)", "1:05"],
        ["merge_iter=10", "x1", "2.5 ± 0", "1.250", "> 1x", "800 B (1/5)", "1:05"],
        ["merge_iter=50", "x1", "diverged", "-", "> 1x", "160 B (1/25)", "1:05"],
    ]
    assert [row[2] for row in make_cells(summaries(seeds=1))[1:3]] == ["2", "1.9"]


def test_the_table_fits_80_columns() -> None:
    """With realistic names and figures, nothing is cut."""
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(make_table(summaries(), TITLE))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "800 B (1/5)" in text


def test_what_was_tuned_is_said() -> None:
    """All alike, nothing, or some rungs only: the reader must know."""
    alike = make_summaries(make_rung("ordinary", 2.0), make_rung("mhlora", 2.0))
    assert tuning(alike) == "rate: the best of x0.5, x1, x2 on seed 0, for every rung."
    nothing = make_summaries(make_rung("ordinary", 2.0, sweep={}), make_rung("mhlora", 2.0, sweep={}))
    assert tuning(nothing).startswith("rate: no rate was tuned (--rates), so a rung may be behind only because")
    some = make_summaries(make_rung("ordinary", 2.0), make_rung("mhlora", 2.0, sweep={}))
    assert tuning(some) == "rate: the best on seed 0 of those tried: ordinary x0.5, x1, x2; mhlora not tuned."
    lines = explain(summaries(), {"ordinary": "AdamW", "mhlora": "LoRAMuon", "merge_iter=1": "LoRAMuon"})
    assert any("seeds 0, 1, 2" in line for line in lines)
    assert "optimizer: AdamW for ordinary; LoRAMuon for mhlora, merge_iter=1." in lines
    assert "optimizer: AdamW, for every rung." in explain(summaries(), {"ordinary": "AdamW", "mhlora": "AdamW"})


def test_markdown_has_the_table_the_explanation_and_the_advice() -> None:
    """A picture only if there is one."""
    text = make_markdown(summaries(), TITLE, ["What it means."], ["Do this."], "ladder.svg")
    assert "- What it means." in text
    assert "| merge_iter=10 | x1 | 2.5 ± 0 | 1.250 | > 1x | 800 B (1/5) | 1:05 |" in text
    assert "![loss against samples](ladder.svg)" in text
    assert text.endswith("Do this.\n")
    assert "ladder.svg" not in make_markdown(summaries(), TITLE, [], [])


def test_the_picture_has_a_line_for_each_rung() -> None:
    """Well-formed SVG that names all rungs but the one without numbers; the same each time."""
    pytest.importorskip("matplotlib")
    picture = draw(summaries(), TITLE)
    assert ET.fromstring(picture).tag == "{http://www.w3.org/2000/svg}svg"
    text = picture.decode()
    assert all(f"{name} (rate" in text for name in ("ordinary", "mhlora", "merge_iter=1", "merge_iter=10"))
    assert "merge_iter=50 (rate" not in text
    assert draw(summaries(), TITLE) == picture
    assert draw(summaries(), TITLE, kind="png").startswith(b"\x89PNG")


def test_without_matplotlib_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table doesn't need it."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'lte-ray\[plots\]'"):
        draw(summaries(), TITLE)

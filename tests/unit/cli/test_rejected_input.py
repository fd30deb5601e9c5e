"""The page of rejected inputs is true: each command is run again."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.rejected import CATEGORIES, PAGE
from benchmarks.rejected_runner import ROOT, first_line, run_in, surroundings


@pytest.mark.parametrize("title", list(CATEGORIES))
def test_bad_input_is_rejected_with_a_reason(title: str) -> None:
    """No input is accepted, ends in a traceback, or shows a secret or a path of this machine."""
    with surroundings() as folder:
        rows = list(CATEGORIES[title](run_in(folder), folder))
        assert not list(folder.rglob("model.safetensors.part"))
    assert rows
    for row in rows:
        assert row.end in ("1", "2", "refused"), row
        assert len(row.saw) > 15, row
        assert "HIDDEN" not in row.saw
        assert str(Path(ROOT)) not in row.saw


def test_the_page_lists_every_category_and_input() -> None:
    """`python -m benchmarks.rejected` writes at least forty rows."""
    text = PAGE.read_text()
    assert [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")] == list(CATEGORIES)
    assert sum(line.startswith("| ") for line in text.splitlines()) - len(CATEGORIES) > 40


def test_the_first_line_is_found_in_frames_and_after_warnings() -> None:
    """In tyro's frames, and together with the error that the line announces."""
    assert first_line("╭─ Value error ─╮\n│ no number │\n│ ──── │\n╰───╯\n") == "no number"
    assert first_line("a warning\nerror: it raised:\n\nTraceback\nOSError: x\n") == "error: it raised: ... OSError: x"
    assert first_line("") == ""

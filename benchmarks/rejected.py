"""Gives every kind of bad input for real and writes what the user saw into ``docs/rejected-input.md``.

Commands run through `benchmarks.rejected_runner`; contributions go into the engine's coordinator. Each run gives the same page.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import rejected_contributions, rejected_files, rejected_settings
from benchmarks.rejected_runner import RAW, ROOT, TAKEN, Row, Run, run_in, surroundings

PAGE = ROOT / "docs" / "rejected-input.md"

CATEGORIES: dict[str, Callable[[Run, Path], Iterator[Row]]] = {
    **rejected_settings.CATEGORIES,
    **rejected_files.CATEGORIES,
    **rejected_contributions.CATEGORIES,
}
"""Functions that give the bad inputs of one kind, in the order of the page."""


def tables() -> dict[str, list[Row]]:
    """Returns the rows of every category."""
    rows: dict[str, list[Row]] = {}
    for title, give in CATEGORIES.items():
        with surroundings() as folder:
            rows[title] = list(give(run_in(folder), folder))
    return rows


def page(rows: dict[str, list[Row]]) -> str:
    """The page, as Markdown."""
    count = sum(map(len, rows.values()))
    parts = [
        "# Rejected input",
        "",
        f"{count} bad inputs, each given for real by `python -m benchmarks.rejected`, which writes this page, and the first "
        "line that the user saw. Exit code 2: bad input, nothing was started and nothing written. Paths are shortened. "
        "The reasons are in [security](security.md).",
    ]
    for title, of_title in rows.items():
        parts += ["", f"## {title}", "", "| given | end | seen |", "|---|---|---|"]
        parts += [f"| {_code(row.given)} | {row.end} | {_code(row.saw)} |" for row in of_title]
    return "\n".join(parts) + "\n"


def _code(text: str) -> str:
    """Text as code in a table's cell, with unprintable characters written out."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text).replace("|", "\\|")
    return f"`` {shown} ``" if "`" in shown else f"`{shown}`" if shown else ""


if __name__ == "__main__":
    made = tables()
    wrong = [row for rows in made.values() for row in rows if row.end in ("0", RAW, TAKEN)]
    for row in wrong:
        print(f"NOT REJECTED: {row.given}: {row.end} {row.saw}")
    if wrong:
        sys.exit(1)
    PAGE.write_text(page(made))
    print(f"{PAGE.relative_to(ROOT)}: {sum(map(len, made.values()))} rejected inputs")

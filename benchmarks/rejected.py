"""Every kind of bad input, given for real, and what the user saw: writes ``docs/rejected-input.md``.

Commands run in this process through the command line's entry, `lte_ray.cli.main.main`, with no cluster to reach: what isn't
refused before would say so. Contributions go into the engine's coordinator. Each run gives the same page; paths are shortened.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "rejected-input.md"

NOBODY = "127.0.0.1:1"
"""An address at which no cluster answers."""

RAW = "TRACEBACK"
"""Where Python's own error reached the user: never."""

TAKEN = "TAKEN"
"""Where the input wasn't refused: never."""


@dataclass(frozen=True)
class Row:
    """What was given, the exit code (or what else became of it), and the first line that the user saw."""

    given: str
    end: str
    saw: str


Ran = Callable[..., tuple[str, str]]
"""Runs ``lte-ray`` with these arguments; gives the exit code and the first line of what it said."""


def first_line(text: str) -> str:
    """The first line that says something, without a frame; with what was raised or is missing, where it announces that."""
    lines = [line.strip("│• ") for line in text.splitlines() if line.strip() and line[0] not in "╭╰"]
    lines = [line for line in lines if line != "Could not create CLI parser from the provided type." and line.strip("─")]
    lines = lines[next((i for i, line in enumerate(lines) if line.startswith("error:")), 0) :]  # behind a library's warnings
    if not lines:
        return ""
    if not lines[0].endswith(":") or len(lines) == 1:
        return lines[0]
    return f"{lines[0]} ... {lines[-1]}" if lines[0].startswith("error:") else f"{lines[0]} {lines[1]}"


def shortened(text: str, folder: Path) -> str:
    """Without the paths of this machine."""
    for path, name in ((str(folder), "<dir>"), (str(ROOT), "<repo>"), (os.getcwd(), "<repo>"), (str(Path.home()), "~")):
        text = text.replace(path, name)
    return text


def run_in(folder: Path) -> Ran:
    """Commands that find nothing but `folder`, in an environment without a cluster."""

    def run(*arguments: str) -> tuple[str, str]:
        from lte_ray.cli.main import main

        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code: object = main(list(arguments))
            except SystemExit as leaving:
                code = leaving.code
            except Exception as error:  # a traceback for the user: the command below then fails
                return RAW, shortened(f"{type(error).__name__}: {error}".splitlines()[0], folder)
        said = [_written(stream) for stream in (err, out)]
        return str(code), shortened(first_line(said[0] or said[1]), folder)

    return run


def _written(stream: io.TextIOWrapper) -> str:
    stream.seek(0)
    return stream.read()


@contextlib.contextmanager
def surroundings() -> Iterator[Path]:
    """An empty folder; wide lines, and an address with no cluster, even if this process is connected to one."""
    import ray

    names = {"COLUMNS": "2000", "RAY_ADDRESS": NOBODY, "NO_COLOR": "1"}
    before = {name: os.environ.get(name) for name in names}
    os.environ |= names
    try:
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(ray, "is_initialized", return_value=False):
            yield Path(folder).resolve()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def tables() -> dict[str, list[Row]]:
    """Every bad input by category."""
    from benchmarks import rejected_contributions, rejected_files, rejected_settings

    found: dict[str, list[Row]] = {}
    for module in (rejected_settings, rejected_files, rejected_contributions):
        for title, rows in module.CATEGORIES.items():
            with surroundings() as folder:
                found[title] = list(rows(run_in(folder), folder))
    return found


def page(found: dict[str, list[Row]]) -> str:
    """The page, as Markdown."""
    count = sum(map(len, found.values()))
    parts = [
        "# Rejected input",
        "",
        f"{count} bad inputs, each given for real by `python -m benchmarks.rejected`, which writes this page, and the first "
        "line that the user saw. Exit code 2: bad input, nothing was started and nothing written. Paths are shortened. "
        "What is behind it: [security](security.md).",
    ]
    for title, rows in found.items():
        parts += ["", f"## {title}", "", "| given | end | seen |", "|---|---|---|"]
        parts += [f"| {_code(row.given)} | {row.end} | {_code(row.saw)} |" for row in rows]
    return "\n".join(parts) + "\n"


def _code(text: str) -> str:
    """Text as code in a table's cell, with what isn't printable written out."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text).replace("|", "\\|")
    return f"`` {shown} ``" if "`" in shown else f"`{shown}`" if shown else ""


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    made = tables()
    wrong = [row for rows in made.values() for row in rows if row.end in ("0", RAW, TAKEN)]
    for row in wrong:
        print(f"NOT REJECTED: {row.given}: {row.end} {row.saw}")
    if wrong:
        sys.exit(1)
    PAGE.write_text(page(made))
    print(f"{PAGE.relative_to(ROOT)}: {sum(map(len, made.values()))} rejected inputs")

"""Runs ``lte-ray`` with bad input in this process and collects what the user sees, for `benchmarks.rejected`.

Commands go through the command line's entry, `lte_ray.cli.main.main`. No cluster can be reached, so input that isn't rejected
earlier ends in an error that says so.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent

NO_CLUSTER = "127.0.0.1:1"
"""An address at which no cluster answers."""

RAW = "TRACEBACK"
"""The end of a row where Python's own error reached the user, which must never happen."""

TAKEN = "TAKEN"
"""The end of a row where the input was accepted, which must never happen."""


@dataclass(frozen=True)
class Row:
    """One bad input: what was given, how it ended (the exit code, or "refused"), and the first line that the user saw."""

    given: str
    end: str
    saw: str


Run = Callable[..., tuple[str, str]]
"""Runs ``lte-ray`` with these arguments and returns the exit code and the first line of its output."""


def first_line(text: str) -> str:
    """The first line with content, without the frame around it. A line that ends in a colon is joined to what it announces."""
    lines = [line.strip("│• ") for line in text.splitlines() if line.strip() and line[0] not in "╭╰"]
    lines = [line for line in lines if line != "Could not create CLI parser from the provided type." and line.strip("─")]
    lines = lines[next((i for i, line in enumerate(lines) if line.startswith("error:")), 0) :]  # skip a library's warnings
    if not lines:
        return ""
    if not lines[0].endswith(":") or len(lines) == 1:
        return lines[0]
    return f"{lines[0]} ... {lines[-1]}" if lines[0].startswith("error:") else f"{lines[0]} {lines[1]}"


def shorten_paths(text: str, folder: Path) -> str:
    """Replaces the paths of this machine."""
    for path, name in ((str(folder), "<dir>"), (str(ROOT), "<repo>"), (os.getcwd(), "<repo>"), (str(Path.home()), "~")):
        text = text.replace(path, name)
    return text


def run_in(folder: Path) -> Run:
    """Returns a function that runs a command and replaces `folder` in its output."""

    def run(*arguments: str) -> tuple[str, str]:
        from lte_ray.cli.main import main

        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code: object = main(list(arguments))
            except SystemExit as leaving:
                code = leaving.code
            except Exception as error:  # the user would see a traceback: `benchmarks.rejected` then fails
                return RAW, shorten_paths(f"{type(error).__name__}: {error}".splitlines()[0], folder)
        errors, output = (_contents(stream) for stream in (err, out))
        return str(code), shorten_paths(first_line(errors or output), folder)

    return run


def _contents(stream: io.TextIOWrapper) -> str:
    stream.seek(0)
    return stream.read()


@contextlib.contextmanager
def surroundings() -> Iterator[Path]:
    """An empty folder; wide lines, and an address with no cluster, even if this process is connected to one."""
    import ray

    names = {"COLUMNS": "2000", "RAY_ADDRESS": NO_CLUSTER, "NO_COLOR": "1"}
    before = {name: os.environ.get(name) for name in names}
    os.environ |= names
    try:
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(ray, "is_initialized", return_value=False):
            yield Path(folder).resolve()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)

"""``lte-ray watch``: the display of a run, from another terminal or machine. Reads its files only: no Ray, no torch."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lte_ray.cli.call import JSON_LINES_HELP, print_json
from lte_ray.cli.run_argument import RUN_HELP, STORAGE_HELP
from lte_ray.cli.run_status import describe_rest, describe_state, locate_directory, wait_for_more
from lte_ray.cli.settings_parser import parse_arguments, positional
from lte_ray.config.validation import setting
from lte_ray.errors import StorageError
from lte_ray.redaction import printable

if TYPE_CHECKING:
    from lte_ray.run.inspect import RunStatus
    from lte_ray.storage import RunDirectory

MAX_OUTAGE = 300.0
"""Seconds after which a run whose files can't be read any more isn't watched any longer."""


@dataclass(frozen=True)
class Flags:
    """Shows the progress of a run until it ends, from its files alone. Ctrl-C ends the display, not the run."""

    run: str = positional("RUN", RUN_HELP)
    storage: str | None = setting(None, STORAGE_HELP)
    json: bool = setting(False, JSON_LINES_HELP)


def watch(arguments: list[str]) -> None:
    """Runs the subcommand with the arguments after ``watch``.

    Raises:
        StorageError: there is no such run, or its files can't be read any more.
    """
    flags = parse_arguments(Flags, "lte-ray watch RUN [flags]", arguments)
    directory = locate_directory(flags.run, flags.storage)
    if flags.json:
        for status in follow(directory):
            print_json(status.as_dict())
        return
    from rich.console import Console

    from lte_ray.run.display import automatic_display

    display = automatic_display(sys.stdout)
    with contextlib.closing(display):
        for status in follow(directory):
            display.update(status.progress)
    console = Console(highlight=False)
    console.print(f"{printable(directory.display)}: {describe_state(status)}", markup=False, soft_wrap=True)
    if rest := describe_rest(status):
        console.print(rest, markup=False, soft_wrap=True)


def follow(directory: RunDirectory) -> Iterator[RunStatus]:
    """Yields the status of a run again and again until the run is over. Storage that fails for a while is shown in a note.

    Raises:
        StorageError: as `watch`.
    """
    from lte_ray.run.inspect import inspect_run

    status, read_at = inspect_run(directory), time.monotonic()
    yield status
    while not status.is_over:
        wait_for_more(directory)
        try:
            status, read_at = inspect_run(directory), time.monotonic()
        except StorageError as error:
            if time.monotonic() - read_at > MAX_OUTAGE or not directory.exists():
                raise
            status = dataclasses.replace(status, progress=dataclasses.replace(status.progress, note=printable(str(error))))
        yield status

"""``lte-ray status``: how far a run is, and what has happened. Reads its files only: no Ray, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lte_ray.cli.call import JSON_HELP, print_json
from lte_ray.cli.run_argument import RUN_HELP, STORAGE_HELP
from lte_ray.cli.run_status import describe_rest, describe_state, format_event, locate_directory
from lte_ray.cli.settings_parser import parse_arguments, positional
from lte_ray.config.validation import setting
from lte_ray.redaction import printable

if TYPE_CHECKING:
    from lte_ray.run.inspect import RunStatus


@dataclass(frozen=True)
class Flags:
    """Shows a run's state, progress, last figures and last events, from its files alone."""

    run: str = positional("RUN", RUN_HELP)
    storage: str | None = setting(None, STORAGE_HELP)
    json: bool = setting(False, JSON_HELP)


def status(arguments: list[str]) -> None:
    """Runs the subcommand with the arguments after ``status``.

    Raises:
        StorageError: there is no such run, or its files can't be read.
    """
    flags = parse_arguments(Flags, "lte-ray status RUN [flags]", arguments)
    from lte_ray.run.inspect import inspect_run

    found = inspect_run(locate_directory(flags.run, flags.storage))
    if flags.json:
        print_json(found.as_dict())
    else:
        show(found)


def show(found: RunStatus) -> None:
    """Prints the status for people."""
    from rich.console import Console

    from lte_ray.run.display import make_table

    console = Console(highlight=False)

    def line(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    line(f"{printable(found.directory.display)}: {describe_state(found)}")
    console.print(make_table(found.progress))
    if found.state != "running" and (rest := describe_rest(found)):
        line(rest)
    for row in found.events[-5:]:
        line(format_event(row))
    for text in found.missing:
        line(f"Missing: {printable(text)}")

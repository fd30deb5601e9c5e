"""``lte-ray stop``: has a run save, export and end, from another terminal or machine, by a file in its directory."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console

from lte_ray.cli.call import JSON_HELP, print_json
from lte_ray.cli.run_argument import RUN_HELP, STORAGE_HELP
from lte_ray.cli.run_status import describe_rest, describe_state, locate_directory
from lte_ray.cli.settings_parser import parse_arguments, positional
from lte_ray.cli.watch import follow
from lte_ray.config.units import read_units
from lte_ray.config.validation import check_at_least, setting
from lte_ray.errors import RunError, StorageError
from lte_ray.redaction import printable

if TYPE_CHECKING:
    from lte_ray.run.inspect import RunStatus
    from lte_ray.storage import RunDirectory


@dataclass(frozen=True)
class Flags:
    """Ends a run after the merge that is under way: heads save their states, and the merged weights are exported. Waits until
    then. The run can be resumed."""

    run: str = positional("RUN", RUN_HELP)
    storage: str | None = setting(None, STORAGE_HELP)
    reason: str = setting("", "Why, for the run's records.")
    timeout: float = setting(600.0, "Time to wait until the run has ended; 0: only ask.", unit="time")
    json: bool = setting(False, JSON_HELP)

    def __post_init__(self) -> None:
        read_units(self)
        check_at_least(self, 0, "timeout")


def stop(arguments: list[str]) -> None:
    """Runs the subcommand with the arguments after ``stop``.

    Raises:
        StorageError: there is no such run, no process trains it, or its files can't be read or written.
        RunError: it has ended in another way, or hasn't ended in time.
    """
    flags = parse_arguments(Flags, "lte-ray stop RUN [flags]", arguments)
    from lte_ray.run.inspect import inspect_run
    from lte_ray.run.stop_request import request_stop

    directory = locate_directory(flags.run, flags.storage)
    before = inspect_run(directory)
    shown = printable(directory.display)
    if before.is_over:
        raise StorageError(f"No process trains {shown}, so there is nothing to stop: {describe_state(before)}.")
    request_stop(directory, flags.reason or f"lte-ray stop on {socket.gethostname()}")
    notes = Console(stderr=True, highlight=False)
    notes.print(f"{shown} is asked to end after the merge that is under way.", markup=False, soft_wrap=True)
    status = _wait(directory, before, flags.timeout) if flags.timeout else before
    if flags.json:
        print_json(status.as_dict())
    elif flags.timeout:
        console = Console(highlight=False)
        for line in (f"{shown}: {describe_state(status)}", describe_rest(status)):
            if line:
                console.print(line, markup=False, soft_wrap=True)


def _wait(directory: RunDirectory, before: RunStatus, timeout: float) -> RunStatus:
    """Waits until the run has ended, and returns its status then.

    Raises:
        RunError: it has ended in another way, or hasn't ended in time.
    """
    from lte_ray.run.stop_request import remove_request

    end, status, shown = time.monotonic() + timeout, before, printable(directory.display)
    for status in follow(directory):
        if status.is_over or time.monotonic() >= end:
            break
    if status.state in ("stopped", "finished"):
        return status
    if status.is_over:
        error = RunError(f"{shown} has ended in another way: {describe_state(status)}. {describe_rest(status)}")
        error.checkpoint = status.progress.checkpoint
        raise error
    if not status.driver.alive and status.since == before.since:
        remove_request(directory)
        raise RunError(
            f"Nothing has answered in {timeout:g} s: {describe_state(status)}. Probably no process trains {shown}. The request "
            "is withdrawn."
        )
    raise RunError(
        f"{shown} hasn't ended within {timeout:g} s (--timeout). It is still asked to. See it with lte-ray watch {shown}."
    )

"""``lte-ray logs``: the events of a run, and the tracebacks of what went wrong. Reads its files only: no Ray, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lte_ray.cli.call import JSON_LINES_HELP, print_json
from lte_ray.cli.run_argument import RUN_HELP, STORAGE_HELP
from lte_ray.cli.run_status import format_event, locate_directory, wait_for_more
from lte_ray.cli.settings_parser import parse_arguments, positional
from lte_ray.config.validation import setting
from lte_ray.errors import StorageError
from lte_ray.redaction import printable

if TYPE_CHECKING:
    from lte_ray.storage import RunDirectory


@dataclass(frozen=True)
class Flags:
    """Shows the events of a run in their order, then errors.log, the tracebacks of processes that were lost."""

    run: str = positional("RUN", RUN_HELP)
    storage: str | None = setting(None, STORAGE_HELP)
    follow: bool = setting(False, "Show what comes until the run ends. Ctrl-C ends the display, not the run.")
    json: bool = setting(False, f"{JSON_LINES_HELP} An event is a row of metrics.jsonl; a line of errors.log is in error_log.")


def logs(arguments: list[str]) -> None:
    """Runs the subcommand with the arguments after ``logs``.

    Raises:
        StorageError: there is no such run, or its files can't be read.
    """
    flags = parse_arguments(Flags, "lte-ray logs RUN [flags]", arguments)
    directory = locate_directory(flags.run, flags.storage)
    from lte_ray.storage import RUN

    if not directory.exists(RUN):
        raise StorageError(f"There is no run in {directory.display}: it has no {RUN}. Correct --storage or the name.")
    nothing = True
    for line in read_logs(directory, follow=flags.follow):
        nothing = False
        if flags.json:
            print_json(line)
        else:
            print(_shown(line), flush=flags.follow)
    if nothing and not flags.json:
        print(f"{printable(directory.display)} has no events and no errors yet.")


def read_logs(directory: RunDirectory, *, follow: bool) -> Iterator[dict[str, Any]]:
    """Yields the events of a run as rows, and the lines of its ``errors.log`` under "error_log".

    Args:
        follow: whether to go on until the run ends.
    """
    from lte_ray.run.error_log import ERRORS
    from lte_ray.run.inspect import inspect_run
    from lte_ray.run.metrics_files import MetricsReader, RunFile
    from lte_ray.run.tail import LineFollower, is_event, parse_row

    events = LineFollower(MetricsReader(directory), is_event)
    errors = LineFollower(RunFile(directory, ERRORS), lambda line: True)
    while True:
        is_last = not follow or inspect_run(directory).is_over
        for line in events.poll():
            row = parse_row(line)
            if row is not None and row["kind"] == "event":
                yield row
        for line in errors.poll():
            yield {"error_log": line.decode(errors="replace")}
        if is_last:
            return
        wait_for_more(directory)


def _shown(line: dict[str, Any]) -> str:
    text = line.get("error_log")
    return format_event(line) if text is None else printable(text.replace("\t", "    "))

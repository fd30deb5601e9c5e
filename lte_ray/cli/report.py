"""``lte-ray report``: a page about one run or several. Reads their files only: no Ray, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from lte_ray.cli.run_argument import STORAGE_HELP
from lte_ray.cli.run_status import locate_directory
from lte_ray.cli.settings_parser import parse_arguments, positional, with_short
from lte_ray.config.validation import check_booleans, setting
from lte_ray.redaction import printable


@dataclass(frozen=True)
class Flags:
    """Writes a page about one run or several, side by side: losses, what the heads did, speed, traffic, memory, events and
    settings. It is one HTML file, which needs no network. It also shows folders of ladders and sweeps."""

    run: tuple[str, ...] = positional("RUN", "Runs, ladders or sweeps: the path or URI of each, or its name in --storage.")
    out: str = with_short("report.html", "The file. An earlier report is replaced.", "-o")
    force: bool = setting(False, "Replace the file also if it isn't an earlier report.")
    storage: str | None = setting(None, STORAGE_HELP)

    def __post_init__(self) -> None:
        check_booleans(self, "force")


def report(arguments: list[str]) -> None:
    """Runs the subcommand with the arguments after ``report``.

    Raises:
        ConfigError: the file can't be written, or a run is given twice.
        StorageError: there is no such run, or its files can't be read.
    """
    flags = parse_arguments(Flags, "lte-ray report RUN [RUN...] [flags]", arguments)
    directories = [locate_directory(run, flags.storage) for run in flags.run]

    from rich.console import Console

    from lte_ray.report import report_directories
    from lte_ray.run.display import format_bytes

    written = report_directories(directories, flags.out, force=flags.force)
    notes = Console(stderr=True, highlight=False)
    for place, texts in written.missing.items():
        for text in texts:
            notes.print(f"Missing of {place}: {printable(text)}", markup=False, soft_wrap=True)
    print(f"{written.path} ({format_bytes(written.size)})")

"""``lte-ray runs``: all runs in a storage, the newest first. Reads their files only: no Ray, no torch."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lte_ray.cli.call import JSON_HELP, print_json
from lte_ray.cli.run_status import format_ago
from lte_ray.cli.settings_parser import parse_arguments, positional
from lte_ray.config.validation import setting
from lte_ray.redaction import printable

if TYPE_CHECKING:
    from rich.table import Table

    from lte_ray.errors import StorageError
    from lte_ray.run.inspect import RunStatus
    from lte_ray.storage import RunDirectory

WIDTH = 160
"""Columns of the table where the output is no terminal."""


@dataclass(frozen=True)
class Flags:
    """Lists the runs in a storage, the newest first: state, progress and last figures."""

    storage: str | None = positional("STORAGE", "Folder or URI that runs are in; by default Ray's, ~/ray_results.", None)
    json: bool = setting(False, JSON_HELP)


def runs(arguments: list[str]) -> None:
    """Runs the subcommand with the arguments after ``runs``.

    Raises:
        StorageError: there is no such storage, or it can't be read.
    """
    flags = parse_arguments(Flags, "lte-ray runs [STORAGE] [flags]", arguments)
    from lte_ray.errors import StorageError
    from lte_ray.redaction import without_credentials
    from lte_ray.run.inspect import inspect_runs, list_runs
    from lte_ray.storage import default_storage

    storage = flags.storage or default_storage()
    directories = list_runs(storage)
    results = list(zip(directories, inspect_runs(directories), strict=True))
    found = [each for _, each in results if not isinstance(each, StorageError)]
    found.sort(key=lambda each: each.since or 0.0, reverse=True)
    failed = [(directory, each) for directory, each in results if isinstance(each, StorageError)]
    if flags.json:
        errors = {directory.display: str(error) for directory, error in failed}
        print_json({"storage": without_credentials(storage), "runs": [each.as_dict() for each in found], "errors": errors})
        return
    _show(found, failed, without_credentials(storage))


def _show(found: list[RunStatus], failed: list[tuple[RunDirectory, StorageError]], storage: str) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    if not found and not failed:
        console.print(f"There are no runs in {printable(storage)}.", markup=False, soft_wrap=True)
    if found:
        console.print(_table(found))
    for directory, error in failed:
        console.print(printable(f"{directory.display}: {error}"), markup=False, soft_wrap=True)


def _table(found: list[RunStatus]) -> Table:
    from rich.table import Table
    from rich.text import Text

    from lte_ray.run.display import format_evaluation

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("run", "state", "step", "version", "train loss", "evaluation", "last row"):
        table.add_column(title, justify="right" if title in ("step", "version", "train loss", "last row") else "left")
    for each in found:
        p = each.progress
        state = each.state + (", resumable" if each.is_resumable else "") + (", partly unreadable" if each.missing else "")
        table.add_row(
            Text(printable(p.run)),
            state,
            f"{p.step}/{p.steps}",
            f"v{p.version}",
            "-" if math.isnan(p.train_loss) else f"{p.train_loss:.4f}",
            Text(printable(format_evaluation(p)) if p.evaluation else "-"),
            "-" if each.since is None else f"{format_ago(time.time() - each.since)} ago",
        )
    return table

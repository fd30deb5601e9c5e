"""The rows of a run's ``metrics.jsonl``, read again: as they are, as a table, and its evaluated checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lte_ray import checkpoint
from lte_ray.config import check_run_name
from lte_ray.config.best_figure import parse_best_by
from lte_ray.errors import StorageError
from lte_ray.run.metrics import Row
from lte_ray.run.metrics_files import MetricsReader
from lte_ray.run.sinks.figures import RowNaming
from lte_ray.run.tail import parse_row
from lte_ray.storage import RunDirectory, split_run_path

if TYPE_CHECKING:
    import pandas


def read_metrics(path: str | os.PathLike[str]) -> pandas.DataFrame:
    """Reads the figures of a run, which may still be going on, as a pandas DataFrame.

    Args:
        path: the run's directory, as in ``Result.path``, or its URI.

    Returns:
        A row for each merge and evaluation, in their order, with the columns kind, at, version, step and samples, and one for
        each figure, named as in TensorBoard: ``train/loss``, ``eval/accuracy``. What a row lacks is NaN.

    Raises:
        StorageError: there is no run, or it can't be read.
    """
    place, name = split_run_path(os.fspath(path))
    check_run_name(name, "path")
    directory = RunDirectory.open(place, name)
    if not directory.exists():
        raise StorageError(f"There is no run in {directory.display}.")
    return to_dataframe(read_rows(directory))


def read_rows(directory: RunDirectory, until: int | None = None) -> list[Row]:
    """Reads the rows of a run; none if there is no file yet. Leaves out what isn't a row, such as a torn last line.

    Args:
        until: the last version whose merges and evaluations count. None: all.

    Raises:
        StorageError: the file can't be read.
    """
    rows = [row for line in MetricsReader(directory).read().splitlines() if (row := parse_row(line)) is not None]
    return [
        row
        for row in rows
        if row["kind"] == "event" or (isinstance(row.get("version"), int) and (until is None or row["version"] <= until))
    ]


def to_dataframe(rows: Iterable[Mapping[str, Any]]) -> pandas.DataFrame:
    """Returns the merges and evaluations among `rows` as `read_metrics` does."""
    import pandas

    columns = ["kind", "at", "version", "step", "samples"]
    table = list(_named(rows))
    columns += list(dict.fromkeys(name for row in table for name in row if name not in columns))
    return pandas.DataFrame(table, columns=columns)


def _named(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    naming = RowNaming()
    for row in rows:
        for each in naming.name(row):
            if each.kind in ("merge", "evaluation"):
                place = {"kind": each.kind, "at": each.at, "version": each.version, "step": each.step, "samples": each.samples}
                yield {**place, **each.figures}


def best_checkpoints(
    directory: RunDirectory, rows: Iterable[Mapping[str, Any]], best_by: str = ""
) -> list[tuple[int, dict[str, Any]]]:
    """Returns the complete checkpoints whose weights were evaluated, best first. Of equal ones the newest comes first.

    Args:
        rows: of ``metrics.jsonl``.
        best_by: the figure that decides; the lowest is best, or the highest after a dash ("-accuracy"). Without a name it is
            the first figure of the newest evaluation. Checkpoints without it come last.

    Returns:
        For each its version, and its evaluation with "version" and "step".

    Raises:
        StorageError: storage fails.
    """
    evaluations = {row["version"]: row for row in rows if row["kind"] == "evaluation"}
    kept = [version for version in reversed(checkpoint.complete_versions(directory)) if version in evaluations]
    figures = {v: {**evaluations[v]["values"], "version": v, "step": evaluations[v]["step"]} for v in kept}
    name, sign = parse_best_by(best_by)
    name = name or next(iter(evaluations[kept[0]]["values"]) if kept else iter(()), "")

    def rank(version: int) -> tuple[bool, float]:
        value = figures[version].get(name)
        return value is None, sign * (value or 0.0)

    return [(version, figures[version]) for version in sorted(kept, key=rank)]

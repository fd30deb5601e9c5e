"""``lte-ray audit``: was each contribution, and each batch of the data, merged exactly once? Starts no Ray."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from rich.console import Console

from lte_ray.cli.call import JSON_HELP, print_json
from lte_ray.cli.run_argument import RUN_HELP, STORAGE_HELP, run_path
from lte_ray.cli.settings_parser import parse_arguments, positional
from lte_ray.config.validation import setting
from lte_ray.errors import RunError, StorageError


@dataclass(frozen=True)
class Flags:
    """Reads a run's metrics.jsonl and checks that each contribution, and each batch of the data, was merged exactly once."""

    run: str = positional("RUN", RUN_HELP)
    storage: str | None = setting(None, STORAGE_HELP)
    json: bool = setting(False, JSON_HELP)


def audit(arguments: list[str]) -> int:
    """Runs the subcommand with the arguments after ``audit``, and returns the exit code.

    Raises:
        StorageError: the run doesn't exist, or its metrics can't be read.
        RunError: a batch or contribution was lost or merged twice.
    """
    flags = parse_arguments(Flags, "lte-ray audit RUN [flags]", arguments)
    from lte_ray import audit as auditing
    from lte_ray.export.run_reader import open_run
    from lte_ray.run.metrics_files import METRICS, MetricsReader

    directory = open_run(run_path(flags.run, flags.storage))
    source = MetricsReader(directory)
    if source.size() is None:
        raise StorageError(f"{directory.display} has no {METRICS}: nothing was merged there yet.")
    try:
        result = auditing.audit(auditing.read_rows(source.read()))
    except ValueError as error:
        raise StorageError(f"{directory.display}/{METRICS} is damaged: {error}.") from error
    wrong = "" if result.clean else f"{directory.display} doesn't hold each contribution exactly once."
    if flags.json:
        figures = {**dataclasses.asdict(result), "clean": result.clean, "run": directory.display}
        print_json(figures | ({"error": wrong, "exit_code": 1} if wrong else {}))
        return 1 if wrong else 0
    lines = [
        f"{result.contributions:,} contributions in {result.merges:,} merges; the newest version holds "
        f"{result.samples:,} samples in {result.batches:,} batches.",
        f"{result.lost:,} batches lost, {result.doubled:,} merged twice; {result.reissued:,} local steps that died with their "
        "heads were taken again.",
    ]
    if result.dropped or result.skipped:
        lines.append(
            f"{result.dropped:,} batches dropped with refused contributions, {result.skipped:,} skipped when the run went back."
        )
    if result.unlogged:
        lines.append(f"The rows of {result.unlogged:,} merges died with the driver; the merges after them account for them.")
    console = Console(highlight=False)
    for line in [*lines, *result.described_problems]:
        console.print(line, markup=False, soft_wrap=True)
    if wrong:
        raise RunError(wrong)
    return 0

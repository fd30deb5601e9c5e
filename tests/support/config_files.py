"""Parsing a file passed to --config."""

from __future__ import annotations

from pathlib import Path

from lte_ray.cli.flags import Parsed, parse
from lte_ray.errors import UserError
from workers.regression import Regression

GOOD = "workers.regression:Regression"


def parse_config(path: Path, *flags: str, worker: type | None = Regression) -> Parsed | UserError | int:
    """Returns settings, one of our errors, or the exit code of a flag that doesn't parse; raises anything else."""
    try:
        return parse(worker, GOOD, ["--config", str(path), *flags])
    except UserError as error:
        return error
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else -1

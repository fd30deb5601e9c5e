"""RUN, an argument of subcommands that use a run: a path or URI, or a name in the storage."""

from __future__ import annotations

import os
from pathlib import Path

from lte_ray.config import check_run_name
from lte_ray.errors import ConfigError

RUN_HELP = "A run: its path or URI, or its name in --storage."
STORAGE_HELP = "Folder or URI in which a name is looked up; by default Ray's, ~/ray_results."


def locate_run(run: str, storage: str | None) -> tuple[str, str]:
    """Returns the storage and the name of a run.

    Args:
        run: a path or URI if it has a separator, or names a run in the current folder; else a name.
        storage: where a name is looked up; by default Ray's folder.

    Raises:
        ConfigError: a path with a storage in addition, or a name that can't be one.
    """
    from lte_ray.storage import RUN, default_storage, split_run_path

    if "/" in run or os.sep in run or run in (".", "..", "~") or Path(run, RUN).exists():
        if storage is not None:
            raise ConfigError(f"RUN is {run!r}, a path, so --storage {storage} would have no effect. Leave --storage out.")
        path = run if "://" in run else str(Path(run).expanduser().absolute())
        return split_run_path(path)
    check_run_name(run, "RUN")
    return default_storage() if storage is None else storage, run


def run_path(run: str, storage: str | None) -> str:
    """The path or URI of a run, as `locate_run` finds it."""
    place, name = locate_run(run, storage)
    root, mark, query = place.partition("?") if "://" in place else (place, "", "")
    return f"{root.rstrip('/')}/{name}{mark}{query}"

"""The folder of a job of Ray: where Ray unpacks what was sent with the job. It is a temporary one."""

from __future__ import annotations

from pathlib import Path

_PLACE = ("runtime_resources", "working_dir_files")
"""The folders in Ray's own temporary folder that hold those of jobs."""


def job_folder(path: str) -> Path | None:
    """Returns the folder of the job that an absolute path is in, or None."""
    parts = Path(path).parts
    at = next((i for i in range(len(parts) - 2) if parts[i : i + 2] == _PLACE), None)
    return None if at is None else Path(*parts[: at + 3])

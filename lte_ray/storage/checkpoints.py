"""Which checkpoints a run directory has, by the names of their folders. `lte_ray.checkpoint` reads what is in them."""

from __future__ import annotations

from lte_ray.storage.run_directory import RunDirectory

FOLDER = "checkpoints"

MANIFEST = "manifest.json"
"""The file that is written last: a folder without it isn't a checkpoint."""


def version_folder(version: int) -> str:
    """Path of a checkpoint in the run directory."""
    return f"{FOLDER}/{version:06d}"


def all_versions(directory: RunDirectory) -> list[int]:
    """Versions of all folders whose names `version_folder` gives, also of incomplete checkpoints, oldest first."""
    numbers = [name for name in directory.list_names(FOLDER) if name.isascii() and name.isdigit() and len(name) < 19]
    return sorted(int(name) for name in numbers if f"{FOLDER}/{name}" == version_folder(int(name)))


def is_complete(directory: RunDirectory, version: int) -> bool:
    """Whether the checkpoint of this version has its manifest."""
    return directory.exists(f"{version_folder(version)}/{MANIFEST}")


def newest_version(directory: RunDirectory) -> int | None:
    """Version of the newest complete checkpoint, or None if there is none."""
    return next((version for version in reversed(all_versions(directory)) if is_complete(directory, version)), None)

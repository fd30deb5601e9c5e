"""Which checkpoints there are, and which of them are kept.

Which checkpoint a run goes on from: the newest that is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection

from lte_ray.checkpoint.files import best_versions, read_bytes
from lte_ray.checkpoint.manifest import (
    FOLDER,
    MANIFEST,
    Damaged,
    Manifest,
    has_all_heads,
    read_manifest,
    strip_number,
    version_folder,
)
from lte_ray.errors import StorageError
from lte_ray.storage import RunDirectory

TIDYING = 5.0
"""Seconds of patience with a storage that won't remove what isn't needed any more."""


def complete_versions(directory: RunDirectory) -> list[int]:
    """Versions of the complete checkpoints, oldest first."""
    return [version for version in _versions(directory) if _is_complete(directory, version)]


def incomplete_versions(directory: RunDirectory) -> list[int]:
    """Versions of those that were begun and have no manifest, oldest first."""
    return [version for version in _versions(directory) if not _is_complete(directory, version)]


def remove_incomplete(directory: RunDirectory, only: Collection[int] | None = None) -> None:
    """Removes the folders of checkpoints that were never completed, of these versions or of all; as far as storage lets it."""
    directory = _impatient(directory)
    for version in [version for version in incomplete_versions(directory) if only is None or version in only]:
        with contextlib.suppress(StorageError):  # left for the next time
            directory.delete(version_folder(version))


def remove_after(directory: RunDirectory, version: int) -> None:
    """Removes the checkpoints of later versions, manifest first."""
    for later in [v for v in _versions(directory) if v > version]:
        _remove(directory, later)


def newest_resumable(directory: RunDirectory) -> Manifest | None:
    """The newest complete checkpoint that a run can go on from; those with damaged manifests are passed over."""
    for version in reversed(complete_versions(directory)):
        with contextlib.suppress(StorageError):
            manifest = read_manifest(directory, version)
            if has_all_heads(manifest):
                return manifest
    return None


def prune(
    directory: RunDirectory, keep: int | None, keep_best: int = 0, best_by: str = "", rollback_version: int | None = None
) -> None:
    """Removes complete checkpoints, manifest first, so that none is ever half there. One that can't be removed is left.

    Args:
        keep: how many of the newest stay; None: all.
        keep_best: how many of the best stay beside them; only those with a readable evaluation count.
        best_by: the figure to go by, "-name" if higher is better, "" for the first one (`best`).
        good: the newest until this version stays, too: a run whose loss has spiked since goes back to it. None: no such.

    The newest that a run can go on from stays in any case: of format 1, which can need an older one.
    """
    directory = _impatient(directory)
    with contextlib.suppress(StorageError):  # no reason to end a run
        versions = complete_versions(directory)
        old = versions[:-keep] if keep else []
        if not old:
            return
        needed = newest_resumable(directory)
        staying = {*best_versions(directory, versions, keep_best, best_by), needed.version if needed else None}
        staying |= set([version for version in versions if rollback_version is not None and version <= rollback_version][-1:])
        for version in old:
            if version not in staying:
                with contextlib.suppress(StorageError):
                    _remove(directory, version)


def _impatient(directory: RunDirectory) -> RunDirectory:
    """The same place, with little patience."""
    return dataclasses.replace(directory, patience=min(directory.patience, TIDYING))


def _remove(directory: RunDirectory, version: int) -> None:
    path = version_folder(version)
    if not directory.is_link(path):  # what a link leads to isn't ours
        directory.delete(f"{path}/{MANIFEST}")
    directory.delete(path)


def _is_complete(directory: RunDirectory, version: int) -> bool:
    return directory.exists(f"{version_folder(version)}/{MANIFEST}")


def _versions(directory: RunDirectory) -> list[int]:
    """Versions of all folders whose names `folder` gives."""
    numbers = [name for name in directory.list_names(FOLDER) if name.isascii() and name.isdigit() and len(name) < 19]
    return sorted(int(name) for name in numbers if f"{FOLDER}/{name}" == version_folder(int(name)))


def verify(directory: RunDirectory, manifest: Manifest) -> None:
    """Raises Damaged if a file that the manifest lists isn't there or isn't what was written."""
    for file in manifest.files:
        read_bytes(directory, manifest, strip_number(file.name))


def read_newest_intact(directory: RunDirectory) -> tuple[Manifest, list[str]]:
    """The newest complete checkpoint that a run can go on from and whose files are all what was written.

    Returns:
        Its manifest, and one line for each newer one that was passed over, which says why.

    Raises:
        StorageError: there is none at all, none is intact, or storage fails: then nothing is passed over.
    """
    versions = complete_versions(directory)
    if not versions:
        begun = incomplete_versions(directory)
        more = f" ({len(begun)} was begun but not completed)" if begun else ""
        raise StorageError(f"There is no complete checkpoint in {directory.display}{more}.")
    passed: list[str] = []
    for version in reversed(versions):
        try:
            manifest = read_manifest(directory, version)
            if has_all_heads(manifest):
                verify(directory, manifest)
                return manifest, [f"{line}; using {version:06d} instead" for line in passed]
            which = f"the state of heads {list(manifest.heads)} only" if manifest.heads else "the main weights alone"
            passed.append(f"{version_folder(version)}, of an older release, holds {which}")
        except Damaged as error:
            passed.append(str(error).replace(f"{directory.path}/", "").rstrip("."))
    raise StorageError(f"None of the checkpoints in {directory.display} can be used: {'; '.join(passed)}.")

"""Which checkpoints a run directory has, which of them are kept, and from which a run resumes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection

from lte_ray.checkpoint.files import MOVED, best_versions, read_bytes
from lte_ray.checkpoint.manifest import (
    Damaged,
    Manifest,
    has_all_heads,
    read_manifest,
    strip_number,
)
from lte_ray.errors import StorageError
from lte_ray.storage import RunDirectory
from lte_ray.storage.checkpoints import MANIFEST, all_versions, is_complete, version_folder

CLEANUP_PATIENCE = 5.0
"""Seconds of retries while storage fails to remove what isn't needed any more."""


def complete_versions(directory: RunDirectory) -> list[int]:
    """Versions of the complete checkpoints, oldest first."""
    return [version for version in all_versions(directory) if is_complete(directory, version)]


def incomplete_versions(directory: RunDirectory) -> list[int]:
    """Versions of the checkpoints that were begun and have no manifest, oldest first."""
    return [version for version in all_versions(directory) if not is_complete(directory, version)]


def newest_resumable(directory: RunDirectory) -> Manifest | None:
    """The newest complete checkpoint from which a run can be resumed. Skips those with damaged manifests."""
    for version in reversed(complete_versions(directory)):
        with contextlib.suppress(StorageError):
            manifest = read_manifest(directory, version)
            if has_all_heads(manifest):
                return manifest
    return None


def read_newest_intact(directory: RunDirectory) -> tuple[Manifest, list[str]]:
    """Finds the newest complete checkpoint from which a run can be resumed and whose files are all what was written.

    Returns:
        Its manifest, and one line for each newer checkpoint that was skipped, which says why.

    Raises:
        StorageError: there is no checkpoint, none is intact, or storage fails: then none is skipped.
    """
    versions = complete_versions(directory)
    if not versions:
        begun = incomplete_versions(directory)
        more = f" ({len(begun)} was begun but not completed)" if begun else ""
        raise StorageError(f"There is no complete checkpoint in {directory.display}{more}.")
    skipped: list[str] = []
    for version in reversed(versions):
        try:
            manifest = read_manifest(directory, version)
            if has_all_heads(manifest):
                verify(directory, manifest)
                return manifest, [f"{line}; using {version:06d} instead" for line in skipped]
            content = f"the state of heads {list(manifest.heads)} only" if manifest.heads else "the main weights alone"
            skipped.append(f"{version_folder(version)}, of an older release, holds {content}")
        except Damaged as error:
            skipped.append(str(error).replace(f"{directory.path}/", "").rstrip("."))
    raise StorageError(f"None of the checkpoints in {directory.display} can be used: {'; '.join(skipped)}.")


def verify(directory: RunDirectory, manifest: Manifest) -> None:
    """Raises Damaged if a file that the manifest lists is missing or isn't what was written."""
    for file in manifest.files:
        read_bytes(directory, manifest, strip_number(file.name))


def prune(
    directory: RunDirectory,
    keep: int | None,
    keep_best: int = 0,
    best_by: str = "",
    rollback_version: int | None = None,
) -> None:
    """Removes complete checkpoints, manifest first, so that none is ever half there. Skips those that can't be removed.

    The newest checkpoint from which a run can be resumed always stays: in format 1 it may be an older one.

    Args:
        keep: how many of the newest stay; None: all.
        keep_best: how many of the best stay in addition. Only those with a readable evaluation count.
        best_by: the figure that decides, "-name" if higher is better, "" for the first one (`best_versions`).
        rollback_version: the newest checkpoint up to this version stays, too: the run rolls back to it, since its loss has
            spiked later. None: no such.
    """
    directory = _with_little_patience(directory)
    with contextlib.suppress(StorageError):  # no reason to end a run
        versions = complete_versions(directory)
        old = versions[:-keep] if keep else []
        if not old:
            return
        resumable = newest_resumable(directory)
        kept = {*best_versions(directory, versions, keep_best, best_by), resumable.version if resumable else None}
        kept |= set([version for version in versions if rollback_version is not None and version <= rollback_version][-1:])
        for version in old:
            if version not in kept:
                with contextlib.suppress(StorageError):
                    _remove(directory, version)


def remove_incomplete(directory: RunDirectory, only: Collection[int] | None = None) -> None:
    """Removes the folders of checkpoints that were never completed, as far as storage allows.

    Args:
        only: the versions to remove; None: all, and the states of heads that have moved.
    """
    directory = _with_little_patience(directory)
    if only is None:
        with contextlib.suppress(StorageError):
            directory.delete(MOVED)
    for version in [version for version in incomplete_versions(directory) if only is None or version in only]:
        with contextlib.suppress(StorageError):  # left for the next time
            directory.delete(version_folder(version))


def remove_after(directory: RunDirectory, version: int) -> None:
    """Removes the checkpoints of later versions, manifest first."""
    for later in [v for v in all_versions(directory) if v > version]:
        _remove(directory, later)


def _with_little_patience(directory: RunDirectory) -> RunDirectory:
    return dataclasses.replace(directory, patience=min(directory.patience, CLEANUP_PATIENCE))


def _remove(directory: RunDirectory, version: int) -> None:
    path = version_folder(version)
    if not directory.is_link(path):  # the target of a link isn't ours
        directory.delete(f"{path}/{MANIFEST}")
    directory.delete(path)

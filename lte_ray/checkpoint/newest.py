"""Which checkpoint a run goes on from: the newest that is whole."""

from __future__ import annotations

from lte_ray.checkpoint.files import read_bytes
from lte_ray.checkpoint.kept import complete, incomplete
from lte_ray.checkpoint.manifest import Damaged, Manifest, folder, has_all_heads, plain, read_manifest
from lte_ray.errors import StorageError
from lte_ray.storage import RunDirectory


def verify(directory: RunDirectory, manifest: Manifest) -> None:
    """Raises Damaged if a file that the manifest lists isn't there or isn't what was written."""
    for file in manifest.files:
        read_bytes(directory, manifest, plain(file.name))


def read_newest_intact(directory: RunDirectory) -> tuple[Manifest, list[str]]:
    """The newest complete checkpoint that a run can go on from and whose files are all what was written.

    Returns:
        Its manifest, and one line for each newer one that was passed over, which says why.

    Raises:
        StorageError: there is none at all, none is intact, or storage fails: then nothing is passed over.
    """
    versions = complete(directory)
    if not versions:
        begun = incomplete(directory)
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
            passed.append(f"{folder(version)}, of an older release, holds {which}")
        except Damaged as error:
            passed.append(str(error).replace(f"{directory.path}/", "").rstrip("."))
    raise StorageError(f"None of the checkpoints in {directory.display} can be used: {'; '.join(passed)}.")

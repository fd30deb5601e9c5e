"""Where a storage is, and what can be said of filesystems in general."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from lte_ray.errors import StorageError
from lte_ray.redact import without_credentials

WHOLE = ("s3", "gcs", "abfs")
"""pyarrow's object stores: a file is there when it is complete, so it needs no other name until then."""


OWN = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs", "file")
"""Schemes that pyarrow opens itself: what it says of such a URI is what is wrong with it."""

BY_ENVIRONMENT = {
    "s3": "AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "gcs": "GOOGLE_APPLICATION_CREDENTIALS",
    "abfs": "AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET",
    "abfss": "AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET",
}
"""Variables that give a store its credentials, by scheme."""


def open_place(storage: str) -> tuple[Any, str]:
    """The filesystem of a folder or URI, and the path on it. Raises whatever it can't be opened with."""
    if "://" not in storage:
        return pafs.LocalFileSystem(), str(Path(storage).expanduser().absolute())
    try:
        filesystem, path = pafs.FileSystem.from_uri(storage)
    except pa.ArrowInvalid:
        if _scheme(storage) in OWN:
            raise
        import fsspec  # the scheme is one of fsspec's

        other, path = fsspec.core.url_to_fs(storage)
        filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(other))
    return filesystem, path


def parted(run: str) -> tuple[str, str]:
    """The storage that a run is in, and its name. A URI's parameters (``?endpoint_override=...``) are of the storage.

    A name alone is in the current folder.
    """
    place, mark, query = run.partition("?") if "://" in run else (run, "", "")
    root, slash, name = place.rstrip("/").rpartition("/")
    return (root or ("/" if slash or not name else ".")) + mark + query, name


def advice(storage: str) -> str:
    """Where credentials belong, if this URI holds some; else empty."""
    if without_credentials(storage) == storage:
        return ""
    variables = BY_ENVIRONMENT.get(_scheme(storage))
    given = f" ({variables})" if variables else ""
    return f" Credentials don't belong in a URI: give them by the environment{given}, or the machine's role."


def _scheme(storage: str) -> str:
    return storage.partition("://")[0].lower()


def check_inside(relative: str) -> None:
    """Raises StorageError unless a relative path stays inside the folder that it is relative to."""
    parts = relative.split("/") if isinstance(relative, str) else [".."]
    if any(part in ("", ".", "..") or "\0" in part or "\\" in part for part in parts):
        raise StorageError(
            f"{repr(relative)[:80]} isn't a path inside the run directory: it must be relative, made of plain names, "
            "without '..', backslashes and NUL."
        )


def replace_file(filesystem: Any, first: str, path: str) -> None:
    """Gives a complete file its name, in place of one that has it."""
    try:
        filesystem.move(first, path)
    except Exception as error:
        # HDFS and the like don't replace: the old one goes first.
        refuses = isinstance(error, FileExistsError) or filesystem.type_name == "hdfs"
        if not refuses or filesystem.get_file_info(path).type != pafs.FileType.File:
            raise
        filesystem.delete_file(path)
        filesystem.move(first, path)

"""Where a storage is, and what can be said of filesystems in general.

Single tries of what a run directory does. Each may be made again after it failed, and then does what is left to do.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from lte_ray.errors import StorageError
from lte_ray.redaction import without_credentials

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


def split_run_path(run: str) -> tuple[str, str]:
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


PART_SUFFIX = ".part"
"""End of the name of a file that isn't complete."""


def write(filesystem: Any, path: str, data: bytes) -> None:
    """Writes a file under another name, and gives it its own when all bytes have arrived; leaves nothing if it fails."""
    first = path if filesystem.type_name in WHOLE else path + PART_SUFFIX
    filesystem.create_dir(posixpath.dirname(path), recursive=True)
    if filesystem.type_name == "local" and os.path.islink(first):
        os.unlink(first)  # never write where it leads to
    try:
        with filesystem.open_output_stream(first) as stream:
            stream.write(data)
        check(filesystem, first, len(data))
        if first != path:
            replace_file(filesystem, first, path)
    except BaseException:
        if first != path:
            with contextlib.suppress(Exception):
                filesystem.delete_file(first)
        raise


def check(filesystem: Any, path: str, expected: int) -> None:
    """Raises OSError if storage took less than it was given without saying so."""
    found = filesystem.get_file_info(path).size
    if found is not None and found != expected:
        raise OSError(f"{found} of {expected} bytes have arrived")


def read(filesystem: Any, path: str, limit: int | None) -> bytes:
    """The bytes of a regular file, at most `limit`."""
    info = filesystem.get_file_info(path)
    if info.type == pafs.FileType.Directory:
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if info.type == pafs.FileType.Unknown:  # a pipe would never end
        raise IsADirectoryError(errno.EISDIR, "it isn't a regular file")
    if limit is not None and info.size is not None and info.size > limit:
        raise ValueError(f"it has {info.size} bytes where at most {limit} are expected")
    with filesystem.open_input_stream(path) as stream:
        return bytes(stream.readall())


def delete(filesystem: Any, path: str) -> None:
    """Removes a file, a link (never what it leads to) or a folder, or does nothing."""
    if filesystem.type_name == "local" and os.path.islink(path):
        os.unlink(path)
        return
    kind = filesystem.get_file_info(path).type
    if kind == pafs.FileType.NotFound:
        return
    try:
        (filesystem.delete_dir if kind == pafs.FileType.Directory else filesystem.delete_file)(path)
    except FileNotFoundError as error:  # somebody else removes it, too
        if filesystem.get_file_info(path).type != pafs.FileType.NotFound:
            raise OSError(errno.EBUSY, "others remove parts of it at the same time") from error


class Append:
    """Adds to the end of a local file that nobody else writes. What a failed try has added is cut off before the next."""

    def __init__(self, filesystem: Any, path: str, data: bytes) -> None:
        self._filesystem, self._path, self._data = filesystem, path, data
        self._before: int | None = None

    def __call__(self) -> None:
        """One try."""
        before = self.undo()
        self._before = before
        with self._filesystem.open_append_stream(self._path) as stream:
            stream.write(self._data)
        check(self._filesystem, self._path, before + len(self._data))

    def undo(self) -> int:
        """Cuts off what was added; gives the bytes that are there."""
        found = int(self._filesystem.get_file_info(self._path).size or 0)
        if self._before is None or found <= self._before:
            return found
        os.truncate(self._path, self._before)
        return self._before

"""Where a storage is, and single attempts of what a run directory does there.

Each attempt may be repeated after it failed, and then does what is left to do. `storage.retry` repeats them.
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

ATOMIC_STORES = ("s3", "gcs", "abfs")
"""pyarrow's object stores. A file appears there when it is complete, so it needs no temporary name."""

PYARROW_SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "az", "hdfs", "viewfs", "file")
"""Schemes that pyarrow opens itself: its error on such a URI is the one to show."""

CREDENTIAL_VARIABLES = {
    "s3": "AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "gcs": "GOOGLE_APPLICATION_CREDENTIALS",
    "abfs": "AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET",
    "abfss": "AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET",
    "az": "AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET",
}
"""The environment variables that give a store its credentials, by scheme."""

PART_SUFFIX = ".part"
"""End of the name of a file that isn't complete."""


def default_storage() -> str:
    """Returns where runs are kept by default: Ray's own folder (that of its `RunConfig`), without importing Ray."""
    return Path("~/ray_results").expanduser().as_posix()


def open_filesystem(storage: str) -> tuple[Any, str]:
    """Opens the filesystem of a folder or URI, and returns it with the path there. Raises the library's own errors."""
    if "://" not in storage:
        return pafs.LocalFileSystem(), str(Path(storage).expanduser().absolute())
    try:
        filesystem, path = pafs.FileSystem.from_uri(_with_account(storage) if _scheme(storage) == "az" else storage)
    except pa.ArrowInvalid:
        if _scheme(storage) in PYARROW_SCHEMES:
            raise
        import fsspec  # knows more schemes

        other, path = fsspec.core.url_to_fs(storage)
        filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(other))
    return filesystem, path


def _with_account(storage: str) -> str:
    """``az://CONTAINER/PATH`` as pyarrow knows it. Raises ValueError if the environment doesn't name the account."""
    container, _, path = storage.partition("://")[2].partition("/")
    account = os.environ.get("AZURE_STORAGE_ACCOUNT_NAME") or os.environ.get("AZURE_STORAGE_ACCOUNT")
    if not account:
        raise ValueError("az:// needs the account's name in AZURE_STORAGE_ACCOUNT_NAME")
    return f"abfss://{container}@{account}.dfs.core.windows.net/{path}"


def split_run_path(run: str) -> tuple[str, str]:
    """Splits the path or URI of a run directory into its storage and its name.

    A URI's parameters (``?endpoint_override=...``) belong to the storage. A name alone is in the current folder.
    """
    place, mark, query = run.partition("?") if "://" in run else (run, "", "")
    root, slash, name = place.rstrip("/").rpartition("/")
    return (root or ("/" if slash or not name else ".")) + mark + query, name


def credentials_advice(storage: str) -> str:
    """Says where credentials belong if this URI holds some, else returns ''."""
    if without_credentials(storage) == storage:
        return ""
    variables = CREDENTIAL_VARIABLES.get(_scheme(storage))
    hint = f" ({variables})" if variables else ""
    return f" Credentials don't belong in a URI: give them by the environment{hint}, or the machine's role."


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


def write_file(filesystem: Any, path: str, data: bytes) -> None:
    """Writes a file under a temporary name and renames it once all bytes have arrived. Leaves nothing if it fails."""
    temporary = path if filesystem.type_name in ATOMIC_STORES else path + PART_SUFFIX
    filesystem.create_dir(posixpath.dirname(path), recursive=True)
    if filesystem.type_name == "local" and os.path.islink(temporary):
        os.unlink(temporary)  # never write where it leads
    try:
        with filesystem.open_output_stream(temporary) as stream:
            stream.write(data)
        check_size(filesystem, temporary, len(data))
        if temporary != path:
            replace_file(filesystem, temporary, path)
    except BaseException:
        if temporary != path:
            with contextlib.suppress(Exception):
                filesystem.delete_file(temporary)
        raise


def check_size(filesystem: Any, path: str, expected: int) -> None:
    """Raises OSError if storage silently took fewer bytes than it was given."""
    size = filesystem.get_file_info(path).size
    if size is not None and size != expected:
        raise OSError(f"{size} of {expected} bytes have arrived")


def replace_file(filesystem: Any, temporary: str, path: str) -> None:
    """Renames a complete file, replacing an existing one."""
    try:
        filesystem.move(temporary, path)
    except Exception as error:
        # HDFS and others refuse to replace, so the old file goes first.
        refuses = isinstance(error, FileExistsError) or filesystem.type_name == "hdfs"
        if not refuses or filesystem.get_file_info(path).type != pafs.FileType.File:
            raise
        filesystem.delete_file(path)
        filesystem.move(temporary, path)


def read_file(filesystem: Any, path: str, limit: int | None) -> bytes:
    """Reads a regular file of at most `limit` bytes."""
    info = filesystem.get_file_info(path)
    if info.type == pafs.FileType.Directory:
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if info.type == pafs.FileType.Unknown:  # a pipe would never end
        raise IsADirectoryError(errno.EISDIR, "it isn't a regular file")
    if limit is not None and info.size is not None and info.size > limit:
        raise ValueError(f"it has {info.size} bytes where at most {limit} are expected")
    with filesystem.open_input_stream(path) as stream:
        return bytes(stream.readall())


def read_range(filesystem: Any, path: str, start: int, length: int) -> bytes:
    """Reads a part of a regular file: less than `length` bytes if it ends before."""
    with filesystem.open_input_file(path) as file:
        file.seek(start)
        return bytes(file.read(length))


def delete_path(filesystem: Any, path: str) -> None:
    """Removes a file, a link (never its target) or a folder with its contents. Does nothing if the path doesn't exist."""
    if filesystem.type_name == "local" and os.path.islink(path):
        os.unlink(path)
        return
    kind = filesystem.get_file_info(path).type
    if kind == pafs.FileType.NotFound:
        return
    try:
        (filesystem.delete_dir if kind == pafs.FileType.Directory else filesystem.delete_file)(path)
    except FileNotFoundError as error:  # another process removes it at the same time
        if filesystem.get_file_info(path).type != pafs.FileType.NotFound:
            raise OSError(errno.EBUSY, "others remove parts of it at the same time") from error


class Append:
    """Appends to a local file that has no other writer. Before it is repeated, it truncates what a failed attempt added."""

    def __init__(self, filesystem: Any, path: str, data: bytes) -> None:
        self._filesystem, self._path, self._data = filesystem, path, data
        self._size_before: int | None = None

    def __call__(self) -> None:
        """Makes one attempt."""
        before = self.undo()
        self._size_before = before
        with self._filesystem.open_append_stream(self._path) as stream:
            stream.write(self._data)
        check_size(self._filesystem, self._path, before + len(self._data))

    def undo(self) -> int:
        """Truncates what was added. Returns the file's size in bytes."""
        size = int(self._filesystem.get_file_info(self._path).size or 0)
        if self._size_before is None or size <= self._size_before:
            return size
        os.truncate(self._path, self._size_before)
        return self._size_before

"""A run's directory. Files appear complete or not at all, and operations are repeated while storage fails."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import posixpath
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.fs as pafs

from lte_ray.errors import StorageError
from lte_ray.job_folder import job_folder
from lte_ray.redaction import redact, without_credentials
from lte_ray.storage import filesystem as fs
from lte_ray.storage.ownership import LEASE, check_held, check_owner
from lte_ray.storage.retry import DEFAULT_PATIENCE, retry, run_once

T = TypeVar("T")

RUN = "run.toml"
"""The first file that a run writes: all its settings."""

MODEL = "model.safetensors"
EMA_MODEL = "model-ema.safetensors"
"""The merged weights of a finished run."""

FILES = "files"
"""Folder with what the worker adds to its model, such as a tokenizer."""

PROBE = ".writable"
"""A file that is written and removed, to find out whether the directory is writable."""


@dataclass(frozen=True)
class RunDirectory:
    """``STORAGE/NAME``. Paths in its methods are relative to it. It can be sent to other processes.

    Every method raises StorageError if storage fails: at once if that is permanent (not found, not permitted), else after
    retries for `patience` seconds. It also does so if a path would lead out of the directory.

    Attributes:
        owner: who may write there, if there is a lease (`storage.lease`). If another has it, methods that write raise
            StorageError, and in the driver LeaseLost.
    """

    filesystem: Any
    path: str
    uri: str | None = None
    patience: float = DEFAULT_PATIENCE
    owner: str = ""

    @classmethod
    def open(cls, storage: str, name: str, filesystem: Any = None, *, patience: float = DEFAULT_PATIENCE) -> RunDirectory:
        """Returns the directory of run `name` in a local folder, at a URI (s3://, gs://, ...), or in a path of `filesystem`.

        Raises:
            StorageError: no library here can open such a URI.
        """
        try:
            opening = f"opening {without_credentials(storage)}"
            root = storage
            if filesystem is None:
                filesystem, root = run_once(lambda: fs.open_filesystem(storage), opening)
        except Exception as error:
            message = f"--storage is {storage!r}, which can't be opened: {type(error).__name__}: {str(error).rstrip('.')}."
            raise StorageError(redact(message, storage) + fs.credentials_advice(storage)) from error
        place, mark, query = without_credentials(storage).partition("?")
        uri = f"{place.rstrip('/')}/{name}{mark}{query}" if "://" in storage else None
        return cls(filesystem, posixpath.join(root, name), uri, patience)

    @property
    def is_local(self) -> bool:
        return bool(self.filesystem.type_name == "local")

    def check_lease(self) -> None:
        """Raises LeaseLost if this process is the run's driver and knows that another has taken it over. Never waits."""
        check_held(self.owner)

    @property
    def display(self) -> str:
        """The path or URI as users write it, without credentials."""
        return self.uri or without_credentials(self.path)

    def path_to(self, relative: str) -> str:
        """The path of a file or folder in the directory. Raises StorageError if it would be outside."""
        if not relative:
            return self.path
        fs.check_inside(relative)
        return posixpath.join(self.path, relative)

    def create(self, *, exclusive: bool = False) -> None:
        """Creates the folder and checks that files can be written there.

        Raises:
            StorageError: they can't, or, if `exclusive`, the folder exists. If two processes create it at once on a local
                disk, one of them fails.
        """
        try:
            self._make(posixpath.dirname(self.path))
            if exclusive and self.exists() and set(self.list_names()) != {LEASE}:
                raise FileExistsError("another run has just taken this name.")
            if exclusive and self.is_local:
                Path(self.path).mkdir()
            self._make(self.path)
            self.write(PROBE, b"")
            self.delete(PROBE)
        except (OSError, StorageError) as error:
            raise self.unwritable(error) from error

    def check_lasting(self) -> None:
        """Raises StorageError if it is in the folder of a job of Ray, which Ray removes after the job."""
        if self.is_local and job_folder(self.path) is not None:
            raise StorageError(
                f"--storage is {posixpath.dirname(self.path)}, in the folder of this job, which Ray removes after the job. "
                "Relative paths lead there. Give a URI such as s3://bucket/runs, or the absolute path of a disk that all nodes "
                "share."
            )

    def unwritable(self, why: Exception) -> StorageError:
        """The error for a run that can't write into its directory at all."""
        return StorageError(
            f"The run directory {self.display} can't be written: {str(why).rstrip('.')}. Give another place with --storage, or "
            "correct its permissions."
        )

    def write(self, relative: str, data: bytes) -> None:
        """Writes a file, completely or not at all, and creates its folders. Raises StorageError if that fails."""
        path = self.path_to(relative)
        self._retry_write(lambda: fs.write_file(self.filesystem, path, data), "writing", "written", path)

    def append(self, relative: str, data: bytes) -> None:
        """Appends to a file that has no other writer, once or not at all. Elsewhere than on a local disk rewrites the file."""
        path = self.path_to(relative)
        if not self.is_local:
            self.write(relative, (self.read(relative) if self.exists(relative) else b"") + data)
            return
        append = fs.Append(self.filesystem, path, data)
        try:
            self._retry_write(append, "adding to", "written", path)
        except StorageError:
            with contextlib.suppress(OSError):
                append.undo()
            raise

    def read(self, relative: str, limit: int | None = None) -> bytes:
        """Reads a file.

        Raises:
            StorageError: it doesn't exist, isn't a file, can't be read, or has more than `limit` bytes. The cause is the
                filesystem's own error.
        """
        path = self.path_to(relative)
        return self._retry(lambda: fs.read_file(self.filesystem, path, limit), "reading", "read", path)

    def read_range(self, relative: str, start: int, length: int) -> bytes:
        """Reads `length` bytes of a file from `start` on, or up to its end. Raises StorageError as `read`."""
        path = self.path_to(relative)
        return self._retry(lambda: fs.read_range(self.filesystem, path, start, length), "reading", "read", path)

    def exists(self, relative: str = "") -> bool:
        """Whether a file or folder of this name exists."""
        return bool(self._info(self.path_to(relative)).type != pafs.FileType.NotFound)

    def size(self, relative: str) -> int | None:
        """The size of a file in bytes, or None if there is no such file."""
        info = self._info(self.path_to(relative))
        return info.size if info.type == pafs.FileType.File else None

    def modified_at(self, relative: str) -> float | None:
        """When a file was written last (Unix time), or None if there is no such file or storage doesn't tell."""
        info = self._info(self.path_to(relative))
        return info.mtime_ns / 1e9 if info.type == pafs.FileType.File and info.mtime_ns else None

    def is_link(self, relative: str) -> bool:
        """Whether the path is a symbolic link. Only local disks have them."""
        return self.is_local and os.path.islink(self.path_to(relative))

    def list_names(self, relative: str = "") -> list[str]:
        """The names in a folder, sorted; none if it doesn't exist."""
        return sorted(info.base_name for info in self._entries(relative))

    def list_sizes(self, relative: str = "") -> dict[str, int]:
        """The files in a folder, and their sizes in bytes; none if it doesn't exist."""
        return {info.base_name: info.size or 0 for info in self._entries(relative) if info.type == pafs.FileType.File}

    def delete(self, relative: str = "") -> None:
        """Removes a file, a link, or a folder with its contents. Does nothing if it doesn't exist."""
        path = self.path_to(relative)
        self._retry_write(lambda: fs.delete_path(self.filesystem, path), "removing", "removed", path)

    def _retry(self, attempt: Callable[[], T], doing: str, done: str, path: str) -> T:
        shown = without_credentials(path)
        return retry(attempt, f"{doing} {shown}", f"{shown} can't be {done}", self.patience)

    def _retry_write(self, attempt: Callable[[], T], doing: str, done: str, path: str) -> T:
        def checked() -> T:
            if self.owner:
                check_owner(dataclasses.replace(self, patience=0.0), self.owner)
            return attempt()

        return self._retry(checked, doing, done, path)

    def _info(self, path: str) -> Any:
        return self._retry(lambda: self.filesystem.get_file_info(path), "looking for", "looked for", path)

    def _entries(self, relative: str) -> list[Any]:
        path = self.path_to(relative)
        selector = pafs.FileSelector(path, allow_not_found=True)
        entries: list[Any] = self._retry(lambda: self.filesystem.get_file_info(selector), "listing", "listed", path)
        return entries

    def _make(self, path: str) -> None:
        self._retry(lambda: self.filesystem.create_dir(path, recursive=True), "making", "made", path)

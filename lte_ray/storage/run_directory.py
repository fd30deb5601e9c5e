"""A run's folder. Files appear whole or not at all; what fails for a while is tried again."""

from __future__ import annotations

import contextlib
import os
import posixpath
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.fs as pafs

from lte_ray.errors import StorageError
from lte_ray.redaction import redact, without_credentials
from lte_ray.storage import filesystem
from lte_ray.storage.filesystem import advice, check_inside, open_place
from lte_ray.storage.retry import PATIENCE, retry, run_once

T = TypeVar("T")

RUN = "run.toml"
"""The first file of a run: all its settings."""

PROBE = ".writable"
"""A file that is written and removed, to see whether one can be."""


@dataclass(frozen=True)
class RunDirectory:
    """``STORAGE/NAME``: all paths in its methods are relative to it. It can be sent to other processes.

    Every method raises StorageError if storage refuses, at once if that can't change (not found, not permitted), else after
    trying again for `patience` seconds; and if a path would lead out of the directory.
    """

    filesystem: Any
    path: str
    uri: str | None = None
    patience: float = PATIENCE

    @classmethod
    def open(cls, storage: str, name: str, filesystem: Any = None, *, patience: float = PATIENCE) -> RunDirectory:
        """The directory of run `name` under a local folder, a URI (s3://, gs://, ...), or a path of `filesystem`.

        Raises:
            StorageError: nothing here can open such a URI.
        """
        try:
            opening = f"opening {without_credentials(storage)}"
            filesystem, root = run_once(lambda: open_place(storage), opening) if filesystem is None else (filesystem, storage)
        except Exception as error:
            said = f"--storage is {storage!r}, which can't be opened: {type(error).__name__}: {str(error).rstrip('.')}."
            raise StorageError(redact(said, storage) + advice(storage)) from error
        place, mark, query = without_credentials(storage).partition("?")
        uri = f"{place.rstrip('/')}/{name}{mark}{query}" if "://" in storage else None
        return cls(filesystem, posixpath.join(root, name), uri, patience)

    @property
    def is_local(self) -> bool:
        return bool(self.filesystem.type_name == "local")

    @property
    def display(self) -> str:
        """The path as users write it, without credentials."""
        return self.uri or without_credentials(self.path)

    def path_to(self, relative: str) -> str:
        """The path of something in the directory. Raises StorageError if it would be outside."""
        if not relative:
            return self.path
        check_inside(relative)
        return posixpath.join(self.path, relative)

    def create(self, *, exclusive: bool = False) -> None:
        """Makes the folder and proves that files can be written into it.

        Raises:
            StorageError: they can't; or, if `exclusive`, it was there. Of two that make it at once on a local disk, one fails.
        """
        try:
            self._make(posixpath.dirname(self.path))
            if exclusive and self.exists():
                raise FileExistsError("another run has just taken this name.")
            if exclusive and self.is_local:
                Path(self.path).mkdir()
            self._make(self.path)
            self.write(PROBE, b"")
            self.delete(PROBE)
        except (OSError, StorageError) as error:
            raise self.unwritable(error) from error

    def unwritable(self, why: Exception) -> StorageError:
        """The error of a run that can't write into its directory at all."""
        return StorageError(
            f"The run directory {self.display} can't be written: {str(why).rstrip('.')}. Give another place with --storage, or "
            "correct its permissions."
        )

    def write(self, relative: str, data: bytes) -> None:
        """Writes a file, whole or not at all; folders are made as needed. Raises StorageError if it can't be written."""
        path = self.path_to(relative)
        self._persist(lambda: filesystem.write(self.filesystem, path, data), "writing", "written", path)

    def append(self, relative: str, data: bytes) -> None:
        """Adds to the end of a file that nobody else writes, once or not at all; elsewhere than locally by writing it anew."""
        path = self.path_to(relative)
        if not self.is_local:
            self.write(relative, (self.read(relative) if self.exists(relative) else b"") + data)
            return
        adding = filesystem.Append(self.filesystem, path, data)
        try:
            self._persist(adding, "adding to", "written", path)
        except StorageError:
            with contextlib.suppress(OSError):
                adding.undo()
            raise

    def read(self, relative: str, limit: int | None = None) -> bytes:
        """A file's bytes.

        Raises:
            StorageError: it isn't there, isn't a file, can't be read, or has more than `limit` bytes. The cause is the
                filesystem's own error.
        """
        path = self.path_to(relative)
        return self._persist(lambda: filesystem.read(self.filesystem, path, limit), "reading", "read", path)

    def exists(self, relative: str = "") -> bool:
        """Whether there is a file or folder of this name."""
        return bool(self._info(self.path_to(relative)).type != pafs.FileType.NotFound)

    def size(self, relative: str) -> int | None:
        """Bytes of a file; None if there is no such file."""
        info = self._info(self.path_to(relative))
        return info.size if info.type == pafs.FileType.File else None

    def is_link(self, relative: str) -> bool:
        """Whether it is a link to somewhere else, which only local disks have."""
        return self.is_local and os.path.islink(self.path_to(relative))

    def list_names(self, relative: str = "") -> list[str]:
        """Names in a folder, sorted; none if it isn't there."""
        path = self.path_to(relative)
        selector = pafs.FileSelector(path, allow_not_found=True)
        found = self._persist(lambda: self.filesystem.get_file_info(selector), "listing", "listed", path)
        return sorted(info.base_name for info in found)

    def delete(self, relative: str = "") -> None:
        """Removes a file, a link, or a folder with all that is in it, or does nothing."""
        path = self.path_to(relative)
        self._persist(lambda: filesystem.delete(self.filesystem, path), "removing", "removed", path)

    # -- single tries ------------------------------------------------------------------------------------------------

    def _persist(self, attempt: Callable[[], T], doing: str, done: str, path: str) -> T:
        shown = without_credentials(path)
        return retry(attempt, f"{doing} {shown}", f"{shown} can't be {done}", self.patience)

    def _info(self, path: str) -> Any:
        return self._persist(lambda: self.filesystem.get_file_info(path), "looking for", "looked for", path)

    def _make(self, path: str) -> None:
        self._persist(lambda: self.filesystem.create_dir(path, recursive=True), "making", "made", path)

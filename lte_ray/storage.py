"""A run's folder, on any filesystem that pyarrow or fsspec knows. Files appear whole or not at all."""

from __future__ import annotations

import contextlib
import posixpath
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from lte_ray.errors import StorageError

PART = ".part"
RUN = "run.toml"
"""The first file of a run: all its settings."""


@dataclass(frozen=True)
class RunDirectory:
    """``STORAGE/NAME``: all paths in its methods are relative to it. It can be sent to other processes."""

    filesystem: Any
    path: str
    uri: str | None = None

    @classmethod
    def of(cls, storage: str, name: str, filesystem: Any = None) -> RunDirectory:
        """The directory of run `name` under a local folder, a URI (s3://, gs://, ...), or a path of `filesystem`.

        Raises:
            StorageError: nothing here can open such a URI.
        """
        try:
            filesystem, root = _open(storage) if filesystem is None else (filesystem, storage)
        except Exception as error:
            raise StorageError(f"--storage is {storage!r}, which can't be opened: {type(error).__name__}: {error}") from error
        uri = f"{storage.rstrip('/')}/{name}" if "://" in storage else None
        return cls(filesystem, posixpath.join(root, name), uri)

    @property
    def is_local(self) -> bool:
        return bool(self.filesystem.type_name == "local")

    @property
    def display(self) -> str:
        """The path as users write it."""
        return self.uri or self.path

    def at(self, relative: str) -> str:
        return posixpath.join(self.path, relative) if relative else self.path

    def create(self, *, exclusive: bool = False) -> None:
        """Makes the folder and proves that files can be written into it.

        Raises:
            StorageError: they can't; or, if `exclusive`, it was there. Of two that make it at once on a local disk, one fails.
        """
        try:
            self.filesystem.create_dir(posixpath.dirname(self.path), recursive=True)
            if exclusive and self.exists():
                raise FileExistsError("another run has just taken this name.")
            if exclusive and self.is_local:
                Path(self.path).mkdir()
            self.filesystem.create_dir(self.path, recursive=True)
            self.write(".writable", b"")
            self.delete(".writable")
        except (OSError, StorageError) as error:
            raise StorageError(
                f"The run directory {self.display} can't be written: {error} Give another place with --storage, or correct "
                "its permissions."
            ) from error

    def write(self, relative: str, data: bytes) -> None:
        """Writes a file, whole or not at all; folders are made as needed.

        Raises:
            StorageError: it can't be written.
        """
        path = self.at(relative)
        # Object stores show a file only when it is complete; other filesystems get a rename.
        first = path + PART if self.is_local else path
        try:
            self.filesystem.create_dir(posixpath.dirname(path), recursive=True)
            try:
                with self.filesystem.open_output_stream(first) as stream:
                    stream.write(data)
                if first != path:
                    self.filesystem.move(first, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    self.filesystem.delete_file(first)
                raise
        except OSError as error:
            raise StorageError(f"{path} can't be written: {error}.") from error

    def append(self, relative: str, data: bytes) -> None:
        """Adds to the end of a file; on object stores by writing it anew."""
        if self.is_local:
            try:
                with self.filesystem.open_append_stream(self.at(relative)) as stream:
                    stream.write(data)
            except OSError as error:
                raise StorageError(f"{self.at(relative)} can't be written: {error}.") from error
        else:
            self.write(relative, (self.read(relative) if self.exists(relative) else b"") + data)

    def read(self, relative: str) -> bytes:
        """A file's bytes.

        Raises:
            StorageError: it isn't there or can't be read.
        """
        try:
            with self.filesystem.open_input_stream(self.at(relative)) as stream:
                return bytes(stream.readall())
        except OSError as error:
            raise StorageError(f"{self.at(relative)} can't be read: {error}.") from error

    def exists(self, relative: str = "") -> bool:
        """Whether there is a file or folder of this name."""
        return bool(self.filesystem.get_file_info(self.at(relative)).type != pafs.FileType.NotFound)

    def names(self, relative: str = "") -> list[str]:
        """Names in a folder, sorted; none if it isn't there."""
        selector = pafs.FileSelector(self.at(relative), allow_not_found=True)
        return sorted(info.base_name for info in self.filesystem.get_file_info(selector))

    def delete(self, relative: str = "") -> None:
        """Removes a file, or a folder with all that is in it, or does nothing."""
        kind = self.filesystem.get_file_info(self.at(relative)).type
        if kind == pafs.FileType.Directory:
            self.filesystem.delete_dir(self.at(relative))
        elif kind == pafs.FileType.File:
            self.filesystem.delete_file(self.at(relative))


def _open(storage: str) -> tuple[Any, str]:
    if "://" not in storage:
        return pafs.LocalFileSystem(), str(Path(storage).expanduser().absolute())
    try:
        filesystem, path = pafs.FileSystem.from_uri(storage)
    except pa.ArrowInvalid:  # a scheme of fsspec's
        import fsspec

        other, path = fsspec.core.url_to_fs(storage)
        filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(other))
    return filesystem, path

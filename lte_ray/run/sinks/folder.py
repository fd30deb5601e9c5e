"""The folder of a sink that writes files. Its libraries know local folders only, so other storage gets copies."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from lte_ray.storage import RunDirectory

COPY_INTERVAL = 60.0
"""Seconds between two copies of changed files to storage that isn't a local disk."""


class SinkFolder:
    """``RUN/NAME`` if the run directory is on a local disk, else a temporary folder that is copied there.

    Attributes:
        path: the local folder.
    """

    def __init__(self, directory: RunDirectory, name: str) -> None:
        self._directory, self._name = directory, name
        self._temporary = None if directory.is_local else Path(tempfile.mkdtemp(prefix="lte-ray-"))
        self.path = Path(directory.path_to(name)) if self._temporary is None else self._temporary / name
        self._copied: dict[str, tuple[int, int]] = {}  # by file: its size and time of change when it was copied
        self._copied_at = time.monotonic()

    def open(self) -> None:
        """Makes the folder, with the files of earlier starts of the run. Raises StorageError or OSError if that fails."""
        self.path.mkdir(parents=True, exist_ok=True)
        if self._temporary is not None:
            self._fetch("")
            self._copied = dict(self._files())

    def copy(self, *, now: bool = False) -> None:
        """Copies files that have changed, at intervals or `now`. Raises StorageError or OSError if that fails."""
        if self._temporary is None or (not now and time.monotonic() - self._copied_at < COPY_INTERVAL):
            return
        self._copied_at = time.monotonic()
        for file, stamp in self._files():
            if self._copied.get(file) != stamp:
                self._directory.write(f"{self._name}/{file}", (self.path / file).read_bytes())
                self._copied[file] = stamp

    def close(self) -> None:
        """Copies what has changed and removes the temporary folder, or an empty one. Raises as `copy`."""
        try:
            self.copy(now=True)
        finally:
            if self._temporary is not None:
                shutil.rmtree(self._temporary, ignore_errors=True)
            elif self.path.is_dir() and not any(self.path.iterdir()):
                self.path.rmdir()

    def _files(self) -> list[tuple[str, tuple[int, int]]]:
        files = [path for path in sorted(self.path.rglob("*")) if path.is_file() and not path.is_symlink()]
        stamps = [path.stat() for path in files]
        return [
            (path.relative_to(self.path).as_posix(), (stamp.st_size, stamp.st_mtime_ns))
            for path, stamp in zip(files, stamps, strict=True)
        ]

    def _fetch(self, inside: str) -> None:
        for entry in self._directory.list_names(f"{self._name}/{inside}".rstrip("/")):
            relative = f"{inside}{entry}"
            if self._directory.size(f"{self._name}/{relative}") is None:
                self._fetch(f"{relative}/")
            else:
                target = self.path / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(self._directory.read(f"{self._name}/{relative}"))

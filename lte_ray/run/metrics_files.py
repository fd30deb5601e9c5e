"""Where the rows of a run are: in ``metrics.jsonl``, on object stores also in ``metrics-000001.jsonl`` and so on, its segments.

An object can't be appended to. So there the newest segment is written again with the rows that were added, until it has
`SEGMENT_BYTES`; then the next one begins. The rows of a run are those of ``metrics.jsonl``, if there is one, then those of all
segments by their numbers. Each row is in one of them, whatever dies in between, since a segment appears complete or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol

from lte_ray.storage import RunDirectory

METRICS = "metrics.jsonl"

SEGMENT = re.compile(r"metrics-(\d{6,12})\.jsonl")

SEGMENT_BYTES = 2**18
"""Size from which on a segment isn't added to."""


def segment_name(number: int) -> str:
    """Name of a segment; the first has the number 1."""
    return f"metrics-{number:06d}.jsonl"


def list_files(directory: RunDirectory) -> dict[str, int]:
    """The files with a run's rows, in the order of the rows, with their sizes in bytes.

    Raises:
        StorageError: the directory can't be listed.
    """
    sizes = directory.list_sizes()
    segments = sorted((int(match[1]), name) for name in sizes if (match := SEGMENT.fullmatch(name)))
    return {name: sizes[name] for name in (METRICS, *(name for _, name in segments)) if name in sizes}


class Lines(Protocol):
    """What lines are read from: `MetricsReader` or `RunFile`."""

    def size(self) -> int | None:
        """Bytes, or None if there is nothing. Raises StorageError if storage fails."""

    def read_range(self, start: int, length: int) -> bytes:
        """Reads `length` bytes from `start` on, or up to the end. Raises StorageError if storage fails."""


class MetricsReader:
    """A run's rows as one file, whatever files they are in."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._files: dict[str, int] = {}

    def size(self) -> int | None:
        """The bytes of all files, looked up now; None if there is none. Raises StorageError if they can't be listed."""
        self._files = list_files(self._directory)
        return sum(self._files.values()) if self._files else None

    def read_range(self, start: int, length: int) -> bytes:
        """Reads `length` bytes from `start` on, or up to the end that `size` has returned last."""
        parts = []
        for name, size in self._files.items():
            if start < size and length > 0:
                part = self._directory.read_range(name, start, min(length, size - start))
                parts.append(part)
                length -= len(part)
            start = max(0, start - size)
        return b"".join(parts)

    def read(self) -> bytes:
        """Reads all rows; nothing if there is no file."""
        return b"".join(self._directory.read(name) for name in list_files(self._directory))


class MetricsWriter:
    """Adds rows to a run, and removes some when it goes back. One process does that at a time.

    Each method may be repeated after it has failed, and then does what is left to do.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._name = ""  # of the file that is added to
        self._content = b""  # what it has, unless it is on a local disk

    def append(self, rows: bytes) -> None:
        """Adds complete lines. On a local disk they are appended to the last file, elsewhere written with the last segment."""
        self._name = self._name or self._find_last()
        if self._directory.is_local:
            self._directory.append(self._name, rows)
            return
        name, content = self._name, self._content
        if len(content) >= SEGMENT_BYTES:
            name, content = _next_name(name), b""
        self._directory.write(name, content + rows)
        self._name, self._content = name, content + rows

    def remove(self, survives: Callable[[bytes], bool], is_merge: Callable[[bytes], bool]) -> None:
        """Removes rows, which are the last ones, except for some that stay between them.

        Args:
            survives: whether a row stays.
            is_merge: whether a row is a merge. A file with merges, from which nothing is removed, ends the search.
        """
        for name in reversed(list_files(self._directory)):
            # If a write has failed, what storage has may be more than what counts: the same rows will be added again.
            known = name == self._name and not self._directory.is_local
            rows = (self._content if known else self._directory.read(name)).splitlines(keepends=True)
            kept = [row for row in rows if survives(row)]
            if len(kept) < len(rows):
                self._directory.write(name, b"".join(kept))
                if known:
                    self._content = b"".join(kept)
            elif any(map(is_merge, rows)):
                return

    def _find_last(self) -> str:
        last = next(reversed(list_files(self._directory)), METRICS)
        if self._directory.is_local:
            return last
        if last == METRICS:
            return segment_name(1)
        self._content = self._directory.read(last)
        return last


def _next_name(name: str) -> str:
    match = SEGMENT.fullmatch(name)
    assert match is not None
    return segment_name(int(match[1]) + 1)


class RunFile:
    """The lines of one file of a run."""

    def __init__(self, directory: RunDirectory, name: str) -> None:
        self._directory, self._name = directory, name

    def size(self) -> int | None:
        """Its size in bytes, or None if there is no such file."""
        return self._directory.size(self._name)

    def read_range(self, start: int, length: int) -> bytes:
        """Reads `length` bytes from `start` on, or up to its end."""
        return self._directory.read_range(self._name, start, length)

"""Reads files of lines that a run adds to, while it goes on: from the newest line back, or what is new since the last time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

from lte_ray.run.metrics import KIND_BYTES, Row
from lte_ray.run.metrics_files import Lines

BLOCK = 2**20
"""Bytes that are read at a time."""

MARK = 256
"""Bytes before the place up to which a file was read. If they have changed, the file was rewritten."""


def read_lines_back(source: Lines, limit: int) -> Iterator[bytes]:
    """Yields lines from the last to the first, without their ends; none if there is no file.

    Args:
        limit: bytes of the end that are read at most. What is before them is left out.

    Raises:
        StorageError: the file can't be read.
    """
    end = source.size() or 0
    first, rest = max(0, end - limit), b""
    while end > first:
        start = max(first, end - BLOCK)
        rest, *lines = (source.read_range(start, end - start) + rest).split(b"\n")
        yield from (line for line in reversed(lines) if line)
        end = start
    if first == 0 and rest:
        yield rest


def read_lines(source: Lines) -> Iterator[bytes]:
    """Yields lines in their order, without their ends; none if there is no file.

    Raises:
        StorageError: the file can't be read.
    """
    size, rest = source.size() or 0, b""
    for start in range(0, size, BLOCK):
        *lines, rest = (rest + source.read_range(start, min(BLOCK, size - start))).split(b"\n")
        yield from (line for line in lines if line)
    if rest:
        yield rest


def parse_row(line: bytes) -> Row | None:
    """Returns the row of a line of ``metrics.jsonl``, or None if it isn't one, such as a torn one."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("kind"), str) else None


def is_event(line: bytes) -> bool:
    """Whether a line of ``metrics.jsonl`` may be the row of an event, judged by its begin."""
    return b'"event"' in line[:KIND_BYTES]


class LineFollower:
    """Returns the lines of a file that have come since the last time, also if the file was rewritten in the meantime.

    A resumed run rewrites ``metrics.jsonl`` without the merges that it makes again. Its events stay, in their order.

    Args:
        source: of the lines.
        keep: which lines count. When a file is rewritten, these must stay, in their order.
    """

    def __init__(self, source: Lines, keep: Callable[[bytes], bool] = bool) -> None:
        self._source, self._keep = source, keep
        self._offset, self._mark, self._count = 0, b"", 0

    def poll(self) -> list[bytes]:
        """Returns the new lines, without their ends. A last line that isn't complete comes the next time.

        Raises:
            StorageError: the file can't be read.
        """
        size, known = self._source.size() or 0, 0
        if size < self._offset or (self._offset and not self._is_same()):
            known, self._offset, self._mark, self._count = self._count, 0, b"", 0
        lines: list[bytes] = []
        while self._offset < size:
            data = self._source.read_range(self._offset, max(BLOCK, size - self._offset))
            complete = data[: data.rfind(b"\n") + 1]
            if not complete:
                break
            self._offset, self._mark = self._offset + len(complete), (self._mark + complete)[-MARK:]
            lines += [line for line in complete.split(b"\n")[:-1] if self._keep(line)]
        self._count += len(lines)
        return lines[known:]

    def _is_same(self) -> bool:
        start = self._offset - len(self._mark)
        return self._source.read_range(start, len(self._mark)) == self._mark

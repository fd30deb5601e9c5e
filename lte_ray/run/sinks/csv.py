"""A table for spreadsheets and pandas: ``metrics.csv`` in the run directory."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lte_ray.run.sinks.protocol import LogRow, RunInfo, Status

FIRST = ("at", "kind", "version", "step", "samples")
"""The first columns; those of figures follow."""


class CsvSink:
    """Writes a line for each merge and evaluation, and a column for each figure. Figures that a row lacks are empty."""

    def open(self, run: RunInfo) -> None:
        self._file = run.folder / "metrics.csv"
        self._columns = list(FIRST)
        rows = self._read()
        for row in rows:  # also those of earlier files
            self._columns += [name for name in row if name not in self._columns]
        self._write(row for row in rows if run.resumed and int(row["version"]) <= run.version)

    def row(self, row: LogRow) -> None:
        if row.kind == "rewind":
            self._write(each for each in self._read() if int(each["version"]) <= row.version)
        if not row.figures:
            return
        values = {"at": row.at, "kind": row.kind, "version": row.version, "step": row.step, "samples": row.samples}
        new = [name for name in row.figures if name not in self._columns]
        if new:
            rows = self._read()
            self._columns += new
            self._write(rows)
        self._append([{**values, **row.figures}])

    def close(self, status: Status) -> None: ...

    def _read(self) -> list[dict[str, str]]:
        if not self._file.exists():
            return []
        with self._file.open(newline="") as file:
            return [row for row in csv.DictReader(file) if None not in row and row["version"]]

    def _write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        kept = list(rows)
        part = Path(f"{self._file}.part")
        with part.open("w", newline="") as file:
            csv.writer(file).writerow(self._columns)
        part.replace(self._file)
        self._append(kept)

    def _append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        with self._file.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerows(rows)

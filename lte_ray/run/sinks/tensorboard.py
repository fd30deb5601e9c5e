"""TensorBoard: event files in the run directory, written by tensorboardX, which comes with Ray Train."""

from __future__ import annotations

import time
from typing import Any

from lte_ray.run.sinks.protocol import LogRow, RunInfo, Status

FLUSH_INTERVAL = 10
"""Seconds after which figures are in the file, at most."""


class TensorBoardSink:
    """Writes figures as scalars, and events and settings as text."""

    def open(self, run: RunInfo) -> None:
        """Starts an event file. TensorBoard forgets what earlier files have after the step that a run resumes from."""
        self._folder = str(run.folder)
        self._start_file(run.step + 1 if run.resumed else 0)
        self._writer.add_text("settings", _table(run.config), run.step)
        self._writer.add_text("environment", _table(run.environment), run.step)
        self._writer.flush()

    def row(self, row: LogRow) -> None:
        if row.kind == "rewind":
            self._writer.close()
            self._start_file(row.step + 1)
        elif row.kind == "event":
            self._writer.add_text("events", row.text, row.step, row.at)
        if row.figures:  # as one entry: add_scalar would write one for each figure, which costs several times as much
            values = [self._summary.Value(tag=name, simple_value=value) for name, value in row.figures.items()]
            self._writer.file_writer.add_summary(self._summary(value=values), row.step, row.at)

    def close(self, status: Status) -> None:
        self._writer.close()

    def _start_file(self, purge_step: int) -> None:
        from tensorboardX import SummaryWriter
        from tensorboardX.proto.summary_pb2 import Summary

        self._summary: Any = Summary
        # The name of a file has only the second, and a second file of that name would replace the first.
        suffix = f".{time.time_ns()}"
        self._writer: Any = SummaryWriter(
            self._folder, purge_step=purge_step, flush_secs=FLUSH_INTERVAL, filename_suffix=suffix
        )


def _table(values: Any) -> str:
    """Settings as a Markdown table, which TensorBoard shows."""
    rows = [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in _flatten("", values)]
    return "\n".join(["| name | value |", "|---|---|", *rows])


def _flatten(prefix: str, values: Any) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in values.items():
        pairs += _flatten(f"{prefix}{name}.", value) if isinstance(value, dict) and value else [(f"{prefix}{name}", value)]
    return pairs

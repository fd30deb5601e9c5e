"""Figures of a run as Prometheus gauges, through the metrics that each node of Ray exports."""

from __future__ import annotations

from typing import Any

from ray.util.metrics import Counter, Gauge

from lte_ray.run.sinks.protocol import LogRow, RunInfo, Status

PREFIX = "lte_"
"""Ray adds its own prefix: Prometheus has ``ray_lte_step``."""


GAUGES = {
    "step": "Local steps: the furthest of the merged heads.",
    "version": "Newest version of the base.",
    "samples": "Samples that all heads have trained, together.",
    "heads": "Heads in the last merge.",
    "train_loss": "Mean training loss of the merged heads.",
    "samples_per_second": "Samples per second of all heads.",
    "tokens_per_second": "Tokens per second of all heads.",
    "mfu": "Model FLOPs utilization.",
    "running": "1 while the run goes on, else 0.",
}
"""The gauges with their descriptions."""

FIGURES = {
    "train_loss": "train/loss",
    "samples_per_second": "speed/samples_per_second",
    "tokens_per_second": "speed/tokens_per_second",
    "mfu": "speed/mfu",
}
"""Gauges of figures that a merge may have."""


class PrometheusSink:
    """Sets gauges of the newest figures, tagged with the run's name and its path, since runs in two folders may have one name,
    and counts events."""

    def open(self, run: RunInfo) -> None:
        self._gauges: dict[str, Any] = {name: Gauge(PREFIX + name, text, ("run", "path")) for name, text in GAUGES.items()}
        self._evaluation: Any = Gauge(f"{PREFIX}evaluation", "Figures of the last evaluation.", ("run", "path", "figure"))
        self._events: Any = Counter(f"{PREFIX}events", "Events, such as restarts of processes.", ("run", "path", "event"))
        self._tags = {"run": run.name, "path": run.path}
        self._set("running", 1)

    def row(self, row: LogRow) -> None:
        if row.kind == "event":
            self._events.inc(1, {**self._tags, "event": str(row.raw["event"])})
        elif row.kind == "evaluation":
            for name, value in row.figures.items():
                if name.startswith("eval/"):
                    self._evaluation.set(value, {**self._tags, "figure": name.removeprefix("eval/")})
        elif row.kind == "merge":
            self._set("step", row.step)
            self._set("version", row.version)
            self._set("samples", row.samples)
            self._set("heads", len(row.raw["heads"]))
            for name, figure in FIGURES.items():
                if figure in row.figures:
                    self._set(name, row.figures[figure])

    def close(self, status: Status) -> None:
        self._set("running", 0)

    def _set(self, name: str, value: float) -> None:
        self._gauges[name].set(value, self._tags)

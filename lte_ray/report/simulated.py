"""A simulated run as a report shows it: as a real one, in virtual time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lte_ray.report.charts import make_charts
from lte_ray.report.heads import MAX_ROWS, SLICES, add_spans, per_cent
from lte_ray.report.page import render
from lte_ray.report.run_data import RunData
from lte_ray.report.thinning import Numbers
from lte_ray.simulation.record import Row, SimulationRecord

KINDS = {
    "train": "training",
    "send": "waiting",
    "wait": "waiting",
    "fetch": "waiting",
    "merge": "merging",
    "message": "merging",
    "dead": "dead",
}
"""What the spans of a simulation are called in a report."""


def render_simulation(run: SimulationRecord, name: str, facts: Mapping[str, str], settings: Mapping[str, str]) -> str:
    """Returns the page's HTML. Its arguments are those of `simulated_run`."""
    data = simulated_run(run, name, facts, settings)
    return render([data], [], make_charts([data], []))


def simulated_run(run: SimulationRecord, name: str, facts: Mapping[str, str], settings: Mapping[str, str]) -> RunData:
    """Returns a simulated run.

    Args:
        name: of the run.
        facts: of the overview, by title.
        settings: by name.
    """
    data = RunData(name, "simulated", dict(facts), settings=dict(settings), timeline=_timeline(run))
    if run.rows_cut:
        data.missing.append("The simulation has too many spans of time to keep: the timeline shows its begin.")
    if run.merges:
        data.merges = _curves(run)
    return data


def _curves(run: SimulationRecord) -> dict[str, Numbers]:
    def column(field: str) -> Numbers:
        return np.array([getattr(merge, field) for merge in run.merges], dtype=np.float64)

    columns = {"step": np.cumsum(column("steps")) / len(run.heads), "seconds": column("at")}
    loss = column("loss")
    if np.isfinite(loss).any():  # otherwise nothing was trained, and samples are only steps
        columns = {"samples": np.cumsum(column("samples")), **columns, "train/loss": loss}
    return {
        **columns,
        "merge/lag": column("mean_lag"),
        "merge/lag/max": column("max_lag"),
        "merge/steps": column("steps"),
        "merge/contributions": column("contributions"),
    }


def _timeline(run: SimulationRecord) -> dict[str, Any] | None:
    heads = [row for row in run.rows if row.name.startswith("head ")]
    others = [row for row in run.rows if row not in heads]
    shown = [*heads[:MAX_ROWS], *others]
    end = max((span.end for row in shown for span in row.spans), default=0.0)
    if not end or not math.isfinite(end):
        return None
    rows = [{"name": row.name, "shares": per_cent(_shares(row, end))} for row in shown]
    return {"end": end, "rows": rows, "hidden": len(run.heads) - min(len(heads), MAX_ROWS), "exact": True}


def _shares(row: Row, end: float) -> dict[str, Numbers]:
    shares: dict[str, Numbers] = {}
    for kind in dict.fromkeys(KINDS[span.kind] for span in row.spans):
        spans = [(span.start, span.end) for span in row.spans if KINDS[span.kind] == kind]
        begins, ends = (np.array(each) for each in zip(*spans, strict=True))
        add_spans(shares.setdefault(kind, np.zeros(SLICES)), begins, ends, end)
    return shares

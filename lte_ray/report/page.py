"""Renders the page of a report: one HTML file with all that it needs.

What comes from a run is never trusted. The template escapes it; data for the script are JSON, which the script shows as text;
and the page's content security policy allows only the scripts that this module puts there, and no network.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2

import lte_ray
from lte_ray.report.charts import ChartData
from lte_ray.report.figures import SECTIONS
from lte_ray.report.heads import KINDS
from lte_ray.report.ladder_data import LadderData
from lte_ray.report.run_data import AXES, RunData

MARK = "<!doctype html>\n<!-- A report of lte-ray -->\n"
"""How each report begins, so that a later one may replace it."""

SCRIPTS, STYLES = ("uPlot.iife.min.js", "report.js"), ("uPlot.min.css", "report.css")


@dataclass(frozen=True)
class SettingRow:
    """A setting in all runs: its values in their order, and whether they differ."""

    name: str
    values: list[str]
    differs: bool


def render(runs: Sequence[RunData], ladders: Sequence[LadderData], charts: ChartData) -> str:
    """Returns the page's HTML."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    scripts, styles = [_asset(name) for name in SCRIPTS], [_asset(name) for name in STYLES]
    facts = list(dict.fromkeys(title for run in runs for title in run.facts))
    numbered = list(enumerate(charts.charts))
    timelines = [{"name": run.name, **run.timeline} for run in runs if run.timeline is not None]
    data = {"tables": charts.tables, "charts": charts.charts, "timelines": timelines}
    return MARK + environment.from_string(_asset("report.html")).render(
        title=", ".join([*(run.name for run in runs), *(ladder.name for ladder in ladders)]),
        made_at=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        version=lte_ray.__version__,
        policy=_policy(scripts, styles),
        scripts=scripts,
        styles=styles,
        license=_comment(_asset("uPlot.LICENSE.txt")),
        runs=runs,
        ladders=ladders,
        facts=[(title, [run.facts.get(title, "") for run in runs]) for title in facts],
        notes=charts.notes,
        sections=[
            (key, title, [(number, chart) for number, chart in numbered if chart["section"] == key])
            for key, title in SECTIONS.items()
        ],
        axes=[(axis, title) for axis, title in AXES.items() if any(axis in table["axes"] for table in charts.tables)],
        timelines=timelines,
        kinds=KINDS,
        settings=_compare([run.settings for run in runs]),
        environment=_compare([run.environment for run in runs]),
        data=_embed(data),
    )


def _compare(tables: Sequence[Mapping[str, str]]) -> list[SettingRow]:
    """The values of all runs by name, in the order in which the first run has them."""
    names = dict.fromkeys(name for table in tables for name in table)
    rows = [(name, [table.get(name, "") for table in tables]) for name in names]
    return [SettingRow(name, values, len(set(values)) > 1) for name, values in rows]


def _asset(name: str) -> str:
    return resources.files("lte_ray.report").joinpath("assets", name).read_text(encoding="utf-8")


def _policy(scripts: Sequence[str], styles: Sequence[str]) -> str:
    """The content security policy: these scripts and styles, nothing else."""
    return (
        f"default-src 'none'; script-src {' '.join(map(_hash, scripts))}; style-src {' '.join(map(_hash, styles))}; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _comment(text: str) -> str:
    return f"<!--\nuPlot, which draws the curves:\n{text.replace('--', '- -')}-->"


def _embed(data: Any) -> str:
    """JSON that can't end the element in which it stands."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")

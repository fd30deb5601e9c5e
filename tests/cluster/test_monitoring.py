"""What Prometheus collects and Grafana shows: metrics that lte-ray has, in files that both accept."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from lte_ray.run.sinks.protocol import RunInfo
from lte_ray.runtime import prometheus
from tests.cluster.files import CLUSTER, check_with, read_yaml

DASHBOARD = json.loads((CLUSTER / "grafana.json").read_text())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
ALERTS = [rule["expr"] for group in read_yaml("prometheus-alerts.yaml")["groups"] for rule in group["rules"]]
PROMTOOL = "apt-get install prometheus"


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """The metrics of a run under the names that Ray exports, with their tags."""
    metrics: dict[str, set[str]] = {}

    class Metric:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            metrics[f"ray_{name}{self.suffix}"] = set(tag_keys)

        def set(self, value: float, tags: dict[str, str]) -> None:
            pass

    for kind, suffix in (("Gauge", ""), ("Counter", "_total")):
        monkeypatch.setattr(prometheus, kind, type(kind, (Metric,), {"suffix": suffix}))
    prometheus.PrometheusSink().open(RunInfo("a", "id", "path"))
    return metrics


def test_dashboard_and_alerts_name_metrics_that_exist(exported: dict[str, set[str]]) -> None:
    """And the tags that each has."""
    query = DASHBOARD["templating"]["list"][1]["query"]["query"]
    for expression in [*EXPRESSIONS, *ALERTS, query]:
        names = re.findall(r"\bray_\w+", expression)
        assert names
        for name in names:
            assert name in exported, expression
        tags = set(re.findall(r"(\w+)=", expression))
        assert all(tags <= exported[name] for name in names), expression
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            (name,) = re.findall(r"\bray_\w+", target["expr"])
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= exported[name]


def test_the_dashboard_shows_every_metric(exported: dict[str, set[str]]) -> None:
    """A new gauge needs a panel."""
    assert {name for expression in EXPRESSIONS for name in re.findall(r"\bray_\w+", expression)} == set(exported)


def test_the_documentation_names_every_metric(exported: dict[str, set[str]]) -> None:
    """In docs/logging.md."""
    assert set(exported) <= set(re.findall(r"\bray_lte_\w+", (CLUSTER.parent / "docs" / "logging.md").read_text()))


def test_grafana_reads_the_dashboard() -> None:
    """Grafana's own types have every field: none is lost when they read the file and write it again."""
    pytest.importorskip("grafana_foundation_sdk", reason="pip install grafana-foundation-sdk")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    check_kept(DASHBOARD, json.loads(json.dumps(Dashboard.from_json(DASHBOARD), cls=JSONEncoder)))


def check_kept(given: Any, read: Any) -> None:
    """Fails unless `read` has everything that `given` has."""
    if isinstance(given, dict):
        assert set(given) <= set(read)
        for key, value in given.items():
            check_kept(value, read[key])
    elif isinstance(given, list):
        for one, other in zip(given, read, strict=True):
            check_kept(one, other)
    else:
        assert given == read


def test_panels_have_ids_of_their_own_and_dont_overlap() -> None:
    """Grafana's grid has 24 columns."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_prometheus_accepts_its_files() -> None:
    """The configuration with the alerts that it names."""
    check_with("promtool", "check", "config", CLUSTER / "prometheus.yaml", package=PROMTOOL)


def test_prometheus_understands_the_dashboards_expressions(tmp_path: Any) -> None:
    """As rules, with an interval for Grafana's variable."""
    rules = [
        {"record": f"panel:{number}", "expr": expression.replace("$__rate_interval", "1m")}
        for number, expression in enumerate(EXPRESSIONS)
    ]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    check_with("promtool", "check", "rules", file, package=PROMTOOL)

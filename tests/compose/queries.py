"""What compose/ asks Prometheus: the dashboard's panels and the alerts."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

COMPOSE = Path(__file__).parents[2] / "compose"
ALERTS = COMPOSE / "prometheus/alerts.yml"
DASHBOARDS = sorted((COMPOSE / "grafana/dashboards").glob("*.json"))
_COMPARISON = re.compile(r"\s*(?:[<>]=?|==|!=)\s*[0-9.]+$")


@dataclass(frozen=True)
class Query:
    """One query: of which panel or alert, and what is asked."""

    name: str
    kind: str  # "panel" or "alert"
    expression: str


def dashboard_panels() -> list[dict]:
    """All panels that show something."""
    panels = [panel for path in DASHBOARDS for panel in json.loads(path.read_text())["panels"]]
    return [panel for panel in panels if panel["type"] != "row"]


def dashboard_queries() -> list[Query]:
    """One per target of a panel."""
    return [Query(panel["title"], "panel", target["expr"]) for panel in dashboard_panels() for target in panel["targets"]]


def alert_rules() -> list[dict]:
    """As written."""
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def alert_queries() -> list[Query]:
    """The value that each alert compares with a number: there is one also while all is well."""
    found = []
    for rule in alert_rules():
        value, comparisons = _COMPARISON.subn("", rule["expr"].strip())
        assert comparisons == 1, f"{rule['alert']} is not VALUE COMPARISON NUMBER"
        found.append(Query(rule["alert"], "alert", value))
    return found

"""The dashboard's panels, as Grafana would ask Prometheus for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

DEPLOY = Path(__file__).parents[2] / "deploy"
FILE = DEPLOY / "grafana" / "dashboards" / "kvbm.json"

RATE_SECONDS = 5
"""What `$__rate_interval` stands for here, at a scrape every 0.2 s."""


class Question(NamedTuple):
    """One expression of a panel, its variables filled in."""

    panel: str
    expression: str


def load() -> dict[str, Any]:
    """The dashboard."""
    dashboard: dict[str, Any] = json.loads(FILE.read_text())
    return dashboard


def rows() -> dict[str, list[dict[str, Any]]]:
    """The panels under the title of the row that they stand in."""
    found: dict[str, list[dict[str, Any]]] = {}
    for panel in load()["panels"]:
        if panel["type"] == "row":
            found[panel["title"]] = []
        else:
            found[list(found)[-1]].append(panel)
    return found


def questions() -> list[Question]:
    """Every expression of every panel."""
    return [
        Question(panel["title"], _filled_in(target["expr"]))
        for panels in rows().values()
        for panel in panels
        for target in panel["targets"]
    ]


def _filled_in(expression: str) -> str:
    filled = expression.replace("$__rate_interval", f"{RATE_SECONDS}s").replace("$instance", ".*")
    assert "$" not in filled, f"a variable that is not known here: {expression}"
    return filled

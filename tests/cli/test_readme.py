"""What README and troubleshooting tell people to look at is there."""

from __future__ import annotations

import re
from pathlib import Path

from kvbm_schemas.block import Tier
from kvbm_schemas.records import TierStatus
from kvbm_service.adapters.metrics import Metrics
from kvbm_service.adapters.route_metrics import RouteMetrics
from kvbm_service.cli.root import app

ROOT = Path(__file__).parents[2]
TEXT = "".join((ROOT / page).read_text() for page in ("README.md", "docs/troubleshooting.md"))

NO_METRICS = {"kvbm_connectors", "kvbm_llm_api_config", "kvbm_service"}
PREFIXES = {"kvbm_onboard"}
"""Of several metrics, to be searched for."""


def test_every_metric_they_name_is_served() -> None:
    metrics = Metrics(block_tokens=16)
    metrics.disk_works(True)
    metrics.watch_tiers(lambda: [TierStatus(Tier.HOST, 1, 1, 1)], lambda: {Tier.HOST: 1})
    _, text = metrics.expose()
    text += RouteMetrics().page("")[0]
    served = set(re.findall(r"^# TYPE (\w+) ", text.decode(), re.MULTILINE))
    named = set(re.findall(r"\bkvbm_[a-z0-9_]*[a-z0-9]\b", TEXT)) - NO_METRICS
    assert len(named) > 20
    assert named - PREFIXES <= served
    assert all(any(name.startswith(prefix) for name in served) for prefix in PREFIXES)


def test_every_command_they_name_exists() -> None:
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    named = set(re.findall(r"^kvbm (\w+)", TEXT, re.MULTILINE))
    assert {"ls", "locate", "up", "registry"} <= named <= commands

"""Every panel of the dashboard shows something, asked of a real Prometheus."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable, Iterator

import pytest
import yaml

from kvbm_schemas.block import Tier
from kvbm_schemas.records import TierStatus
from kvbm_service.adapters.metrics import Metrics
from kvbm_service.adapters.metrics_server import serve
from kvbm_service.core.accounts import Looked, Path, Refusal, Transferred
from tests.deploy import dashboard
from tests.deploy.dashboard import Question
from tests.deploy.prometheus_server import CONFIG, program, prometheus

BLOCK_BYTES = 1 << 20

GUIDES_PANELS = {
    "Cache Hit": {
        "Host Cache Hit Rate": "kvbm_host_cache_hit_rate",
        "Disk Cache Hit Rate": "kvbm_disk_cache_hit_rate",
        "Matched Tokens": "kvbm_matched_tokens",
    },
    "Offload": {
        "Offload Blocks - Device to Host": "kvbm_offload_blocks_d2h",
        "Offload Blocks - Host to Disk": "kvbm_offload_blocks_h2d",
        "Offload Blocks - Device to Disk": "kvbm_offload_blocks_d2d",
    },
    "Onboard": {
        "Onboard Blocks - Host to Device": "kvbm_onboard_blocks_h2d",
        "Onboard Blocks - Disk to Device": "kvbm_onboard_blocks_d2d",
    },
}


class Engine:
    """What a busy engine would have its metrics say. Each `work` is a few requests more."""

    def __init__(self) -> None:
        self.metrics = Metrics(block_tokens=16, window_requests=100)
        self._evicted = {Tier.HOST: 0, Tier.DISK: 0}
        self.metrics.watch_tiers(
            lambda: (TierStatus(Tier.HOST, 64, 60, 4), TierStatus(Tier.DISK, 512, 100, 2)),
            lambda: self._evicted,
        )
        self.metrics.disk_works(True)

    def work(self) -> None:
        for number, path in enumerate(Path, start=1):
            size = number * BLOCK_BYTES
            self.metrics.account(Transferred(path, number, size, 0, "", seconds=number / 1e3))
        failed = Transferred(Path.DISK_TO_DEVICE, 1, BLOCK_BYTES, 1, "checksum", seconds=0.01)
        self.metrics.account(failed)
        self.metrics.account(Looked(wanted=20, host=8, disk=4, remote=2))
        self.metrics.account(Refusal("the offload filter", 3))
        self.metrics.lookup(0.002, answered=True)
        self.metrics.lookup(0.020, answered=False)
        self._evicted[Tier.HOST] += 2


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], list[float]]]:
    """Ask Prometheus about an engine at work; the numbers, as soon as there are some."""
    engine = Engine()
    server = serve(engine.metrics, "127.0.0.1", 0)
    with prometheus(tmp_path_factory.mktemp("prometheus"), [f"127.0.0.1:{server.port}"]) as asked:

        def ask(expression: str) -> list[float]:
            return asked.values_while(engine.work, expression)

        yield ask
    server.close()


@pytest.mark.parametrize("question", dashboard.questions(), ids=lambda question: question.panel)
def test_every_panel_shows_numbers(ask: Callable[[str], list[float]], question: Question) -> None:
    assert ask(question.expression), f"{question.panel} has no data: {question.expression}"


def test_the_list_of_engines_to_choose_from_is_not_empty(
    ask: Callable[[str], list[float]],
) -> None:
    (variable,) = dashboard.load()["templating"]["list"]
    assert variable["definition"] == "label_values(kvbm_matched_tokens, instance)"
    assert ask('kvbm_matched_tokens{instance!=""}')


def test_prometheus_takes_the_exact_names_for_counters(
    ask: Callable[[str], list[float]],
) -> None:
    (total,) = ask("kvbm_onboard_blocks_h2d")
    (rate,) = ask("rate(kvbm_onboard_blocks_h2d[5s]) > 0")
    assert total > 0
    assert rate > 0
    assert ask('kvbm_transfer_seconds_bucket{path="host_to_device", le="0.005"}')


def test_the_guides_panels_are_there_by_name_in_their_rows() -> None:
    rows = dashboard.rows()
    shown = {
        row: {panel["title"]: panel["targets"][0]["expr"].partition("{")[0] for panel in rows[row]}
        for row in GUIDES_PANELS
    }
    assert shown == GUIDES_PANELS
    assert list(rows)[:3] == list(GUIDES_PANELS)


def test_the_dashboard_bears_the_guides_name_and_refreshes_every_five_seconds() -> None:
    found = dashboard.load()
    assert found["title"] == "KVBM Dashboard"
    assert found["refresh"] == "5s"


def test_each_panel_says_what_it_shows_and_covers_no_other() -> None:
    panels = dashboard.load()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["description"] for panel in panels if panel["type"] != "row")
    for one, other in itertools.combinations((panel["gridPos"] for panel in panels), 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)


def test_prometheus_accepts_its_configuration() -> None:
    command = [program("promtool"), "check", "config", CONFIG]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_prometheus_looks_for_engines_where_they_are() -> None:
    (job,) = yaml.safe_load(CONFIG.read_text())["scrape_configs"]
    assert job["job_name"] == "kvbm-metrics"
    assert job["scrape_interval"] == "2s"
    (engines,) = job["static_configs"]
    assert engines["targets"] == [f"host.docker.internal:{port}" for port in range(6880, 6884)]

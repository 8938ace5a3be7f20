"""What a scrape finds, counted from what the core told; over real HTTP where it matters."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text

from kvbm_schemas.block import Tier
from kvbm_schemas.records import TierStatus
from kvbm_service.adapters.metrics import Metrics, failure_label, refusal_label
from kvbm_service.adapters.metrics_server import (
    IDLE_SECONDS,
    MAX_CONNECTIONS,
    MetricsServer,
    serve,
)
from kvbm_service.core.accounts import Looked, Path, Refusal, Transferred
from kvbm_service.errors import SettingError

OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
BLOCK_TOKENS = 16

GUIDES = {
    "kvbm_matched_tokens": "counter",
    "kvbm_offload_blocks_d2h": "counter",
    "kvbm_offload_blocks_h2d": "counter",
    "kvbm_offload_blocks_d2d": "counter",
    "kvbm_onboard_blocks_d2d": "counter",
    "kvbm_onboard_blocks_h2d": "counter",
    "kvbm_host_cache_hit_rate": "gauge",
    "kvbm_disk_cache_hit_rate": "gauge",
}


def transferred(path: Path, blocks: int, failed: int = 0, reason: str = "") -> Transferred:
    return Transferred(path, blocks, blocks * 4096, failed, reason, seconds=0.003)


def samples(metrics: Metrics, accept: str = "") -> dict[str, float]:
    """Each sample of a scrape by the very text that stands before its value."""
    lines = metrics.expose(accept)[1].decode().splitlines()
    pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(BLOCK_TOKENS)


@pytest.fixture
def server(metrics: Metrics) -> Iterator[MetricsServer]:
    server = serve(metrics, "127.0.0.1", 0)
    yield server
    server.close()


def get(server: MetricsServer, path: str, accept: str = "") -> tuple[str, str]:
    """The content type and the body that the server answers with."""
    address = f"http://127.0.0.1:{server.port}{path}"
    request = urllib.request.Request(address, headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


# -- names and types --------------------------------------------------------------------------


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_the_guides_names_are_there_from_the_start_with_nothing_added(
    metrics: Metrics, accept: str
) -> None:
    found = samples(metrics, accept)
    assert {name: found.get(name) for name in GUIDES} == dict.fromkeys(GUIDES, 0.0)
    for name in GUIDES:
        assert not [other for other in found if other.startswith(name) and other != name]


def test_the_guides_names_have_their_types_in_the_text_format(metrics: Metrics) -> None:
    lines = metrics.expose()[1].decode().splitlines()
    for name, kind in GUIDES.items():
        assert f"# TYPE {name} {kind}" in lines


def test_both_formats_are_well_formed(metrics: Metrics) -> None:
    metrics.watch_tiers(lambda: (TierStatus(Tier.HOST, 8, 4, 1),), lambda: {Tier.HOST: 3})
    metrics.disk_works(False)
    text = {family.name for family in parse_text(metrics.expose()[1].decode())}
    strict = {family.name for family in parse_openmetrics(metrics.expose(OPENMETRICS)[1].decode())}
    assert text == strict
    assert len(text) > len(GUIDES)


def test_no_sample_tells_when_a_counter_was_made(metrics: Metrics) -> None:
    assert not [name for name in samples(metrics, OPENMETRICS) if "_created" in name]


# -- counting ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (Path.DEVICE_TO_HOST, "kvbm_offload_blocks_d2h"),
        (Path.HOST_TO_DISK, "kvbm_offload_blocks_h2d"),
        (Path.DEVICE_TO_DISK, "kvbm_offload_blocks_d2d"),
        (Path.DISK_TO_DEVICE, "kvbm_onboard_blocks_d2d"),
        (Path.HOST_TO_DEVICE, "kvbm_onboard_blocks_h2d"),
    ],
)
def test_each_of_the_guides_counters_counts_its_own_path(
    metrics: Metrics, path: Path, name: str
) -> None:
    metrics.account(transferred(path, 3))
    metrics.account(transferred(path, 4))
    counted = {key: value for key, value in samples(metrics).items() if key in GUIDES and value}
    assert counted == {name: 7.0}


@pytest.mark.parametrize("path", [Path.DISK_TO_HOST, Path.REMOTE_TO_HOST, Path.REMOTE_TO_DEVICE])
def test_what_neither_offloads_nor_onboards_from_an_own_tier_is_in_none_of_them(
    metrics: Metrics, path: Path
) -> None:
    metrics.account(transferred(path, 3))
    found = samples(metrics)
    assert not [name for name in GUIDES if found[name]]
    assert found[f'kvbm_transferred_blocks_total{{path="{path.name.lower()}"}}'] == 3


def test_blocks_that_did_not_arrive_are_counted_as_failed_and_not_as_onboarded(
    metrics: Metrics,
) -> None:
    metrics.account(transferred(Path.HOST_TO_DEVICE, 5, 2, "a slot held something else"))
    metrics.account(transferred(Path.HOST_TO_DEVICE, 0, 9, "never heard of"))
    found = samples(metrics)
    assert found["kvbm_onboard_blocks_h2d"] == 5
    where = 'kvbm_failed_blocks_total{path="host_to_device",reason='
    assert found[where + '"checksum"}'] == 2
    assert found[where + '"other"}'] == 9
    assert found['kvbm_transfer_seconds_count{path="host_to_device"}'] == 1


def test_bytes_and_seconds_fall_into_buckets_by_path(metrics: Metrics) -> None:
    metrics.account(Transferred(Path.HOST_TO_DISK, 1, 1024, 0, "", seconds=0.002))
    metrics.account(Transferred(Path.HOST_TO_DISK, 1, 1 << 40, 0, "", seconds=60.0))
    found = samples(metrics)
    path = 'path="host_to_disk"'
    at = {
        bound: found[f'kvbm_transfer_seconds_bucket{{le="{bound}",{path}}}']
        for bound in ("0.001", "0.002", "10.0", "+Inf")
    }
    assert at == {"0.001": 0, "0.002": 1, "10.0": 1, "+Inf": 2}
    assert found[f'kvbm_transfer_bytes_bucket{{le="1024.0",{path}}}'] == 1
    assert found[f"kvbm_transfer_bytes_sum{{{path}}}"] == 1024 + (1 << 40)
    assert found[f"kvbm_transfer_bytes_count{{{path}}}"] == 2
    assert found['kvbm_transfer_bytes_count{path="disk_to_host"}'] == 0


def test_matched_tokens_are_those_of_blocks_found_anywhere(metrics: Metrics) -> None:
    metrics.account(Looked(wanted=10, host=4, disk=2, remote=1))
    found = samples(metrics)
    assert found["kvbm_matched_tokens"] == 7 * BLOCK_TOKENS
    assert found['kvbm_hit_blocks_total{source="remote"}'] == 1
    assert found["kvbm_wanted_blocks_total"] == 10


def test_hit_rates_look_back_on_the_last_requests_that_wanted_blocks() -> None:
    metrics = Metrics(BLOCK_TOKENS, window_requests=2)
    metrics.account(Looked(wanted=90, host=90, disk=0, remote=0))
    metrics.account(Looked(wanted=10, host=5, disk=0, remote=0))
    metrics.account(Looked(wanted=30, host=5, disk=30, remote=4))
    for _ in range(5):
        metrics.account(Looked(wanted=0, host=0, disk=0, remote=0))
    found = samples(metrics)
    assert found["kvbm_host_cache_hit_rate"] == 0.25
    assert found["kvbm_disk_cache_hit_rate"] == 0.75
    assert found["kvbm_remote_cache_hit_rate"] == 0.1
    assert metrics.hit_rates() == (0.25, 0.75, 0.1)


def test_refusals_are_counted_by_reason(metrics: Metrics) -> None:
    metrics.account(Refusal("too many blocks are leased or in use", 4))
    metrics.account(Refusal("the offload filter: used too seldom", 6))
    found = samples(metrics)
    assert found['kvbm_refused_blocks_total{reason="no_room"}'] == 4
    assert found['kvbm_refused_blocks_total{reason="filter"}'] == 6


def test_any_text_may_be_a_reason_and_labels_stay_few(metrics: Metrics) -> None:
    before = set(samples(metrics))
    for number in range(1000):
        metrics.account(transferred(Path.DISK_TO_HOST, 0, 1, f"strange {number}"))
        metrics.account(Refusal(f"strange {number}", 1))
    assert set(samples(metrics)) == before
    assert samples(metrics)['kvbm_refused_blocks_total{reason="other"}'] == 1000


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("[Errno 28] No space left on device", "no_space"),
        ("[Errno 5] Input/output error", "io_error"),
        ("reading from node-b.0 took too long", "timeout"),
        ("node-b.0 is not connected", "unreachable"),
        ("node-b.0 is not in this process, or is gone", "unreachable"),
        ("a slot held something else", "checksum"),
        ("a block was not what its name says", "checksum"),
        ("the disk failed 8 times in a row: Input/output error (read of slot 3)", "lost"),
        ("", "other"),
    ],
)
def test_the_texts_of_failures_have_their_labels(text: str, label: str) -> None:
    assert failure_label(text) == label


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("not here", "not_here"),
        ("not ready", "not_ready"),
        ("too many questions at once", "busy"),
        ("G2 is full", "no_room"),
        ("priority", "priority"),
    ],
)
def test_the_texts_of_refusals_have_their_labels(text: str, label: str) -> None:
    assert refusal_label(text) == label


def test_lookups_are_timed_apart_by_whether_they_were_answered(metrics: Metrics) -> None:
    metrics.lookup(0.004, answered=True)
    metrics.lookup(0.02, answered=False)
    metrics.lookup(0.02, answered=False)
    found = samples(metrics)
    assert found['kvbm_lookup_seconds_count{answered="yes"}'] == 1
    assert found['kvbm_lookup_seconds_count{answered="no"}'] == 2


def test_tiers_are_read_anew_by_every_scrape(metrics: Metrics) -> None:
    tiers = [TierStatus(Tier.HOST, 100, 40, 3), TierStatus(Tier.DISK, 1000, 7, 0)]
    evicted = {Tier.HOST: 5, Tier.DISK: 0}
    metrics.watch_tiers(lambda: tuple(tiers), evicted.copy)
    found = samples(metrics)
    assert found['kvbm_tier_capacity_blocks{tier="disk"}'] == 1000
    assert found['kvbm_tier_used_blocks{tier="host"}'] == 40
    assert found['kvbm_tier_pinned_blocks{tier="host"}'] == 3
    del tiers[1]
    evicted[Tier.HOST] = 6
    found = samples(metrics)
    assert found['kvbm_evicted_blocks_total{tier="host"}'] == 6
    assert 'kvbm_tier_used_blocks{tier="disk"}' not in found


def test_the_disk_works_until_it_is_given_up(metrics: Metrics) -> None:
    assert "kvbm_disk_works" not in samples(metrics)
    metrics.disk_works(True)
    assert samples(metrics)["kvbm_disk_works"] == 1
    metrics.disk_works(False)
    assert samples(metrics)["kvbm_disk_works"] == 0


def test_nothing_is_lost_when_threads_count_and_scrape_at_once(metrics: Metrics) -> None:
    def count() -> None:
        for _ in range(2000):
            metrics.account(transferred(Path.HOST_TO_DEVICE, 1, 1, "torn"))
            metrics.account(Looked(2, 1, 1, 0))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        found = samples(metrics)
        where = '{path="host_to_device"}'
        buckets = found['kvbm_transfer_seconds_bucket{le="+Inf",path="host_to_device"}']
        assert found[f"kvbm_transfer_seconds_count{where}"] == buckets
    for thread in threads:
        thread.join()
    found = samples(metrics)
    assert found["kvbm_onboard_blocks_h2d"] == 8000
    assert found['kvbm_failed_blocks_total{path="host_to_device",reason="checksum"}'] == 8000
    assert found["kvbm_matched_tokens"] == 16_000 * BLOCK_TOKENS


def test_an_account_costs_the_engines_thread_microseconds(metrics: Metrics) -> None:
    entries = [
        transferred(Path.HOST_TO_DEVICE, 3, 1, "torn"),
        Looked(9, 3, 3, 3),
        Refusal("filter", 3),
    ]
    spent = []
    for _ in range(20):
        began = time.thread_time()
        for _ in range(200):
            for entry in entries:
                metrics.account(entry)
        spent.append((time.thread_time() - began) / 600)
    assert min(spent) < 10e-6, "five times what it takes, for slow machines"


# -- serving ----------------------------------------------------------------------------------


def test_a_scrape_gets_the_format_it_asks_for(metrics: Metrics, server: MetricsServer) -> None:
    metrics.account(transferred(Path.DEVICE_TO_HOST, 12))
    kind, text = get(server, "/metrics")
    assert kind.startswith("text/plain; version=0.0.4")
    assert "\nkvbm_offload_blocks_d2h 12.0\n" in text
    kind, text = get(server, "/metrics?name=x", OPENMETRICS)
    assert kind.startswith("application/openmetrics-text")
    assert "\nkvbm_offload_blocks_d2h 12.0\n" in text
    assert text.endswith("# EOF\n")


def test_the_front_page_points_to_the_metrics_and_nothing_else_is_there(
    server: MetricsServer,
) -> None:
    kind, page = get(server, "/")
    assert kind.startswith("text/html")
    assert 'href="/metrics"' in page
    with pytest.raises(urllib.error.HTTPError) as refused:
        get(server, "/metric")
    refused.value.close()
    assert refused.value.code == 404


def test_a_taken_port_is_one_line_in_the_log_and_the_next_free_one(
    metrics: Metrics, server: MetricsServer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        other = serve(metrics, "127.0.0.1", server.port)
    try:
        assert server.port < other.port < server.port + 32
        (said,) = caplog.messages
        assert f"port {server.port} is taken" in said
        assert f"http://127.0.0.1:{other.port}/metrics" in said
        assert "kvbm_matched_tokens" in get(other, "/metrics")[1]
    finally:
        other.close()


def test_with_the_last_ports_taken_the_system_chooses_one(metrics: Metrics) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 65_535))
        taken.listen()
        server = serve(metrics, "127.0.0.1", 65_535)
        assert server.port != 65_535
        server.close()


def test_an_address_that_is_not_this_machines_is_a_wrong_setting(metrics: Metrics) -> None:
    with pytest.raises(SettingError, match="KVBM_METRICS_HOST"):
        serve(metrics, "192.0.2.1", 6880)


def test_whoever_only_holds_a_connection_open_keeps_no_scrape_waiting(
    metrics: Metrics, server: MetricsServer
) -> None:
    with socket.create_connection(("127.0.0.1", server.port)):
        assert "kvbm_matched_tokens" in get(server, "/metrics")[1]


def test_a_closed_server_leaves_no_thread_and_frees_its_port(metrics: Metrics) -> None:
    before = set(threading.enumerate())
    server = serve(metrics, "127.0.0.1", 0)
    with contextlib.ExitStack() as idle:
        for _ in range(20):
            idle.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        get(server, "/metrics")  # those before it have been accepted, too
        began = time.monotonic()
        server.close()
        assert set(threading.enumerate()) <= before
        assert time.monotonic() - began < IDLE_SECONDS / 2, "whoever is idle is not waited for"
    again = serve(metrics, "127.0.0.1", server.port)
    assert again.port == server.port
    again.close()


def test_more_connections_than_there_is_room_for_are_closed_at_once(
    metrics: Metrics, server: MetricsServer
) -> None:
    with contextlib.ExitStack() as idle:
        for _ in range(MAX_CONNECTIONS):
            idle.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as one_more:
            assert one_more.recv(1) == b""

"""What a running engine's metrics say, and that the dashboard shows all of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest

from kvbm_service.demo.engine import BLOCK_TOKENS
from tests.deploy import dashboard
from tests.deploy.dashboard import Question
from tests.deploy.prometheus_server import Prometheus, free_port, prometheus
from tests.integration.conftest import Engines, Site
from tests.integration.counted import address_in, grown, scrape
from tests.integration.node import HOST_BLOCKS, Node, prompt

BLOCKS = 6
DISK_BLOCKS = 256


@pytest.fixture(scope="module")
def node(
    site: Site, lasting_engines: Engines, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Node]:
    """A node with host and disk tier, whose metrics are served."""
    settings = {
        "DYN_KVBM_METRICS": True,
        "DYN_KVBM_METRICS_PORT": free_port(),
        "KVBM_METRICS_HOST": "127.0.0.1",
        "KVBM_HOST_CACHE_DIR": "none",
        "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS": DISK_BLOCKS,
        "DYN_KVBM_DISK_CACHE_DIR": str(tmp_path_factory.mktemp("disk")),
    }
    engine = lasting_engines.start_node("node-metrics", site.cluster.url, connector=settings)
    node = Node(engine.wait_ready(), site.witness).wait_joined()
    yield node
    node.check_at_rest()


@pytest.fixture(scope="module")
def address(node: Node) -> str:
    """Where its metrics are."""
    return address_in(node.log)


@pytest.fixture(scope="module")
def asked(address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that scrapes the engine."""
    with prometheus(tmp_path_factory.mktemp("prometheus"), [address]) as asked:
        yield asked


@pytest.fixture(scope="module")
def work(node: Node) -> Callable[[], None]:
    """Each call has a few prompts computed and loaded again."""
    turns = itertools.count()

    def work() -> None:
        question = prompt(("work", next(turns)), BLOCKS)
        for _ in range(2):
            node.ask(question, max_tokens=2)
            node.forget_device()

    return work


def test_blocks_are_counted_when_they_come_and_go(node: Node, address: str) -> None:
    question = prompt("counted", BLOCKS)
    before = scrape(address)
    node.ask(question)
    saved = grown(address, before, lambda by: by["kvbm_offload_blocks_d2h"] >= BLOCKS)
    assert saved["kvbm_offload_blocks_d2h"] == BLOCKS
    assert saved["kvbm_onboard_blocks_h2d"] == saved["kvbm_matched_tokens"] == 0
    node.forget_device()
    before = scrape(address)
    answer = node.ask(question)
    loaded = grown(address, before, lambda by: by["kvbm_onboard_blocks_h2d"] > 0)
    assert answer.cached_tokens == BLOCKS * BLOCK_TOKENS
    assert loaded["kvbm_onboard_blocks_h2d"] == BLOCKS
    assert loaded["kvbm_onboard_blocks_d2d"] == 0
    assert loaded["kvbm_matched_tokens"] == BLOCKS * BLOCK_TOKENS
    assert loaded['kvbm_transfer_bytes_count{path="host_to_device"}'] == 1
    bytes_ = loaded['kvbm_transfer_bytes_sum{path="host_to_device"}']
    assert bytes_ > 0
    assert bytes_ % BLOCKS == 0


def test_blocks_used_again_go_to_disk_and_come_back_from_there(node: Node, address: str) -> None:
    before = scrape(address)
    node.ask(prompt("asked once", BLOCKS), max_tokens=1)
    questions = [prompt(("to disk", number), BLOCKS) for number in range(2 * HOST_BLOCKS // BLOCKS)]
    blocks = len(questions) * BLOCKS
    for question in questions:
        node.ask(question, max_tokens=1)
        node.forget_device()
        node.ask(question, max_tokens=1)
    written = grown(address, before, lambda by: by["kvbm_offload_blocks_h2d"] >= blocks)
    assert written["kvbm_offload_blocks_h2d"] == blocks, "what was asked once stays off the disk"
    before = scrape(address)
    for question in questions:
        node.forget_device()
        assert node.ask(question, max_tokens=1).cached_tokens == BLOCKS * BLOCK_TOKENS
    came = grown(
        address,
        before,
        lambda by: by["kvbm_onboard_blocks_d2d"] + by["kvbm_onboard_blocks_h2d"] >= blocks,
    )
    fetched = came['kvbm_transferred_blocks_total{path="disk_to_host"}']
    assert came["kvbm_onboard_blocks_d2d"] + fetched >= blocks - HOST_BLOCKS
    assert scrape(address)["kvbm_disk_cache_hit_rate"] > 0


def test_tiers_are_as_large_as_chosen_and_the_disk_works(node: Node, address: str) -> None:
    found = scrape(address)
    assert found['kvbm_tier_capacity_blocks{tier="host"}'] == HOST_BLOCKS
    assert found['kvbm_tier_capacity_blocks{tier="disk"}'] == DISK_BLOCKS
    assert found['kvbm_evicted_blocks_total{tier="host"}'] > 0
    assert found["kvbm_disk_works"] == 1
    assert not [name for name, blocks in found.items() if "failed_blocks" in name and blocks]


@pytest.mark.parametrize("question", dashboard.questions(), ids=lambda question: question.panel)
def test_every_panel_shows_numbers_of_a_running_engine(
    asked: Prometheus, work: Callable[[], None], question: Question
) -> None:
    values = asked.values_while(work, question.expression)
    assert values, f"{question.panel} has no data: {question.expression}"

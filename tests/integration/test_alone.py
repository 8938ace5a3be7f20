"""One engine, and no NATS: it uses its own host tier, and joins the others when NATS appears."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvbm_service.demo.engine import BLOCK_TOKENS
from tests.integration.conftest import Engines, Reference, Site
from tests.integration.node import DEVICE_BLOCKS, Node, prompt, same

BLOCKS = 10
JOIN_SECONDS = 60.0
"""How soon a node is visible once NATS is there."""


@pytest.fixture(scope="module")
def alone(site: Site, lasting_pair: tuple[Node, Node], lasting_engines: Engines) -> Iterator[Node]:
    """A node that has never seen NATS, while two others, which have, go on without it."""
    site.cluster.nats.stop()
    engine = lasting_engines.start_node("node-alone", site.cluster.url).wait_ready()
    yield Node(engine, site.witness)
    if site.cluster.nats.pid is None:
        site.cluster.nats.start()


def test_an_engine_alone_gets_its_own_blocks_back(reference: Reference, alone: Node) -> None:
    question = prompt("alone", BLOCKS)
    expected = reference.answer(question)
    computed = alone.ask(question)
    alone.forget_device()
    answer = alone.ask(question)
    assert (computed.cached_tokens, answer.cached_tokens) == (0, BLOCKS * BLOCK_TOKENS)
    assert same(computed, expected)
    assert same(answer, expected)
    alone.forget_device()


def test_what_the_device_pool_evicts_comes_back_from_the_host_tier(
    reference: Reference, alone: Node
) -> None:
    question = prompt("evicted", BLOCKS)
    alone.forget()  # there must be room for all that follows
    alone.ask(question)
    for number in range(DEVICE_BLOCKS // BLOCKS):
        alone.ask(prompt(("others", number), BLOCKS - 2), salt="others")
    answer = alone.ask(question)
    assert answer.cached_tokens == BLOCKS * BLOCK_TOKENS
    assert same(answer, reference.answer(question))
    alone.forget_device()


def test_the_log_says_once_what_is_missing(site: Site, alone: Node) -> None:
    missing = [line for line in alone.log.splitlines() if site.cluster.url in line]
    by_leader = [line for line in missing if "EngineCore" in line]
    by_worker = [line for line in missing if "EngineCore" not in line]
    assert len(by_leader) == 1, missing
    assert len(by_worker) == 1, missing
    assert "trying again" in by_leader[0]


def test_the_engine_joins_when_nats_appears_and_others_use_its_blocks(
    site: Site, reference: Reference, lasting_pair: tuple[Node, Node], alone: Node
) -> None:
    question = prompt("joined", BLOCKS)
    alone.forget()
    expected = reference.answer(question)
    alone.ask(question)  # while nobody can know
    site.cluster.nats.start()
    alone.wait_joined(JOIN_SECONDS)
    assert alone.name in site.witness.nodes()
    _, reader = lasting_pair
    reader.forget()
    report = site.witness.listen()
    reader.wait_until_it_reads_from(alone, JOIN_SECONDS)
    answer = reader.ask(question)
    assert answer.cached_tokens == BLOCKS * BLOCK_TOKENS
    assert same(answer, expected)
    site.witness.wait("the load is told", lambda: report.sources(reader.name)[alone.name] >= BLOCKS)
    for node in (reader, alone):
        node.check_at_rest()

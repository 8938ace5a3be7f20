"""Nodes that must not mix: another layout of blocks, and another node of the same name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvbm_schemas.requests import Acquire, Lookup
from kvbm_service.demo.engine import BLOCK_TOKENS, share_cores
from tests.integration.conftest import Engines, Reference, Site
from tests.integration.node import Node, prompt, same

Pair = tuple[Node, Node]

BLOCKS = 10


@pytest.fixture(scope="module")
def strangers(site: Site, lasting_engines: Engines) -> tuple[Node, Node]:
    """One with larger blocks, which checksums nothing; and one called like node A."""
    larger = {"arguments": {"block_size": 2 * BLOCK_TOKENS}, "connector": {"KVBM_VERIFY": False}}
    cores = share_cores(engines=2)
    started = [
        lasting_engines.start_node("node-larger", site.cluster.url, cores=cores[0], **larger),
        lasting_engines.start_node("node-A", site.cluster.url, cores=cores[1]),
    ]
    one, other = (Node(engine.wait_ready(), site.witness) for engine in started)
    return one.wait_joined(), other


@pytest.fixture
def larger(strangers: tuple[Node, Node]) -> Iterator[Node]:
    """The one whose blocks are larger."""
    strangers[0].forget()
    yield strangers[0]
    strangers[0].check_at_rest()


def test_nodes_of_different_layouts_do_not_see_each_others_blocks(
    reference: Reference, pair: Pair, larger: Node
) -> None:
    a, b = pair
    question = prompt("layout", BLOCKS)
    _, scope, _ = a.compute(question, BLOCKS)
    report = larger.witness.listen()
    answer = larger.ask(question)
    assert same(answer, reference.answer(question))
    assert answer.cached_tokens == 0
    assert report.of(Acquire) == []
    assert len(report.of(Lookup)) == 1, "it did look"
    assert report.scope("registry") != scope
    larger.wait_stored(report, BLOCKS // 2)
    b.forget()
    assert b.ask(question).cached_tokens == BLOCKS * BLOCK_TOKENS, "which are node A's"


def test_without_checksums_a_spoiled_block_changes_the_answer(
    reference: Reference, larger: Node
) -> None:
    """What the other tests compare would not be right by chance."""
    question = prompt("spoiled unseen", BLOCKS)
    expected = reference.answer(question)
    _, _, names = larger.compute(question, BLOCKS // 2)
    larger.forget_device()
    assert same(larger.ask(question), expected)
    larger.forget_device()
    larger.engine.call_workers("kvbm_spoil_slab", names[2].hex())
    answer = larger.ask(question)
    assert answer.cached_tokens == BLOCKS * BLOCK_TOKENS
    assert not same(answer, expected)


def test_a_second_node_of_the_same_name_works_alone_and_says_why(
    reference: Reference, strangers: tuple[Node, Node]
) -> None:
    _, namesake = strangers
    question = prompt("namesake", BLOCKS)
    namesake.ask(question)
    namesake.forget_device()
    answer = namesake.ask(question)
    assert answer.cached_tokens == BLOCKS * BLOCK_TOKENS
    assert same(answer, reference.answer(question))
    said = [line for line in namesake.log.splitlines() if "a live node is already called" in line]
    assert len(said) == 2, "by the leader and by the worker, once each"
    assert all("KVBM_NODE_NAME" in line for line in said)
    assert namesake.engine.alive


def test_a_second_node_of_the_same_name_does_not_disturb_the_first(
    reference: Reference, pair: Pair, strangers: tuple[Node, Node]
) -> None:
    a, b = pair
    _, namesake = strangers
    theirs = prompt("only the namesake has it", BLOCKS)
    report = a.witness.listen()
    namesake.ask(theirs)
    assert same(b.ask(theirs), reference.answer(theirs))
    for number in range(4):
        question = prompt(("disturbed", number), 4)
        a.compute(question, 4)
        answer = b.ask(question)
        assert same(answer, reference.answer(question))
        assert answer.cached_tokens == 4 * BLOCK_TOKENS
    assert report.failed(b.name) == 0

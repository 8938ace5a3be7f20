"""The engine that holds the blocks is killed -9 before, during and after it lends them."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest

from kvbm_schemas.requests import Acquire
from kvbm_service.demo.engine import BLOCK_TOKENS
from tests.integration.conftest import Engines, Reference, Site
from tests.integration.node import (
    LOOKUP_SECONDS,
    MEMBERSHIP_SECONDS,
    TRANSFER_SECONDS,
    Node,
    prompt,
    same,
)

BLOCKS = 4
SLACK_SECONDS = 15.0
VICTIM = "node-victim"

_lives = count(1)


@pytest.fixture
def victim(site: Site, lasting_pair: tuple[Node, Node], engines: Engines) -> Node:
    """A node to be killed; each life of it under the same name."""
    _, reader = lasting_pair
    reader.forget()
    node = Node(engines.start_node(VICTIM, site.cluster.url).wait_ready(), site.witness)
    node.wait_joined()
    reader.wait_until_it_reads_from(node, seconds=3 * MEMBERSHIP_SECONDS)
    return node


def questions(number: int) -> list[list[int]]:
    """So many prompts that nobody was asked before."""
    life = next(_lives)
    return [prompt((VICTIM, life, index), BLOCKS) for index in range(number)]


def test_blocks_of_a_dead_owner_are_computed_until_the_registry_forgets_them_and_after(
    reference: Reference, lasting_pair: tuple[Node, Node], victim: Node
) -> None:
    _, reader = lasting_pair
    early, soon, late = questions(3)
    for question in (early, soon):
        victim.compute(question, BLOCKS)
    _, scope, names = victim.compute(late, BLOCKS)
    victim.engine.kill()
    holders = reader.witness.holders(scope, names)
    assert all(VICTIM in nodes for nodes in holders), "the registry does not know yet"
    for question in (early, soon):
        answer = reader.ask(question)
        assert same(answer, reference.answer(question))
        assert answer.cached_tokens == 0
        assert answer.seconds < 2 * LOOKUP_SECONDS + SLACK_SECONDS
    reader.witness.wait_until_forgotten(scope, names, VICTIM)
    answer = reader.ask(late)
    assert same(answer, reference.answer(late))
    assert answer.seconds < LOOKUP_SECONDS
    reader.check_at_rest()


@pytest.mark.parametrize("seed", [1, 2])
def test_an_owner_may_die_at_any_moment_of_a_read(
    reference: Reference, lasting_pair: tuple[Node, Node], victim: Node, seed: int
) -> None:
    _, reader = lasting_pair
    reader.forget()  # there must be room for all that follows
    asked = questions(11)
    for question in asked:
        victim.compute(question, BLOCKS)
    expected = [reference.answer(question) for question in asked]
    chooser = random.Random(seed)
    lease, delay = chooser.randint(1, 6), chooser.uniform(0, 0.02)
    report = reader.witness.listen()
    with ThreadPoolExecutor(3) as threads:
        answers = threads.map(reader.ask, asked)
        reader.witness.wait(
            f"lease {lease} is asked for", lambda: len(report.of(Acquire, VICTIM)) >= lease
        )
        time.sleep(delay)  # which part of the read that is differs from run to run
        victim.engine.kill()
        for answer, right in zip(answers, expected, strict=True):
            assert same(answer, right)
            assert answer.seconds < 2 * LOOKUP_SECONDS + TRANSFER_SECONDS + SLACK_SECONDS
    for tokens in (0, BLOCKS * BLOCK_TOKENS):  # what was read in place went with its owner
        reader.forget_device()
        for question, right in zip(asked, expected, strict=True):
            answer = reader.ask(question)
            assert same(answer, right)
            assert answer.cached_tokens >= tokens
    reader.check_at_rest()

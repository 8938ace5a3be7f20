"""Two engines with far too little room, and many prompts at once."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

from kvbm_service.demo.engine import BLOCK_TOKENS
from kvbm_service.demo.talk import Answer
from tests.integration.conftest import Reference
from tests.integration.node import DEVICE_BLOCKS, HOST_BLOCKS, Node, prompt, same

FAMILIES = 6
"""Prompts of a family begin with the same blocks …"""
SHARED_BLOCKS = 4
MEMBERS = 10
AT_ONCE = 5
"""Prompts under way in each engine; more than its device pool has room for."""


def prompts() -> list[list[int]]:
    """All families' prompts; each goes on in its own way, for some blocks."""
    return [
        prompt(("family", family), SHARED_BLOCKS)[: SHARED_BLOCKS * BLOCK_TOKENS]
        + prompt((family, member), member % 7)
        for family in range(FAMILIES)
        for member in range(MEMBERS)
    ]


def ask_all(node: Node, questions: list[list[int]]) -> list[Answer]:
    """Ask in this order, `AT_ONCE` at a time."""
    with ThreadPoolExecutor(AT_ONCE) as threads:
        return list(threads.map(lambda question: node.ask(question, max_tokens=4), questions))


def test_every_answer_is_right_while_both_engines_evict_all_the_time(
    reference: Reference, pair: tuple[Node, Node]
) -> None:
    questions = prompts()
    blocks = FAMILIES * SHARED_BLOCKS + sum(len(q) // BLOCK_TOKENS for q in questions)
    assert blocks > 2 * (DEVICE_BLOCKS + HOST_BLOCKS), "this would be no pressure"
    expected = {tuple(question): reference.answer(question, 4) for question in questions}
    a, b = pair
    report = a.witness.listen()
    orders = [random.Random(seed).sample(questions, len(questions)) for seed in (1, 2)]
    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(ask_all, pair, orders))
    for order, answered in zip(orders, answers, strict=True):
        for question, answer in zip(order, answered, strict=True):
            assert same(answer, expected[tuple(question)])
    for node, other in ((a, b), (b, a)):
        assert report.removed(node.name) > HOST_BLOCKS, "the host tier evicted"
        sources = report.sources(node.name)
        assert sources[node.name] > 0, "the device pool evicted what came back from the host tier"
        assert sources[other.name] > 0
        assert report.failed(node.name) == 0

"""A prompt computed by one engine is reused by another: the main job, with everything real."""

from __future__ import annotations

import pytest

from kvbm_service.demo.engine import BLOCK_TOKENS
from tests.integration.conftest import Reference
from tests.integration.node import Node, prompt, same

Pair = tuple[Node, Node]

BLOCKS = 10
SHUNNED_SECONDS = 60.0
"""A node that failed another is asked again before this."""


@pytest.mark.parametrize("first", [0, 1], ids=["A first", "B first"])
def test_an_engine_reuses_what_another_has_computed(
    reference: Reference, pair: Pair, first: int
) -> None:
    owner, reader = pair[first], pair[1 - first]
    question = prompt(f"one way {first}", BLOCKS)
    expected = reference.answer(question)
    assert same(owner.compute(question, BLOCKS)[0], expected)
    report = reader.witness.listen()
    answer = reader.ask(question)
    assert same(answer, expected)
    assert answer.cached_tokens == BLOCKS * BLOCK_TOKENS
    assert reader.wait_loaded(report) == {owner.name: BLOCKS}


def test_only_the_part_that_somebody_has_is_reused(reference: Reference, pair: Pair) -> None:
    a, b = pair
    short = prompt("short", 4)
    question = short[: 4 * BLOCK_TOKENS] + prompt("the rest", 5)
    a.compute(short, 4)
    answer = b.ask(question)
    assert same(answer, reference.answer(question))
    assert answer.cached_tokens == 4 * BLOCK_TOKENS


def test_a_prompt_is_put_together_from_own_and_others_blocks(
    reference: Reference, pair: Pair
) -> None:
    a, b = pair
    long = prompt("from both", BLOCKS)
    short = long[: 4 * BLOCK_TOKENS] + prompt("b's own", 0)
    b.compute(short, 4)
    a.compute(long, BLOCKS - 4)  # the first four it reads from b, in place
    b.forget_device()
    report = b.witness.listen()
    answer = b.ask(long)
    assert same(answer, reference.answer(long))
    sources = b.wait_loaded(report)
    assert sources == {b.name: 4, a.name: BLOCKS - 4}


def test_two_engines_read_from_each_other_at_once(reference: Reference, pair: Pair) -> None:
    a, b = pair
    blocks = 5
    theirs = {node: [prompt((node.name, i), blocks) for i in range(4)] for node in pair}
    for node in pair:
        for question in theirs[node]:
            node.compute(question, blocks)
    report = a.witness.listen()
    under_way = [
        (question, reader.engine.submit(question))
        for pairs in zip(theirs[a], theirs[b], strict=True)
        for question, reader in zip(pairs, (b, a), strict=True)
    ]
    for question, answer in under_way:
        assert same(answer.result(60), reference.answer(question))
        assert answer.result().cached_tokens == blocks * BLOCK_TOKENS
    for reader, owner in ((a, b), (b, a)):
        wanted = {owner.name: 4 * blocks}
        a.witness.wait(
            f"{reader.name} has loaded {wanted}",
            lambda reader=reader, wanted=wanted: report.sources(reader.name) == wanted,  # type: ignore[misc]
        )


def test_another_prefix_gives_another_answer(reference: Reference, pair: Pair) -> None:
    """The comparison that all these tests rest on can fail."""
    one, other = (reference.answer(prompt(("prefix", i), BLOCKS)) for i in range(2))
    assert not same(one, other)


def test_another_salt_shares_nothing(pair: Pair) -> None:
    a, b = pair
    question = prompt("salted", BLOCKS)
    a.compute(question, BLOCKS)
    assert b.ask(question, salt="somebody else").cached_tokens == 0


def test_a_loaded_block_has_exactly_the_bytes_that_its_owner_computed(pair: Pair) -> None:
    a, b = pair
    question = prompt("bytes", BLOCKS)
    _, _, names = a.compute(question, BLOCKS)
    sums = []
    for node in (a, b):
        with node.running(question) as blocks:
            (found,) = node.engine.call_workers("kvbm_device_sums", blocks[:BLOCKS])
            sums.append(found)
    computed, loaded = sums
    assert len(set(computed)) == BLOCKS, "blocks that are all alike prove nothing"
    assert loaded == computed
    (kept,) = a.engine.call_workers("kvbm_slab_sums", [name.hex() for name in names])
    assert kept == computed


def test_a_loaded_block_that_is_spoiled_changes_the_answer(
    reference: Reference, pair: Pair
) -> None:
    """An answer shows whether every one of its blocks is right."""
    a, b = pair
    question = prompt("spoiled on the device", BLOCKS)
    expected = reference.answer(question)
    a.compute(question, BLOCKS)
    with b.running(question) as blocks:
        spoiled = blocks[3]
    report = b.witness.listen()
    assert same(b.ask(question), expected)
    b.engine.call_workers("kvbm_spoil_device", spoiled)
    assert not same(b.ask(question), expected)
    assert report.sources(b.name) == {}, "it was not loaded again meanwhile"
    b.forget_device()
    assert same(b.ask(question), expected)


def test_a_spoiled_block_of_the_own_tier_is_noticed_and_computed_again(
    reference: Reference, pair: Pair
) -> None:
    a, _ = pair
    question = prompt("spoiled in the own tier", BLOCKS)
    expected = reference.answer(question)
    _, _, names = a.compute(question, BLOCKS)
    a.forget_device()
    a.engine.call_workers("kvbm_spoil_slab", names[4].hex())
    report = a.witness.listen()
    assert same(a.ask(question), expected)
    a.witness.wait("the failure is told", lambda: report.failed(a.name) == 1)
    assert report.removed(a.name) == 1
    a.wait_stored(report, 1)
    assert report.stored(a.name) == [names[4]]
    a.forget_device()
    answer = a.ask(question)
    assert answer.cached_tokens == BLOCKS * BLOCK_TOKENS
    assert same(answer, expected)


def test_a_spoiled_block_of_another_node_is_noticed_and_computed_again(
    reference: Reference, pair: Pair
) -> None:
    a, b = pair
    question = prompt("spoiled elsewhere", BLOCKS)
    _, _, names = a.compute(question, BLOCKS)
    a.engine.call_workers("kvbm_spoil_slab", names[4].hex())
    report = b.witness.listen()
    assert same(b.ask(question), reference.answer(question))
    b.witness.wait("the failure is told", lambda: report.failed(b.name) == 1)
    b.wait_until_it_reads_from(a, SHUNNED_SECONDS)

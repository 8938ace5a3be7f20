"""Engines of two ranks: a block is there only when both ranks hold it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvbm_schemas.block import unpack
from kvbm_schemas.requests import Acquire, Lookup
from kvbm_service.demo.engine import BLOCK_TOKENS, share_cores
from tests.integration.conftest import Engines, Reference, Site
from tests.integration.node import Node, prompt, same

Pair = tuple[Node, Node]

BLOCKS = 8


@pytest.fixture(scope="module")
def lasting_wide_pair(site: Site, lasting_engines: Engines) -> Pair:
    """Two nodes of two ranks each."""
    started = [
        lasting_engines.start_node(name, site.cluster.url, ranks=2, cores=cores)
        for name, cores in zip(("wide-A", "wide-B"), share_cores(2, 2), strict=True)
    ]
    a, b = (Node(engine.wait_ready(), site.witness).wait_joined() for engine in started)
    return a, b


@pytest.fixture
def wide_pair(lasting_wide_pair: Pair) -> Iterator[Pair]:
    """The two, without any block; at rest afterwards."""
    for node in lasting_wide_pair:
        node.forget()
    yield lasting_wide_pair
    for node in lasting_wide_pair:
        node.check_at_rest()


def test_two_ranks_get_their_own_blocks_back(reference: Reference, wide_pair: Pair) -> None:
    a, _ = wide_pair
    question = prompt("own, wide", BLOCKS)
    computed, _, _ = a.compute(question, BLOCKS)
    a.forget_device()
    answer = a.ask(question)
    assert answer.cached_tokens == BLOCKS * BLOCK_TOKENS
    assert same(answer, reference.answer(question))
    assert same(computed, reference.answer(question))


def test_two_ranks_read_from_two_ranks_each_its_half(reference: Reference, wide_pair: Pair) -> None:
    a, b = wide_pair
    question = prompt("others, wide", BLOCKS)
    a.compute(question, BLOCKS)
    report = b.witness.listen()
    with a.running(question) as blocks:
        computed = a.engine.call_workers("kvbm_device_sums", blocks[:BLOCKS])
    with b.running(question) as blocks:
        loaded = b.engine.call_workers("kvbm_device_sums", blocks[:BLOCKS])
    assert b.wait_loaded(report) == {a.name: BLOCKS}
    assert loaded == computed
    assert computed[0] != computed[1], "the ranks hold different halves"
    assert same(b.ask(question), reference.answer(question))


def test_a_block_is_there_only_when_both_ranks_hold_it(
    reference: Reference, wide_pair: Pair
) -> None:
    a, b = wide_pair
    question = prompt("half a block", BLOCKS)
    expected = reference.answer(question)  # before a rank is held: its engine then keeps stepping
    report = a.witness.listen()
    a.engine.call_workers("kvbm_hold", 1)
    assert same(a.ask(question), expected)
    (lookup,) = report.of(Lookup)
    names = [name.hex() for name in unpack(lookup.hashes)]

    def halves() -> list[int]:
        sums = a.engine.call_workers("kvbm_slab_sums", names)
        return [BLOCKS - found.count("") for found in sums]

    a.witness.wait("the first rank has its half", lambda: halves()[0] == BLOCKS)
    assert halves() == [BLOCKS, 0]
    assert report.stored(a.name) == []
    assert b.ask(question).cached_tokens == 0
    a.engine.call_workers("kvbm_let_go")
    assert len(a.wait_stored(report, BLOCKS)) == BLOCKS
    assert halves() == [BLOCKS, BLOCKS]


def test_engines_of_one_and_of_two_ranks_do_not_see_each_other(
    wide_pair: Pair, lasting_pair: Pair
) -> None:
    narrow, wide = lasting_pair[0], wide_pair[0]
    question = prompt("narrow or wide", BLOCKS)
    narrow.compute(question, BLOCKS)
    report = wide.witness.listen()
    assert wide.ask(question).cached_tokens == 0
    assert report.of(Acquire) == []

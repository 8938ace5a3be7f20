"""What answers of registries say about prefixes."""

from __future__ import annotations

from kvbm_schemas.block import Tier
from kvbm_schemas.requests import Holder
from kvbm_service.route.prefixes import MAX_ASKED_BLOCKS, Found, prefixes, spaced


def at(*nodes: str) -> list[tuple[Holder, ...]]:
    """Holders of a row of blocks; each word lists the nodes that hold one."""
    return [tuple(Holder(node, Tier.HOST) for node in word) for word in nodes]


def test_each_node_has_the_prefix_that_it_holds_without_a_gap() -> None:
    found = prefixes(range(5), at("abc", "ab", "ac", "a", ""))
    assert found == Found({"a": 4, "b": 2, "c": 1}, anywhere=4)


def test_several_nodes_together_may_have_more_than_each() -> None:
    assert prefixes(range(4), at("a", "b", "c", "")) == Found({"a": 1}, anywhere=3)
    assert prefixes(range(2), at("", "a")) == Found({}, anywhere=0)
    assert prefixes([], []) == Found({}, 0)


def test_of_a_long_prompt_evenly_spaced_blocks_are_asked_about() -> None:
    assert spaced(3, 5) == [0, 1, 2]
    assert spaced(10, 5) == [1, 3, 5, 7, 9]
    positions = spaced(4_001, MAX_ASKED_BLOCKS)
    assert len(positions) == len(set(positions)) == MAX_ASKED_BLOCKS
    assert positions[-1] == 4_000
    assert prefixes([1, 3, 5], at("a", "a", "")) == Found({"a": 4}, 4)

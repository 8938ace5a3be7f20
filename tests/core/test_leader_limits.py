"""What is bounded, and what happens at the bound; and forgetting everything at once."""

from __future__ import annotations

import pytest

from kvbm_schemas.block import pack
from kvbm_schemas.events import Cleared
from kvbm_service.core import lookups
from kvbm_service.core.effects import AskOwner, AskRegistry, GiveBack, Publish
from kvbm_service.core.reads import MAX_PARTS
from tests.core.builders import Rig, chain, leased, located


def test_beyond_the_limit_requests_are_simply_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookups, "MAX_READERS", 1)
    rig = Rig()
    rig.save("a")
    rig.leader.arrive("one", chain("a"), now=0.0)
    rig.leader.arrive("two", chain("a"), now=0.0)
    assert rig.leader.match("one", 0, now=0.0) == 1
    assert rig.leader.match("two", 0, now=0.0) == 0
    rig.leader.load("two", 0, [], now=0.0)
    rig.leader.finish("two")
    rig.leader.finish("one")
    rig.leader.arrive("three", chain("a"), now=0.0)
    assert rig.leader.match("three", 0, now=0.0) == 1


def test_a_prefix_comes_from_a_limited_number_of_places() -> None:
    rig = Rig()
    names = "abcdefghijkl"
    for node in names:
        rig.meet(node)
    rig.leader.arrive("r", chain(names), now=0.0)
    places = [(node, 1) for node in names]
    rig.leader.located("r", rig.effect(AskRegistry).attempt, located(*places), now=0.0)
    rig.leader.match("r", 0, now=0.0)
    questions = rig.effects(AskOwner)
    assert len(questions) == MAX_PARTS
    for question in questions:
        grant = leased(question.node, 1)
        rig.leader.answered("r", question.attempt, question.node, question.start, grant, 0.0, 0.0)
    assert rig.leader.match("r", 0, now=0.0) == MAX_PARTS


def test_a_lookup_deadline_of_nothing_means_that_nobody_is_ever_asked() -> None:
    rig = Rig()
    rig.leader.lookups._limits = rig.leader._limits._replace(lookup_seconds=0.0)
    rig.leader.arrive("r", chain("ab"), now=0.0)
    assert rig.leader.match("r", 0, now=0.0) == 0
    assert rig.effects(AskRegistry) == []


def test_a_reset_forgets_every_block_and_says_so_once() -> None:
    rig = Rig()
    rig.save("abc")
    rig.leader.reset()
    assert [type(effect.event) for effect in rig.effects(Publish)] == [Cleared]
    assert rig.readable() == []
    assert rig.leader.tiers.host.used == 0


def test_a_reset_forgets_blocks_on_their_way() -> None:
    rig = Rig()
    rig.leader.store(chain("a"), [1])
    (save,) = rig.leader.take_commands(0.0).saves
    rig.leader.reset()
    rig.effects(Publish)
    rig.saved(save.op)
    assert rig.effects(Publish) == []
    assert rig.leader.tiers.host.used == 0
    assert rig.leader.take_freed_blocks() == [1]


def test_a_reset_forgets_blocks_that_no_rank_was_told_of_yet() -> None:
    rig = Rig()
    rig.leader.store(chain("a"), [1])
    rig.leader.reset()
    (save,) = rig.leader.take_commands(0.0).saves
    rig.saved(save.op)
    assert rig.leader.tiers.host.used == 0
    assert rig.leader.take_freed_blocks() == [1]


def test_a_reset_drops_plans_and_gives_their_leases_back() -> None:
    rig = Rig()
    rig.save("a")
    rig.meet("b")
    rig.leader.arrive("r", chain("ab"), now=0.0)
    rig.leader.located("r", rig.effect(AskRegistry).attempt, located(("b", 1)), now=0.0)
    rig.leader.match("r", 0, now=0.0)
    asked = rig.effect(AskOwner)
    rig.leader.answered("r", asked.attempt, "b", 1, leased("b", 1), 0.0, 0.0)
    assert rig.leader.match("r", 0, now=0.0) == 2
    rig.leader.reset()
    assert rig.effect(GiveBack).node == "b"
    assert rig.leader.tiers.host.used == 0


def test_a_reset_leaves_leased_and_loading_slots_to_their_readers() -> None:
    rig = Rig(slots=4)
    rig.save("abcd")
    rig.leader.acquire(pack(chain("a")), "a-token-of-sixteen", now=0.0)
    rig.leader.arrive("r", chain("ab"), now=0.0)
    assert rig.leader.match("r", 0, now=0.0) == 2
    rig.leader.load("r", 0, [1, 2], now=0.0)
    load = rig.load_command()
    rig.leader.reset()
    rig.leader.check_integrity()
    assert rig.leader.tiers.host.used == 2
    assert rig.leader.store(chain("wxyz"), [3, 4, 5, 6]) == (2, [3, 4])
    rig.loaded(load)
    rig.leader.release("a-token-of-sixteen")
    assert rig.leader.tiers.host.pinned == 0
    assert rig.leader.store(chain("yz"), [5, 6]) == (2, [5, 6])
    rig.leader.check_integrity()

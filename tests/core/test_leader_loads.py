"""Loads: the promise written out as a command, and what happens when it ends."""

from __future__ import annotations

import pytest

from kvbm_schemas.block import unpack
from kvbm_schemas.events import Removed
from kvbm_schemas.step import Load
from kvbm_service.core.columns import pack_u32, unpack_u32, unpack_u64
from kvbm_service.core.effects import Announce, AskOwner, AskRegistry, GiveBack, Publish
from kvbm_service.core.peers import SHUN_SECONDS
from kvbm_service.core.reads import Hits
from tests.core.builders import LEASE_SECONDS, Rig, chain, leased, located


def loading_own(rig: Rig, names: str, device_blocks: list[int]) -> Load:
    """A request `r` loads blocks that are here."""
    rig.leader.peers.online = False
    rig.leader.arrive("r", chain(names), now=0.0)
    assert rig.leader.match("r", 0, now=0.0) == len(names)
    rig.leader.load("r", 0, device_blocks, now=0.0)
    return rig.load_command()


def loading_mixed(rig: Rig, now: float = 0.0) -> Load:
    """A request `r` loads `ab` from here and `cd` from node `b` into blocks 10 to 13."""
    rig.save("ab")
    rig.meet("b")
    rig.leader.arrive("r", chain("abcd"), now)
    question = rig.effect(AskRegistry)
    rig.leader.located("r", question.attempt, located(("b", 2)), now)
    assert rig.leader.match("r", 0, now) is None
    asked = rig.effect(AskOwner)
    grant = leased("b", 2, rig.world_size)
    rig.leader.answered("r", asked.attempt, "b", asked.start, grant, now, now)
    assert rig.leader.match("r", 0, now) == 4
    rig.leader.load("r", 0, [10, 11, 12, 13], now)
    return rig.load_command()


def test_a_load_names_each_block_where_it_is_and_where_it_goes() -> None:
    rig = Rig()
    load = loading_mixed(rig)
    assert load.local is not None
    assert unpack(load.local.hashes) == chain("ab")
    assert list(unpack_u32(load.local.blocks)) == [10, 11]
    slots = list(unpack_u32(load.local.slots))
    assert list(unpack_u64(load.local.fills)) == rig.leader.tiers.host.fills(slots)
    (remote,) = load.remote
    assert (remote.node, remote.agents) == ("b", ("b/0/1",))
    assert unpack(remote.hashes) == chain("cd")
    assert list(unpack_u32(remote.blocks)) == [12, 13]
    assert list(unpack_u32(remote.slots)) == [100, 101]
    assert list(unpack_u64(remote.fills)) == [500, 501]
    assert rig.leader.hits("r") == Hits(host=2, remote=2)


def test_a_load_may_begin_later_and_end_earlier_than_was_promised() -> None:
    rig = Rig()
    rig.save("abc")
    rig.leader.peers.online = False
    rig.leader.arrive("r", chain("abc"), now=0.0)
    assert rig.leader.match("r", 0, now=0.0) == 3
    rig.leader.load("r", 1, [7], now=0.0)
    load = rig.load_command()
    assert load.local is not None
    assert unpack(load.local.hashes) == chain("b")
    rig.loaded(load)
    assert rig.leader.tiers.host.pinned == 0


def test_a_load_of_leased_blocks_alone_has_no_local_part() -> None:
    rig = Rig()
    rig.save("ab")
    rig.meet("b")
    rig.leader.arrive("r", chain("abcd"), 0.0)
    rig.leader.located("r", rig.effect(AskRegistry).attempt, located(("b", 2)), 0.0)
    rig.leader.match("r", 0, 0.0)
    asked = rig.effect(AskOwner)
    rig.leader.answered("r", asked.attempt, "b", 2, leased("b", 2), 0.0, 0.0)
    assert rig.leader.match("r", 3, 0.0) == 1
    rig.leader.load("r", 3, [9], 0.0)
    load = rig.load_command()
    assert load.local is None
    assert list(unpack_u32(load.remote[0].slots)) == [101]


def test_more_than_was_promised_cannot_be_loaded() -> None:
    rig = Rig(online=False)
    rig.save("a")
    rig.leader.arrive("r", chain("ab"), now=0.0)
    assert rig.leader.match("r", 0, now=0.0) == 1
    with pytest.raises(AssertionError):
        rig.leader.load("r", 0, [1, 2], now=0.0)


def test_a_remote_read_gets_no_more_time_than_its_lease_has_left() -> None:
    rig = Rig()
    (remote,) = loading_mixed(rig).remote
    assert remote.seconds == 10.0
    rig = Rig()
    rig.save("a")
    rig.meet("b")
    rig.leader.arrive("r", chain("ab"), 0.0)
    rig.leader.located("r", rig.effect(AskRegistry).attempt, located(("b", 1)), 0.0)
    rig.leader.match("r", 0, 0.0)
    asked = rig.effect(AskOwner)
    rig.leader.answered("r", asked.attempt, "b", 1, leased("b", 1, seconds=6.0), 0.0, 0.0)
    assert rig.leader.match("r", 0, 2.0) == 2
    rig.leader.load("r", 0, [1, 2], 2.0)
    (remote,) = rig.load_command().remote
    assert remote.seconds == pytest.approx(4.0)


def test_pins_and_leases_last_until_every_rank_is_done() -> None:
    rig = Rig(world_size=2)
    load = loading_mixed(rig)
    rig.loaded(load, rank=0)
    assert rig.effects(GiveBack) == []
    assert rig.leader.tiers.host.pinned == 2
    rig.loaded(load, rank=1)
    assert rig.effect(GiveBack) == GiveBack("b", leased("b", 2).lease)
    assert rig.leader.tiers.host.pinned == 0
    assert not rig.leader.busy


def test_a_load_is_announced_with_its_sources() -> None:
    rig = Rig()
    rig.loaded(loading_mixed(rig), failed=(13,), now=0.5)
    loaded = rig.effect(Announce).loaded
    assert [(source.node, source.blocks) for source in loaded.sources] == [("me", 2), ("b", 1)]
    assert (loaded.request, loaded.failed, loaded.seconds) == ("r", 1, 0.5)


def test_a_rank_reports_a_load_once() -> None:
    rig = Rig(world_size=2)
    load = loading_mixed(rig)
    rig.loaded(load, rank=0)
    rig.loaded(load, rank=0)
    assert rig.leader.busy


def test_while_it_loads_a_request_is_promised_nothing_more() -> None:
    rig = Rig()
    rig.save("ab")
    loading_own(rig, "ab", [1, 2])
    assert rig.leader.match("r", 0, now=0.0) == 0


def test_a_request_that_has_loaded_may_be_preempted_and_load_again() -> None:
    rig = Rig()
    rig.save("ab")
    rig.loaded(loading_own(rig, "ab", [1, 2]))
    assert rig.leader.match("r", 0, now=1.0) == 2


def test_a_request_whose_load_failed_is_computed() -> None:
    rig = Rig()
    rig.save("ab")
    rig.loaded(loading_own(rig, "ab", [1, 2]), failed=(2,))
    assert rig.leader.match("r", 0, now=0.0) == 0


def test_an_own_block_that_could_not_be_read_is_forgotten_and_told_of() -> None:
    rig = Rig()
    rig.save("ab")
    rig.loaded(loading_own(rig, "ab", [1, 2]), failed=(2,))
    (removed,) = [effect.event for effect in rig.effects(Publish)]
    assert isinstance(removed, Removed)
    assert unpack(removed.hashes) == chain("b")
    assert rig.leader.tiers.host.match(chain("ab")) == 1


def test_a_block_that_failed_on_two_ranks_is_told_of_once() -> None:
    rig = Rig(world_size=2)
    rig.save("ab")
    load = loading_own(rig, "ab", [1, 2])
    rig.loaded(load, rank=0, failed=(2,))
    assert rig.effects(Publish) == []
    rig.loaded(load, rank=1, failed=(2,))
    assert len(rig.effects(Publish)) == 1


def test_a_node_whose_blocks_could_not_be_read_is_left_alone_for_a_while() -> None:
    rig = Rig()
    load = loading_mixed(rig, now=100.0)
    rig.loaded(load, failed=(12, 13), now=100.0)
    assert not rig.leader.peers.can_ask("b", now=100.0)
    assert rig.leader.peers.can_ask("b", now=100.0 + SHUN_SECONDS)
    assert rig.leader.tiers.host.match(chain("ab")) == 2
    assert len(rig.effects(GiveBack)) == 1


def test_a_load_goes_on_when_its_request_is_aborted() -> None:
    rig = Rig(slots=2)
    rig.save("ab")
    load = loading_own(rig, "ab", [1, 2])
    rig.leader.finish("r")
    assert rig.leader.store(chain("cd"), [3, 4]) == (0, [])
    rig.loaded(load)
    assert rig.leader.store(chain("cd"), [3, 4]) == (2, [3, 4])


def test_the_load_of_an_earlier_request_of_that_name_does_not_count_for_a_later_one() -> None:
    rig = Rig()
    rig.save("ab")
    first = loading_own(rig, "ab", [1, 2])
    rig.leader.finish("r")
    second = loading_own(rig, "ab", [3, 4])
    rig.loaded(first, failed=())
    assert rig.leader.match("r", 0, now=0.0) == 0
    rig.loaded(second, failed=(3,))
    assert rig.leader.match("r", 0, now=0.0) == 0
    assert not rig.leader.busy


def test_an_engine_that_wants_nothing_of_what_was_promised_gives_all_back() -> None:
    rig = Rig()
    rig.save("ab")
    rig.leader.peers.online = False
    rig.leader.arrive("r", chain("ab"), now=0.0)
    rig.leader.match("r", 0, now=0.0)
    rig.leader.load("r", 0, [], now=0.0)
    assert rig.leader.tiers.host.pinned == 0
    assert rig.leader.take_commands(0.0).loads == ()


def test_a_plan_may_be_older_than_half_a_lease_while_it_loads() -> None:
    rig = Rig()
    load = loading_mixed(rig)
    rig.leader.tick(now=LEASE_SECONDS)
    assert rig.leader.tiers.host.pinned == 2
    rig.loaded(load)
    assert rig.leader.tiers.host.pinned == 0


def test_a_column_of_failed_blocks_is_understood() -> None:
    assert list(unpack_u32(pack_u32((1, 1 << 31)))) == [1, 1 << 31]

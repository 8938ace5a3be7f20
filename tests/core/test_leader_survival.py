"""What an earlier life left in the tiers: what of it is taken over, and how all is forgotten."""

from __future__ import annotations

import pytest

from kvbm_schemas.block import HASH_BYTES, BlockHash, Tier, count, unpack
from kvbm_schemas.events import Cleared, Removed, Stored
from kvbm_schemas.message import MAX_BATCH_BLOCKS
from kvbm_schemas.step import Survivors
from kvbm_service.core.columns import pack_u32, pack_u64, unpack_u32, unpack_u64
from kvbm_service.core.effects import Publish
from kvbm_service.core.reads import Hits
from tests.core.builders import Rig, chain, survivors

TIERS = [Tier.HOST, Tier.DISK]


def adopt(rig: Rig, *found: Survivors) -> int:
    """The leader is told what each rank has found."""
    adopted = rig.leader.adopt(found)
    rig.leader.check_integrity()
    return adopted


def events(rig: Rig) -> list[object]:
    return [effect.event for effect in rig.effects(Publish)]


# -- what is taken over ------------------------------------------------------------------------


@pytest.mark.parametrize("tier", TIERS)
def test_what_all_ranks_have_alike_is_taken_over_and_told_of(tier: Tier) -> None:
    rig = Rig(disk=8, world_size=2)
    found = survivors(tier, "abc", slots=[5, 0, 7], fills=[30, 10, 20])
    assert adopt(rig, found, found) == 3
    (stored,) = events(rig)
    assert isinstance(stored, Stored)
    assert (stored.tier, unpack(stored.hashes)) == (tier, chain("abc"))
    assert set(rig.readable(tier)) == set(chain("abc"))


@pytest.mark.parametrize("tier", TIERS)
def test_what_was_taken_over_is_read_from_its_slot_under_its_stamp(tier: Tier) -> None:
    rig = Rig(disk=8, online=False)
    adopt(rig, survivors(tier, "abc", slots=[5, 0, 7], fills=[30, 10, 20]))
    load = rig.load("abc", [1, 2, 3])
    read = load.local if tier is Tier.HOST else load.disk
    assert read is not None
    assert list(unpack_u32(read.slots)) == [5, 0, 7]
    assert list(unpack_u64(read.fills)) == [30, 10, 20]


def test_both_tiers_are_taken_over() -> None:
    rig = Rig(disk=8, online=False)
    adopt(rig, survivors(Tier.HOST, "ab", slots=[0, 1]))
    adopt(rig, survivors(Tier.DISK, "bc", slots=[0, 1]))
    rig.load("abc", [1, 2, 3])
    assert rig.leader.hits("r") == Hits(host=2, disk=1)


@pytest.mark.parametrize(
    "other",
    [
        survivors(Tier.HOST, "ac", slots=[0, 2], fills=[10, 30]),
        survivors(Tier.HOST, "abc", slots=[0, 3, 2], fills=[10, 20, 30]),
        survivors(Tier.HOST, "abc", slots=[0, 1, 2], fills=[10, 21, 30]),
        survivors(Tier.HOST, "axc", slots=[0, 1, 2], fills=[10, 20, 30]),
        survivors(Tier.HOST, "cax", slots=[2, 0, 5], fills=[30, 10, 50]),
    ],
    ids=["missing", "in another slot", "another stamp", "another block", "in another order"],
)
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_block_that_one_rank_has_not_alike_is_dropped(other: Survivors, rank: int) -> None:
    rig = Rig(world_size=3)
    found = [survivors(Tier.HOST, "abc", slots=[0, 1, 2], fills=[10, 20, 30])] * 3
    found[rank] = other
    assert adopt(rig, *found) == 2
    assert set(rig.readable()) == set(chain("ac"))
    assert rig.leader.tiers.host.used == 2


def test_when_one_rank_has_lost_everything_nothing_is_taken_over() -> None:
    rig = Rig(world_size=2)
    found = survivors(Tier.HOST, "abc", slots=[0, 1, 2])
    assert adopt(rig, found, survivors(Tier.HOST, "", slots=[])) == 0
    assert events(rig) == []
    assert rig.leader.tiers.empty


def test_slots_that_are_in_use_or_not_there_are_left_alone() -> None:
    rig = Rig(slots=4)
    rig.leader.store(chain("x"), [1])
    (save,) = rig.step().saves
    (taken,) = unpack_u32(save.slots)
    free = next(slot for slot in range(4) if slot != taken)
    assert adopt(rig, survivors(Tier.HOST, "abc", slots=[taken, free, 4])) == 1
    assert rig.readable() == chain("b")
    rig.saved(save.op)
    assert set(rig.readable()) == set(chain("bx"))


def test_a_block_is_taken_over_once() -> None:
    rig = Rig()
    assert adopt(rig, survivors(Tier.HOST, "aab", slots=[0, 1, 2])) == 2
    assert adopt(rig, survivors(Tier.HOST, "ab", slots=[3, 4])) == 0
    assert rig.leader.tiers.host.used == 2


def test_what_is_on_a_disk_that_is_not_used_any_more_is_left_there() -> None:
    rig = Rig(disk=0)
    assert adopt(rig, survivors(Tier.DISK, "ab", slots=[0, 1])) == 0
    assert events(rig) == []


def test_a_great_many_blocks_are_told_of_in_portions() -> None:
    blocks = MAX_BATCH_BLOCKS + 1
    rig = Rig(slots=blocks)
    hashes = b"".join(number.to_bytes(HASH_BYTES, "big") for number in range(blocks))
    columns = {"slots": pack_u32(range(blocks)), "fills": pack_u64([7] * blocks)}
    assert adopt(rig, Survivors(tier=Tier.HOST, hashes=hashes, **columns)) == blocks
    told = [count(event.hashes) for event in events(rig) if isinstance(event, Stored)]
    assert told == [MAX_BATCH_BLOCKS, 1]


# -- life goes on ------------------------------------------------------------------------------


@pytest.mark.parametrize("alike", [True, False])
def test_no_number_of_an_earlier_life_is_used_again(alike: bool) -> None:
    """A stamp tells a slot's present contents from earlier ones, taken over or not."""
    rig = Rig(world_size=2)
    first = survivors(Tier.HOST, "ab", slots=[0, 1], fills=[7, 5000])
    other = first if alike else survivors(Tier.HOST, "a", slots=[0], fills=[9000])
    adopt(rig, first, other)
    rig.leader.store(chain("x"), [1])
    (save,) = rig.step().saves
    assert save.op > (5000 if alike else 9000)


def test_the_oldest_goes_first() -> None:
    rig = Rig(slots=4, online=False)
    adopt(rig, survivors(Tier.HOST, "dacb", slots=range(4)))
    rig.effects(Publish)
    gone: list[BlockHash] = []
    for name in "wxy":
        rig.leader.store(chain(name), [1])
        for event in events(rig):
            assert isinstance(event, Removed)
            gone += unpack(event.hashes)
    assert gone == chain("dac")


def test_what_was_taken_over_in_the_host_tier_goes_to_disk_when_it_is_used() -> None:
    rig = Rig(disk=8, online=False, min_frequency=1)
    adopt(rig, survivors(Tier.HOST, "ab", slots=[0, 1]))
    assert rig.step().spills == ()
    rig.loaded(rig.load("ab", [1, 2]))
    (spill,) = rig.step().spills
    assert unpack(spill.hashes) == chain("ab")


def test_what_was_taken_over_and_cannot_be_read_is_dropped() -> None:
    rig = Rig(disk=8, online=False)
    adopt(rig, survivors(Tier.DISK, "ab", slots=[0, 1]))
    rig.loaded(rig.load("ab", [1, 2]), failed=(1,))
    assert rig.readable(Tier.DISK) == chain("b")


# -- forgetting --------------------------------------------------------------------------------


def test_a_reset_lets_no_later_life_find_anything() -> None:
    rig = Rig(disk=8)
    rig.save("a")
    rig.on_disk("b")
    rig.leader.reset()
    assert [type(event) for event in events(rig)] == [Cleared]
    assert rig.leader.tiers.empty
    assert rig.leader.busy, "the ranks have to be told"
    assert rig.step().forget
    assert not rig.leader.busy
    assert not rig.step().forget


def test_without_a_reset_later_lives_find_what_is_there() -> None:
    rig = Rig(disk=8)
    rig.save("a")
    assert not rig.step().forget

"""Host and disk together: what is read from where, what goes where, and life without the disk."""

from __future__ import annotations

import pytest

from kvbm_schemas.block import BlockHash, Tier, unpack
from kvbm_schemas.events import Removed, Stored
from kvbm_schemas.step import Load, LocalRead
from kvbm_service.core.accounts import Path, Transferred
from kvbm_service.core.columns import unpack_u32, unpack_u64
from kvbm_service.core.effects import AskOwner, AskRegistry, Publish
from kvbm_service.core.reads import Hits
from tests.core.builders import Rig, chain, leased, located


def told(rig: Rig) -> list[tuple[str, Tier, list[BlockHash]]]:
    """The block events since the last call."""
    return [
        (type(effect.event).__name__, effect.event.tier, unpack(effect.event.hashes))
        for effect in rig.effects(Publish)
        if isinstance(effect.event, Stored | Removed)
    ]


def reads(part: LocalRead | None) -> dict[BlockHash, int]:
    """Which device block gets what."""
    assert part is not None
    return dict(zip(unpack(part.hashes), unpack_u32(part.blocks), strict=True))


def expected(names: str, *device_blocks: int) -> dict[BlockHash, int]:
    return dict(zip(chain(names), device_blocks, strict=True))


# -- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "disk"),
    [("ab", "cd"), ("cd", "ab"), ("ac", "bd"), ("bd", "ac"), ("ad", "bc"), ("", "abcd")],
)
def test_a_prefix_mixes_host_and_disk_per_block(host: str, disk: str) -> None:
    rig = Rig(disk=8)
    rig.save(host)
    rig.on_disk(disk)
    load = rig.load("abcd", [10, 11, 12, 13])
    where = dict(zip("abcd", (10, 11, 12, 13), strict=True))
    assert reads(load.disk) == expected(disk, *(where[name] for name in disk))
    if host:
        assert reads(load.local) == expected(host, *(where[name] for name in host))
    assert rig.leader.hits("r") == Hits(host=len(host), disk=len(disk))
    rig.loaded(load)
    assert rig.leader.tiers.host.pinned == 0
    assert rig.leader.tiers.pool(Tier.DISK).pinned == 0


def test_a_read_from_disk_names_the_slots_of_the_disk_and_their_stamps() -> None:
    rig = Rig(disk=8)
    rig.on_disk("ab")
    disk = rig.load("ab", [10, 11]).disk
    assert disk is not None
    assert list(unpack_u32(disk.slots)) == [0, 1]
    assert list(unpack_u64(disk.fills)) == rig.leader.tiers.pool(Tier.DISK).fills([0, 1])


def test_the_host_is_preferred_where_both_tiers_have_a_block() -> None:
    rig = Rig(disk=8)
    rig.save("ab")
    rig.on_disk("ab")
    load = rig.load("ab", [10, 11])
    assert load.disk is None
    assert reads(load.local) == expected("ab", 10, 11)


def test_a_host_copy_in_the_midst_of_blocks_on_disk_is_used() -> None:
    rig = Rig(disk=8)
    rig.on_disk("abc")
    rig.save("b")
    load = rig.load("abc", [10, 11, 12])
    assert reads(load.local) == expected("b", 11)
    assert reads(load.disk) == expected("ac", 10, 12)


def test_the_own_disk_is_preferred_to_other_nodes() -> None:
    rig = Rig(disk=8)
    rig.meet("b")
    rig.on_disk("ab")
    rig.leader.arrive("r", chain("ab"), now=0.0)
    assert rig.effects(AskRegistry) == []
    assert rig.leader.match("r", 0, now=0.0) == 2


def test_others_fill_the_gaps_between_own_blocks() -> None:
    """`a` and `e` are in the host, `c` is on the disk; node `b` has what lies between."""
    rig = Rig(disk=8)
    rig.meet("b")
    rig.save("ae")
    rig.on_disk("c")
    rig.leader.arrive("r", chain("abcdef"), now=0.0)
    question = rig.effect(AskRegistry)
    assert unpack(question.hashes) == chain("bdf")

    rig.leader.located("r", question.attempt, located(("b", 2)), now=0.0)
    assert rig.leader.match("r", 0, now=0.0) is None
    first, second = rig.effects(AskOwner)
    assert (first.start, unpack(first.hashes)) == (1, chain("b"))
    assert (second.start, unpack(second.hashes)) == (3, chain("d"))

    for number, asked in enumerate((second, first)):
        grant = leased("b", 1, number=number)
        rig.leader.answered("r", asked.attempt, "b", asked.start, grant, 0.0, 0.0)
    assert rig.leader.match("r", 0, now=0.0) == 5
    rig.leader.load("r", 0, [10, 11, 12, 13, 14], now=0.0)
    load = rig.load_command()
    assert reads(load.local) == expected("ae", 10, 14)
    assert reads(load.disk) == expected("c", 12)
    others = [dict(zip(unpack(r.hashes), unpack_u32(r.blocks), strict=True)) for r in load.remote]
    assert others == [expected("b", 11), expected("d", 13)]
    assert rig.leader.hits("r") == Hits(host=2, disk=1, remote=2)


def test_a_gap_that_nobody_fills_ends_the_prefix() -> None:
    rig = Rig(disk=8, online=False)
    rig.save("ad")
    rig.on_disk("b")
    rig.leader.arrive("r", chain("abcd"), now=0.0)
    assert rig.leader.match("r", 0, now=0.0) == 2
    assert rig.leader.tiers.host.pinned == 1


def test_when_one_owner_refuses_what_lies_behind_its_gap_is_not_promised() -> None:
    rig = Rig(disk=8)
    rig.meet("b")
    rig.on_disk("ac")
    rig.leader.arrive("r", chain("abc"), now=0.0)
    rig.leader.located("r", rig.effect(AskRegistry).attempt, located(("b", 1)), now=0.0)
    assert rig.leader.match("r", 0, now=0.0) is None
    asked = rig.effect(AskOwner)
    rig.leader.answered("r", asked.attempt, "b", 1, None, 0.0, 0.0)
    assert rig.leader.match("r", 0, now=0.0) == 1
    rig.leader.finish("r")
    assert rig.leader.tiers.pool(Tier.DISK).pinned == 0


def test_a_block_that_is_read_from_disk_is_not_evicted_from_there() -> None:
    rig = Rig(disk=2, min_frequency=0)
    rig.on_disk("ab")
    rig.load("ab", [10, 11])
    rig.save("cd")
    assert rig.step().spills == ()
    assert sorted(rig.readable(Tier.DISK)) == sorted(chain("ab"))


# -- slots -------------------------------------------------------------------------------------


def test_blocks_that_are_in_the_tier_cost_no_slots_though_it_is_full() -> None:
    rig = Rig(slots=2)
    rig.save("ab")
    assert rig.leader.store(chain("ab"), [1, 2]) == (2, [])
    assert told(rig) == []
    assert rig.step().saves == ()


def test_a_chain_does_not_make_room_for_its_tail_by_evicting_its_head() -> None:
    rig = Rig(slots=2)
    rig.save("ab")
    assert rig.leader.store(chain("abc"), [1, 2, 3]) == (2, [])
    assert told(rig) == []


def test_a_full_tier_drops_only_what_does_not_fit() -> None:
    rig = Rig(slots=4)
    rig.save("ab")
    rig.load("ab", [1, 2])
    assert rig.leader.store(chain("cdef"), [3, 4, 5, 6]) == (2, [3, 4])
    (save,) = rig.step().saves
    assert unpack(save.hashes) == chain("cd")
    rig.saved(save.op)
    assert set(rig.readable()) == set(chain("abcd"))


# -- a disk that fails -------------------------------------------------------------------------


def failed_disk_read(rig: Rig) -> Load:
    """`ab` is in the host, `cd` on the disk; `c` cannot be read."""
    rig.save("ab")
    rig.on_disk("cd")
    load = rig.load("abcd", [10, 11, 12, 13])
    rig.accounts(Transferred)
    rig.loaded(load, failed=(12,))
    return load


def test_a_block_that_could_not_be_read_from_disk_is_forgotten_there_and_told_of() -> None:
    rig = Rig(disk=8)
    failed_disk_read(rig)
    assert told(rig) == [("Removed", Tier.DISK, chain("c"))]
    assert rig.readable(Tier.DISK) == chain("d")
    assert set(rig.readable()) == set(chain("ab"))
    rig.leader.finish("r")
    rig.leader.peers.online = False
    rig.leader.arrive("s", chain("abcd"), now=0.0)
    assert rig.leader.match("s", 0, now=0.0) == 2


def test_a_failed_read_of_the_disk_is_accounted_for() -> None:
    rig = Rig(disk=8)
    failed_disk_read(rig)
    size = 64
    assert set(rig.accounts(Transferred)) == {
        Transferred(Path.HOST_TO_DEVICE, 2, 2 * size, 0, "", 0.0),
        Transferred(Path.DISK_TO_DEVICE, 1, size, 1, "unknown", 0.0),
    }


def test_a_block_that_is_in_both_tiers_outlives_its_copy_on_disk() -> None:
    rig = Rig(disk=8)
    rig.on_disk("ab")
    load = rig.load("ab", [10, 11])
    rig.save("ab")
    rig.loaded(load, failed=(10, 11))
    assert rig.readable(Tier.DISK) == []
    assert set(rig.readable()) == set(chain("ab"))


def test_a_lost_disk_is_told_of_and_serving_goes_on_without() -> None:
    rig = Rig(disk=8, online=False)
    rig.save("ab")
    rig.on_disk("bcd")
    rig.lose_disk()
    assert told(rig) == [("Removed", Tier.DISK, chain("bcd"))]
    assert rig.leader.disk_lost == "it is gone"
    assert [status.tier for status in rig.leader.status()] == [Tier.HOST]
    assert [tier for tier, _ in rig.leader.snapshot()[1]] == [Tier.HOST]
    rig.leader.arrive("r", chain("abcd"), now=0.0)
    assert rig.leader.match("r", 0, now=0.0) == 2
    assert rig.leader.store(chain("ef"), [5, 6]) == (2, [5, 6])


def test_a_disk_is_lost_once() -> None:
    rig = Rig(disk=8, world_size=2)
    rig.on_disk("a")
    rig.lose_disk(rank=1)
    assert len(told(rig)) == 1
    rig.lose_disk(rank=0)
    rig.lose_disk(rank=1)
    assert told(rig) == []


def test_nothing_more_goes_to_a_lost_disk() -> None:
    rig = Rig(slots=64, disk=8, min_frequency=0)
    rig.save("abcdefgh")
    assert rig.leader.busy
    rig.lose_disk()
    assert not rig.leader.busy
    assert rig.step().spills == ()
    rig.save("ij")
    assert rig.step().spills == ()
    assert not rig.leader.busy


def test_what_was_on_its_way_to_a_lost_disk_leaves_nothing_behind() -> None:
    rig = Rig(disk=8, min_frequency=0)
    rig.save("ab")
    (spill,) = rig.step().spills
    assert rig.leader.tiers.host.pinned == 2
    rig.lose_disk()
    rig.moved(spill.op, failed=(0, 1))
    assert rig.leader.tiers.host.pinned == 0
    assert set(rig.readable()) == set(chain("ab"))
    assert not rig.leader.busy


def test_what_is_being_read_from_a_lost_disk_is_recomputed() -> None:
    rig = Rig(disk=8)
    rig.save("a")
    rig.on_disk("b")
    load = rig.load("ab", [10, 11])
    rig.lose_disk()
    rig.effects(Publish)
    rig.loaded(load, failed=(11,))
    assert rig.leader.match("r", 0, now=0.0) == 0, "the request is computed"
    assert told(rig) == []
    assert rig.readable() == chain("a")


def test_what_was_promised_from_a_lost_disk_may_still_be_asked_for() -> None:
    """The engine may have been told of it already; it will be told that the load failed."""
    rig = Rig(disk=8, online=False)
    rig.on_disk("ab")
    rig.leader.arrive("r", chain("ab"), now=0.0)
    assert rig.leader.match("r", 0, now=0.0) == 2
    rig.lose_disk()
    rig.leader.load("r", 0, [1, 2], now=0.0)
    load = rig.load_command()
    assert reads(load.disk) == expected("ab", 1, 2)
    rig.loaded(load, failed=(1, 2))
    assert not rig.leader.busy


def test_a_plan_that_counted_on_a_lost_disk_can_be_dropped() -> None:
    rig = Rig(disk=8, online=False)
    rig.on_disk("ab")
    rig.leader.arrive("r", chain("ab"), now=0.0)
    assert rig.leader.match("r", 0, now=0.0) == 2
    rig.lose_disk()
    rig.leader.finish("r")
    rig.leader.check_integrity()


# -- only a disk -------------------------------------------------------------------------------


def test_with_only_a_disk_blocks_go_there_at_once_and_all_of_them() -> None:
    rig = Rig(slots=4, disk=8, disk_only=True)
    assert rig.leader.store(chain("abcdef"), [1, 2, 3, 4, 5, 6]) == (6, [1, 2, 3, 4, 5, 6])
    (save,) = rig.step().saves
    assert save.tier is Tier.DISK
    assert unpack(save.hashes) == chain("abcdef")
    rig.saved(save.op)
    assert told(rig) == [("Stored", Tier.DISK, chain("abcdef"))]
    assert rig.leader.take_freed_blocks() == [1, 2, 3, 4, 5, 6]
    (transfer,) = rig.accounts(Transferred)
    assert (transfer.path, transfer.blocks) == (Path.DEVICE_TO_DISK, 6)
    assert rig.step().spills == ()
    assert not rig.leader.busy


def test_with_only_a_disk_blocks_are_read_from_there() -> None:
    rig = Rig(slots=4, disk=8, disk_only=True)
    rig.save("abc")
    load = rig.load("abc", [1, 2, 3])
    assert load.local is None
    assert reads(load.disk) == expected("abc", 1, 2, 3)
    rig.loaded(load)
    assert rig.step().spills == ()


def test_with_only_a_disk_a_full_one_drops_only_what_does_not_fit() -> None:
    rig = Rig(slots=4, disk=2, disk_only=True)
    assert rig.leader.store(chain("abc"), [1, 2, 3]) == (2, [1, 2])


def test_with_only_a_disk_nothing_is_saved_when_it_is_lost() -> None:
    rig = Rig(slots=4, disk=8, disk_only=True)
    rig.save("a")
    rig.leader.store(chain("b"), [2])
    rig.lose_disk()
    (save,) = rig.step().saves
    assert rig.leader.store(chain("c"), [3]) == (1, [])
    rig.saved(save.op, good=False)
    assert rig.leader.take_freed_blocks() == [2]
    assert rig.leader.match("r", 0, now=0.0) == 0
    assert not rig.leader.busy

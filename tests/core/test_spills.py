"""Host → disk: which blocks go, how many at a time, and what that costs the host tier."""

from __future__ import annotations

import pytest

from kvbm_schemas.block import BlockHash, Tier, unpack
from kvbm_schemas.events import Removed, Stored
from kvbm_schemas.step import Spill
from kvbm_service.core import spills as spills_module
from kvbm_service.core.accounts import Path, Transferred
from kvbm_service.core.columns import unpack_u32, unpack_u64
from kvbm_service.core.effects import Publish
from kvbm_service.core.spills import MAX_PINNED_SHARE, SpillLimits
from tests.core.builders import Rig, chain

DECAY_SECONDS = 600.0


def unfiltered(
    slots: int = 64, disk: int = 64, batch: int = 16, batches: int = 4, world_size: int = 1
) -> Rig:
    """A node whose blocks all go to disk."""
    limits = SpillLimits(batch, batches)
    return Rig(slots, world_size, online=False, disk=disk, min_frequency=0, spill=limits)


def spilled(rig: Rig) -> list[list[BlockHash]]:
    """What goes to disk with the coming step, by portion."""
    return [unpack(spill.hashes) for spill in rig.step().spills]


def one_spill(rig: Rig) -> Spill:
    (spill,) = rig.step().spills
    return spill


def use(rig: Rig, names: str, now: float = 0.0) -> None:
    """A request reads these blocks from the host tier."""
    rig.leader.arrive("reader", chain(names), now)
    assert rig.leader.match("reader", 0, now) == len(names)
    rig.leader.load("reader", 0, range(len(names)), now)
    commands = rig.step(now)
    assert commands.spills == ()
    (load,) = commands.loads
    rig.loaded(load, now=now)
    rig.leader.finish("reader")


# -- which blocks go ---------------------------------------------------------------------------


def test_a_block_that_nobody_has_asked_for_stays_off_the_disk() -> None:
    rig = Rig(disk=8, online=False)
    rig.save("ab")
    assert spilled(rig) == []
    assert not rig.leader.busy


def test_a_block_goes_to_disk_when_it_is_used_for_the_first_time() -> None:
    rig = Rig(disk=8, online=False)
    rig.save("abc")
    use(rig, "ab")
    assert spilled(rig) == [chain("ab")]


def test_a_block_must_be_used_as_often_as_the_operator_wants() -> None:
    rig = Rig(disk=8, online=False, min_frequency=8)
    rig.save("a")
    use(rig, "a")  # 2
    use(rig, "a")  # 4
    assert spilled(rig) == []
    use(rig, "a")  # 8
    assert spilled(rig) == [chain("a")]


def test_a_block_that_is_used_too_late_stays_off_the_disk() -> None:
    rig = Rig(disk=8, online=False, decay_seconds=DECAY_SECONDS)
    rig.save("a")
    use(rig, "a", now=DECAY_SECONDS)
    assert spilled(rig) == []
    use(rig, "a", now=DECAY_SECONDS)
    assert spilled(rig) == [chain("a")]


def test_without_the_filter_every_block_goes_to_disk() -> None:
    rig = unfiltered()
    rig.save("abc")
    assert spilled(rig) == [chain("abc")]


def test_without_a_disk_nothing_waits_for_it() -> None:
    rig = Rig(disk=0, min_frequency=0, online=False)
    rig.save("ab")
    assert not rig.leader.busy
    assert spilled(rig) == []


def test_a_block_that_could_not_be_read_has_not_been_used() -> None:
    rig = Rig(disk=8, online=False, min_frequency=4)
    rig.save("ab")  # 1
    rig.loaded(rig.load("ab", [1, 2]), failed=(2,))  # `a` 2
    rig.save("b")  # 2
    assert spilled(rig) == []
    use(rig, "ab")
    assert spilled(rig) == [chain("ab")]


def test_blocks_that_are_on_disk_do_not_go_there_again() -> None:
    rig = unfiltered()
    rig.on_disk("ab")
    rig.save("abc")
    assert spilled(rig) == [chain("c")]


def test_blocks_that_are_on_their_way_to_disk_do_not_go_there_again() -> None:
    rig = unfiltered()
    rig.save("ab")
    assert spilled(rig) == [chain("ab")]
    use(rig, "ab")
    assert spilled(rig) == []


def test_blocks_that_wait_for_their_turn_wait_once() -> None:
    rig = unfiltered(batch=1, batches=1)
    rig.save("ab")
    spill = one_spill(rig)
    use(rig, "ab")
    rig.all_moved(spill.op)
    assert spilled(rig) == [chain("b")]
    assert len(rig.leader.spills) == 0


def test_a_block_that_was_evicted_while_it_waited_is_passed_over() -> None:
    rig = unfiltered(slots=4, batch=1, batches=1)
    rig.save("abcd")
    spill = one_spill(rig)
    rig.save("xy")
    left = set(rig.readable()) - set(chain("a"))
    assert len(left) == 3
    while rig.leader.busy:
        rig.all_moved(spill.op)
        if spills := rig.step().spills:
            (spill,) = spills
            assert set(unpack(spill.hashes)) <= left
    assert set(rig.readable(Tier.DISK)) == left | set(chain("a"))


def test_a_block_that_came_to_the_disk_while_it_waited_is_passed_over() -> None:
    rig = unfiltered()
    rig.save("ab")
    rig.on_disk("a")
    assert spilled(rig) == [chain("b")]


def test_a_block_that_comes_up_from_the_disk_does_not_go_back() -> None:
    rig = unfiltered()
    rig.on_disk("ab")
    rig.save("ab")
    assert spilled(rig) == []


# -- how many at a time ------------------------------------------------------------------------


def test_blocks_go_in_portions_of_which_so_many_are_on_their_way() -> None:
    rig = unfiltered(batch=3, batches=2)
    rig.save("abcdefghij")
    first, second = rig.step().spills
    assert [unpack(spill.hashes) for spill in (first, second)] == [chain("abc"), chain("def")]
    assert spilled(rig) == []
    rig.all_moved(second.op)
    assert spilled(rig) == [chain("ghi")]
    rig.all_moved(first.op)
    assert spilled(rig) == [chain("j")]


@pytest.mark.parametrize("slots", [1, 2, 4, 8, 16, 100, 256])
def test_spills_pin_no_more_than_their_share_of_the_host_tier(slots: int) -> None:
    rig = unfiltered(slots=slots, disk=1024)
    rig.leader.store([bytes([n, 0]) * 8 for n in range(slots)], range(slots))  # type: ignore[misc]
    (save,) = rig.step().saves
    rig.saved(save.op)
    assert len(rig.step().spills) <= 4
    assert 0 < rig.leader.tiers.host.pinned <= max(1, slots * MAX_PINNED_SHARE)


def test_a_block_on_its_way_to_disk_stays_where_it_is_until_every_rank_has_written_it() -> None:
    rig = unfiltered(slots=4, world_size=2)
    rig.save("abcd")
    spill = one_spill(rig)
    assert unpack(spill.hashes) == chain("a")
    rig.leader.store(chain("wxyz"), [1, 2, 3, 4])
    assert rig.readable() == chain("a")
    rig.moved(spill.op, rank=0)
    assert rig.leader.store(chain("z"), [4]) == (0, [])
    rig.moved(spill.op, rank=1)
    assert rig.leader.store(chain("z"), [4]) == (1, [4])


def test_a_spill_names_the_slots_of_both_tiers_and_the_stamps_of_the_hosts() -> None:
    rig = unfiltered()
    rig.on_disk("x")
    rig.save("ab")
    spill = one_spill(rig)
    host, disk = list(unpack_u32(spill.host)), list(unpack_u32(spill.disk))
    assert list(unpack_u64(spill.fills)) == rig.leader.tiers.host.fills(host)
    assert rig.leader.tiers.pool(Tier.DISK).fills(disk) == [spill.op, spill.op]
    assert 0 not in disk, "x is there"
    rig.all_moved(spill.op)
    assert rig.leader.tiers.host.pin(chain("ab")) == host
    assert rig.leader.tiers.pool(Tier.DISK).pin(chain("ab")) == disk


def test_the_queue_is_bounded_and_what_does_not_fit_is_offered_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spills_module, "MAX_WAITING", 2)
    rig = unfiltered()
    rig.save("abc")
    assert len(rig.leader.spills) == 2
    spill = one_spill(rig)
    assert unpack(spill.hashes) == chain("ab")
    rig.all_moved(spill.op)
    use(rig, "c")
    assert spilled(rig) == [chain("c")]


def test_a_leader_is_busy_while_blocks_wait_or_are_on_their_way() -> None:
    rig = unfiltered()
    rig.save("a")
    assert rig.leader.busy
    spill = one_spill(rig)
    assert rig.leader.busy
    rig.all_moved(spill.op)
    assert not rig.leader.busy


def test_a_reset_forgets_what_waits_and_what_is_on_its_way() -> None:
    rig = unfiltered(batch=1, batches=1)
    rig.save("ab")
    spill = one_spill(rig)
    rig.leader.reset()
    assert len(rig.leader.spills) == 0
    rig.all_moved(spill.op)
    assert rig.readable(Tier.DISK) == []
    assert rig.leader.tiers.pool(Tier.DISK).used == 0
    assert rig.leader.tiers.host.used == 0
    assert spilled(rig) == []


# -- how it ends -------------------------------------------------------------------------------


def test_a_block_is_on_disk_when_every_rank_has_written_it() -> None:
    rig = unfiltered(world_size=2)
    rig.save("ab")
    spill = one_spill(rig)
    rig.moved(spill.op, rank=1)
    assert rig.effects(Publish) == []
    assert rig.readable(Tier.DISK) == []
    rig.moved(spill.op, rank=0)
    (event,) = [effect.event for effect in rig.effects(Publish)]
    assert isinstance(event, Stored)
    assert (event.tier, unpack(event.hashes)) == (Tier.DISK, chain("ab"))
    assert set(rig.readable()) == set(chain("ab")), "the host keeps its copy"


def test_a_spill_that_fails_frees_the_slots_on_disk_and_leaves_the_host_alone() -> None:
    rig = unfiltered()
    rig.save("abc")
    rig.accounts(Transferred)
    spill = one_spill(rig)
    rig.moved(spill.op, failed=(1,), seconds=0.5)
    assert set(rig.readable(Tier.DISK)) == set(chain("ac"))
    assert rig.leader.tiers.pool(Tier.DISK).used == 2
    assert set(rig.readable()) == set(chain("abc"))
    assert rig.leader.tiers.host.pinned == 0
    assert rig.accounts(Transferred) == [
        Transferred(Path.HOST_TO_DISK, 2, 2 * 64, 1, "broken", 0.5)
    ]
    assert not rig.leader.busy, "it is not tried again by itself"
    use(rig, "b")
    assert spilled(rig) == [chain("b")]


def test_a_full_disk_makes_room_and_says_so_before_its_slots_are_written() -> None:
    rig = unfiltered(disk=2)
    rig.on_disk("xy")
    rig.save("a")
    spill = one_spill(rig)
    (event,) = [effect.event for effect in rig.effects(Publish)]
    assert isinstance(event, Removed)
    assert event.tier is Tier.DISK
    assert unpack(event.hashes) in (chain("x"), chain("y"))
    rig.all_moved(spill.op)
    assert len(rig.readable(Tier.DISK)) == 2


def test_a_disk_without_a_slot_to_give_takes_what_fits() -> None:
    rig = unfiltered(disk=2)
    rig.save("abc")
    spill = one_spill(rig)
    assert unpack(spill.hashes) == chain("ab")
    rig.all_moved(spill.op)
    assert spilled(rig) == []
    assert set(rig.readable()) == set(chain("abc"))
    assert not rig.leader.busy

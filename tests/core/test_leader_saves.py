"""The write path: from full device blocks to blocks that everyone may read."""

from __future__ import annotations

from kvbm_schemas.block import unpack
from kvbm_schemas.events import Removed, Stored
from kvbm_service.core.columns import unpack_u32
from kvbm_service.core.effects import Publish
from tests.core.builders import Rig, block, chain


def events(rig: Rig) -> list[object]:
    return [effect.event for effect in rig.effects(Publish)]


def test_a_stored_block_is_saved_and_then_told_of() -> None:
    rig = Rig()
    assert rig.leader.store(chain("ab"), [7, 8]) == (2, [7, 8])
    (save,) = rig.leader.take_commands(0.0).saves
    assert unpack(save.hashes) == chain("ab")
    assert list(unpack_u32(save.blocks)) == [7, 8]
    assert events(rig) == []
    rig.saved(save.op)
    (stored,) = events(rig)
    assert isinstance(stored, Stored)
    assert unpack(stored.hashes) == chain("ab")
    assert rig.leader.take_freed_blocks() == [7, 8]


def test_a_block_is_visible_only_when_every_rank_has_it() -> None:
    rig = Rig(world_size=2)
    rig.leader.store(chain("a"), [7])
    (save,) = rig.leader.take_commands(0.0).saves
    rig.saved(save.op, rank=1)
    assert events(rig) == []
    assert rig.leader.take_freed_blocks() == []
    assert rig.readable() == []
    rig.saved(save.op, rank=0)
    assert len(events(rig)) == 1
    assert rig.readable() == chain("a")


def test_a_save_that_failed_on_one_rank_frees_its_slots_and_tells_nobody() -> None:
    rig = Rig(slots=1, world_size=2)
    rig.leader.store(chain("a"), [7])
    (save,) = rig.leader.take_commands(0.0).saves
    rig.saved(save.op, rank=0, good=False)
    assert rig.leader.tiers.host.used == 1
    rig.saved(save.op, rank=1)
    assert rig.leader.tiers.host.used == 0
    assert rig.leader.take_freed_blocks() == [7]
    assert events(rig) == []
    assert not rig.leader.busy


def test_blocks_that_are_here_are_dealt_with_but_not_saved_again() -> None:
    rig = Rig()
    rig.save("ab")
    assert rig.leader.store(chain("abc"), [1, 2, 3]) == (3, [3])


def test_blocks_that_two_requests_compute_in_one_step_are_saved_once() -> None:
    rig = Rig()
    assert rig.leader.store(chain("ab"), [1, 2]) == (2, [1, 2])
    assert rig.leader.store(chain("abc"), [4, 5, 6]) == (3, [6])
    (save,) = rig.leader.take_commands(0.0).saves
    assert list(unpack_u32(save.blocks)) == [1, 2, 6]


def test_evicted_blocks_are_told_of_before_their_slots_are_written() -> None:
    rig = Rig(slots=2)
    rig.save("ab")
    rig.leader.store(chain("c"), [9])
    (removed,) = events(rig)
    assert isinstance(removed, Removed)
    assert unpack(removed.hashes) == chain("b")


def test_what_does_not_fit_is_to_be_offered_again() -> None:
    rig = Rig(slots=2)
    assert rig.leader.store(chain("abc"), [1, 2, 3]) == (2, [1, 2])
    assert rig.leader.store(chain("c"), [3]) == (0, [])
    (save,) = rig.leader.take_commands(0.0).saves
    rig.saved(save.op)
    assert rig.leader.store(chain("c"), [3]) == (1, [3])


def test_unfinished_saves_hold_no_more_device_blocks_than_allowed() -> None:
    rig = Rig(held_blocks=3)
    assert rig.leader.store(chain("ab"), [1, 2]) == (2, [1, 2])
    assert rig.leader.store(chain("cde"), [3, 4, 5]) == (1, [3])
    (save,) = rig.leader.take_commands(0.0).saves
    assert rig.leader.store(chain("de"), [4, 5]) == (0, [])
    assert rig.leader.holds_device_blocks
    rig.saved(save.op)
    assert rig.leader.store(chain("de"), [4, 5]) == (2, [4, 5])


def test_a_chain_that_makes_room_for_itself_holds_no_more_than_allowed() -> None:
    rig = Rig(slots=2, held_blocks=2)
    rig.save("a")
    dealt_with, held = rig.leader.store(chain("bca"), [1, 2, 3])
    assert len(held) <= 2
    assert dealt_with == 1
    assert block("a") in rig.leader.tiers.host


def test_reports_of_unknown_saves_change_nothing() -> None:
    rig = Rig()
    rig.saved(99)
    assert events(rig) == []
    assert rig.leader.take_freed_blocks() == []


def test_a_leader_is_busy_until_all_ranks_have_reported() -> None:
    rig = Rig()
    assert not rig.leader.busy
    rig.leader.store(chain("a"), [1])
    assert rig.leader.busy
    (save,) = rig.leader.take_commands(0.0).saves
    assert rig.leader.busy
    rig.saved(save.op)
    assert not rig.leader.busy
    assert not rig.leader.holds_device_blocks

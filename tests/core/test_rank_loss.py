"""A rank is lost, and another process takes its place: what is given up, kept, and promised."""

from __future__ import annotations

import pytest

from kvbm_schemas import step
from kvbm_schemas.block import Tier, pack
from kvbm_schemas.events import Cleared, Stored
from kvbm_schemas.requests import Leased, Refused
from kvbm_schemas.step import mark
from kvbm_service.core.columns import unpack_u32, unpack_u64
from kvbm_service.core.crew import State
from kvbm_service.core.effects import Answer, AskOwner, GiveBack, Publish, TellRanks
from kvbm_service.core.leader import RANK_MISSING
from kvbm_service.core.reads import NO_HITS
from tests.core.builders import INSTANCE, Rig, block, chain, leased, rank_record, survivors

TOKEN = "token-0123456789"


def replace(rig: Rig, rank: int = 0, *found: step.Survivors, life: int = 2) -> int:
    """Another process takes a rank's place. Returns the fence that goes round."""
    disk = rig.leader.tiers.disk
    record = rank_record(
        rank=rank, world_size=rig.world_size, life=life, disk_slots=disk.capacity if disk else 0
    )
    rig.leader.rank_took_place(record, found, now=0.0)
    return rig.step().fence


def rest(rig: Rig, fence: int, *ranks: int) -> None:
    """These ranks, or all, have nothing older under way."""
    for rank in ranks or range(rig.world_size):
        rig.moved(fence, rank)


def held(rig: Rig, tier: Tier = Tier.HOST) -> step.Survivors:
    """What each rank really has in a tier that the leader knows of."""
    (has,) = [one for one in rig.leader.tiers.held() if one.tier is tier]
    return has


@pytest.fixture
def rig() -> Rig:
    """Two ranks that hold a, b and c."""
    rig = Rig(world_size=2, online=False)
    rig.save("abc")
    return rig


# -- nothing is promised -----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["away", "lost", "replaced"])
def test_a_node_without_all_its_ranks_promises_nothing(rig: Rig, how: str) -> None:
    rig.leader.arrive("r", chain("abc"), now=0.0)
    if how == "away":
        rig.leader.ranks_away([1])
    elif how == "lost":
        rig.leader.rank_lost(1, now=0.0)
    else:
        replace(rig, 1)
    assert rig.leader.match("r", 0, now=0.0) == 0
    assert rig.leader.store(chain("xy"), [1, 2]) == (2, [])
    assert rig.leader.acquire(pack(chain("a")), TOKEN, now=0.0) == Refused(reason=RANK_MISSING)
    assert not rig.step().saves


def test_leases_end_with_a_rank_and_their_slots_are_free(rig: Rig) -> None:
    assert isinstance(rig.leader.acquire(pack(chain("ab")), TOKEN, now=0.0), Leased)
    rig.leader.rank_lost(0, now=0.0)
    assert len(rig.leader.lending.leases) == 0
    assert rig.leader.tiers.host.used == 0
    rig.leader.release(TOKEN)
    rig.leader.check_integrity()


def test_who_waits_for_the_disk_is_refused_at_once() -> None:
    rig = Rig(disk=8)
    rig.on_disk("ab")
    assert rig.leader.acquire(pack(chain("ab")), TOKEN, now=0.0) is None
    rig.leader.rank_lost(0, now=0.0)
    assert rig.effect(Answer) == Answer(TOKEN, Refused(reason=RANK_MISSING), 2)


def test_everyone_is_told_that_the_blocks_are_gone(rig: Rig) -> None:
    rig.leader.rank_lost(0, now=0.0)
    (told,) = rig.effects(Publish)
    assert isinstance(told.event, Cleared)
    assert rig.readable() == []


def test_a_rank_that_was_only_out_of_sight_brings_everything_back(rig: Rig) -> None:
    rig.leader.arrive("r", chain("abc"), now=0.0)
    rig.leader.ranks_away([0, 1])
    assert rig.leader.match("r", 0, now=0.0) == 0
    rig.leader.ranks_away([1])
    assert rig.leader.match("r", 0, now=0.0) == 0
    rig.leader.ranks_away([])
    assert rig.leader.match("r", 0, now=0.0) == 3
    assert set(rig.readable()) == set(chain("abc"))


def test_a_lease_that_is_granted_to_us_meanwhile_is_given_back() -> None:
    rig = Rig()
    rig.meet("b")
    rig.leader.prefetch._asked[7] = object()  # type: ignore[assignment] # as if one was asked for
    rig.leader.rank_lost(0, now=0.0)
    rig.leader.answered("r", 7, "b", 0, leased("b", 2), asked_at=0.0, now=0.0)
    assert rig.effect(GiveBack).node == "b"
    assert not rig.step().remote_fetches
    assert not rig.effects(AskOwner)


# -- what is under way -------------------------------------------------------------------------


def test_a_save_that_the_lost_rank_had_not_reported_frees_its_blocks(rig: Rig) -> None:
    _, blocks = rig.leader.store(chain("xy"), [5, 6])
    (save,) = rig.step().saves
    rig.saved(save.op, rank=0)
    assert rig.leader.take_freed_blocks() == []
    rig.leader.rank_lost(1, now=0.0)
    assert rig.leader.take_freed_blocks() == blocks == [5, 6]
    assert rig.readable() == []
    assert rig.leader.tiers.host.used == 0


def test_a_save_that_another_rank_is_at_keeps_its_blocks_until_that_is_done(rig: Rig) -> None:
    rig.leader.store(chain("xy"), [5, 6])
    (save,) = rig.step().saves
    rig.leader.rank_lost(1, now=0.0)
    assert rig.leader.take_freed_blocks() == []
    assert rig.leader.tiers.host.used == 2, "it may still be writing there"
    rig.saved(save.op, rank=0)
    assert rig.leader.take_freed_blocks() == [5, 6]
    assert rig.leader.tiers.host.used == 0
    assert rig.readable() == [], "the other rank has no share of them"


def test_a_save_that_nobody_was_told_of_is_dropped(rig: Rig) -> None:
    rig.leader.store(chain("xy"), [5, 6])
    rig.leader.rank_lost(1, now=0.0)
    assert rig.leader.take_freed_blocks() == [5, 6]
    assert not rig.step().saves
    assert not rig.leader.busy


def test_a_load_of_which_a_rank_will_not_tell_is_told_as_lost(rig: Rig) -> None:
    load = rig.load("abc", [1, 2, 3])
    rig.leader.rank_lost(0, now=0.0)
    assert rig.leader.take_lost_loads() == [], "the other rank may still be writing"
    rig.loaded(load, rank=1)
    (lost,) = rig.leader.take_lost_loads()
    assert (lost.op, lost.request) == (load.op, "r")
    assert sorted(unpack_u32(lost.failed_blocks)) == [1, 2, 3]
    assert rig.leader.take_lost_loads() == []
    assert rig.leader.match("r", 0, now=0.0) == 0
    assert rig.leader.tiers.host.pinned == 0


def test_a_load_that_was_promised_before_the_loss_is_told_as_lost(rig: Rig) -> None:
    rig.leader.arrive("r", chain("abc"), now=0.0)
    assert rig.leader.match("r", 0, now=0.0) == 3
    rig.leader.rank_lost(0, now=0.0)
    rig.leader.load("r", 0, [1, 2, 3], now=0.0)
    assert not rig.step().loads
    (lost,) = rig.leader.take_lost_loads()
    assert list(unpack_u32(lost.failed_blocks)) == [1, 2, 3]
    assert rig.leader.hits("r") == NO_HITS
    assert rig.leader.tiers.host.pinned == 0
    assert rig.leader.match("r", 0, now=0.0) == 0


def test_what_the_former_process_reports_late_changes_nothing(rig: Rig) -> None:
    rig.leader.store(chain("xy"), [5, 6])
    (save,) = rig.step().saves
    rig.saved(save.op, rank=1)
    rest(rig, replace(rig, rank=0))
    rig.leader.take_freed_blocks()
    rig.saved(save.op, rank=0)
    assert rig.readable() == []
    assert rig.leader.take_freed_blocks() == []
    rig.save("x")
    assert rig.readable() == chain("x")


def test_a_fetch_that_was_not_heard_is_not_repeated_after_the_loss() -> None:
    rig = Rig(disk=8, world_size=2)
    rig.on_disk("ab")
    rig.leader.acquire(pack(chain("ab")), TOKEN, now=0.0)
    order = rig.effect(TellRanks)
    rest(rig, replace(rig, 1))
    rig.leader.unheard(order.order)
    assert not rig.step().fetches
    assert order.order.instance == INSTANCE


# -- until all are at rest ---------------------------------------------------------------------


def test_a_step_says_which_processes_are_meant(rig: Rig) -> None:
    assert rig.step().meant == mark("me/0/1") + mark("me/1/1")
    replace(rig, rank=1)
    assert rig.step().meant == mark("me/0/1") + mark("me/1/2")


def test_a_fence_goes_round_until_every_rank_has_answered(rig: Rig) -> None:
    assert rig.step().fence == 0
    rig.leader.rank_lost(0, now=0.0)
    assert rig.step().fence == 0, "nobody is there to answer"
    fence = replace(rig, rank=0)
    assert fence > 0
    assert rig.leader.busy, "the engine has to take steps"
    rest(rig, fence, 0)
    rest(rig, fence, 0)
    assert (rig.leader.crew.state, rig.step().fence) == (State.SETTLING, fence)
    rest(rig, fence, 1)
    assert (rig.leader.crew.state, rig.step().fence) == (State.WHOLE, 0)
    assert not rig.leader.busy


def test_what_no_rank_ever_began_ends_when_all_are_at_rest(rig: Rig) -> None:
    """The engine died with the step in its hands."""
    rig.leader.store(chain("xy"), [5, 6])
    load = rig.load("abc", [1, 2, 3])
    fence = replace(rig, rank=0)
    assert rig.leader.take_freed_blocks() == []
    rest(rig, fence)
    assert rig.leader.take_freed_blocks() == [5, 6]
    assert [lost.op for lost in rig.leader.take_lost_loads()] == [load.op]
    assert rig.leader.tiers.host.used == 0
    assert not rig.leader.busy


def test_slots_of_what_is_under_way_are_not_used_before_all_are_at_rest(rig: Rig) -> None:
    rig.leader.store(chain("xy"), [5, 6])
    rig.step()
    fence = replace(rig, rank=0)
    assert rig.leader.tiers.host.used == 2
    rest(rig, fence, 0)
    assert rig.leader.tiers.host.used == 2
    rest(rig, fence, 1)
    assert rig.leader.tiers.host.used == 0


def test_an_answer_to_an_earlier_fence_does_not_count(rig: Rig) -> None:
    first = replace(rig, rank=0)
    rest(rig, first, 1)
    second = replace(rig, rank=0, life=3)
    assert second > first
    rest(rig, first)
    assert rig.leader.crew.state is State.SETTLING
    rest(rig, second)
    assert rig.leader.crew.whole


def test_a_record_that_is_told_again_changes_nothing(rig: Rig) -> None:
    rig.leader.rank_took_place(rank_record(rank=0, world_size=2), (), now=0.0)
    assert rig.leader.crew.whole
    assert set(rig.readable()) == set(chain("abc"))


def test_leases_name_the_new_process(rig: Rig) -> None:
    rest(rig, replace(rig, rank=1))
    rig.save("a")
    answer = rig.leader.acquire(pack(chain("a")), TOKEN, now=0.0)
    assert isinstance(answer, Leased)
    assert answer.agents == ("me/0/1", "me/1/2")


def test_a_new_process_is_told_of_all_other_nodes() -> None:
    rig = Rig()
    rig.meet("b")
    assert len(rig.step().peers) == 1
    rig.leader.rank_took_place(rank_record(life=2), (), now=0.0)
    commands = rig.step()
    assert [peer.agent for peer in commands.peers] == ["b/0/1"]
    assert commands.gone == ("b/0/1",), "the other ranks know it already"


# -- what is kept ------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DISK])
def test_what_the_new_process_finds_again_is_kept(tier: Tier) -> None:
    rig = Rig(world_size=2, disk=8, online=False)
    rig.find(tier, "abc")
    had = held(rig, tier)
    other = survivors(Tier.DISK if tier is Tier.HOST else Tier.HOST, "", slots=[])
    fence = replace(rig, 1, had, other)
    assert rig.readable(tier) == []
    rig.leader.take_effects()
    rest(rig, fence)
    assert set(rig.readable(tier)) == set(chain("abc"))
    (told,) = [one.event for one in rig.effects(Publish)]
    assert isinstance(told, Stored)
    assert told.tier is tier
    load = rig.load("abc", [1, 2, 3])
    read = load.local if tier is Tier.HOST else load.disk
    assert read is not None
    assert list(unpack_u64(read.fills)) == list(unpack_u64(had.fills))


def test_what_a_new_process_has_otherwise_or_not_at_all_is_dropped(rig: Rig) -> None:
    had = held(rig)
    slots, fills = list(unpack_u32(had.slots)), list(unpack_u64(had.fills))
    other = survivors(Tier.HOST, "axc", slots, [*fills[:2], fills[2] + 1])
    rest(rig, replace(rig, 0, other))
    assert rig.readable() == chain("a")


def test_a_process_that_brings_nothing_leaves_nothing(rig: Rig) -> None:
    rest(rig, replace(rig, 0))
    assert rig.readable() == []
    assert rig.leader.tiers.host.used == 0


def test_when_two_ranks_are_lost_both_must_have_found_a_block(rig: Rig) -> None:
    had = held(rig)
    only = step.Survivors(
        tier=Tier.HOST,
        hashes=had.hashes[:16],
        slots=had.slots[:4],
        fills=had.fills[:8],
    )
    rig.leader.rank_lost(0, now=0.0)
    rig.leader.rank_lost(1, now=0.0)
    assert replace(rig, 0, had) == 0
    rest(rig, replace(rig, 1, only))
    assert rig.readable() == [chain("abc")[0]]


def test_what_a_rank_claims_that_the_others_never_had_is_not_believed(rig: Rig) -> None:
    rest(rig, replace(rig, 0, survivors(Tier.HOST, "z", slots=[7], fills=[1])))
    assert rig.readable() == []


def test_nothing_is_kept_over_a_reset(rig: Rig) -> None:
    fence = replace(rig, 0, held(rig))
    rig.leader.reset()
    assert rig.step().forget
    rest(rig, fence)
    assert rig.readable() == []


def test_a_block_saved_under_a_name_that_was_lost_is_readable_again(rig: Rig) -> None:
    rest(rig, replace(rig, 0))
    rig.save("abcd")
    assert set(rig.readable()) == set(chain("abcd"))
    assert block("d") in rig.leader.tiers.host


def test_a_slot_that_another_rank_still_reads_is_kept_out_until_it_is_free(rig: Rig) -> None:
    """A load that only its own rank can end pins the slots; they are given up with it."""
    had = held(rig)
    rig.load("ab", [1, 2])
    fence = replace(rig, 1, had)
    assert rig.leader.tiers.host.pinned == 2
    rest(rig, fence)
    assert rig.leader.tiers.host.pinned == 0
    assert set(rig.readable()) == set(chain("abc"))

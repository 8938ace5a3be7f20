"""What the leader tells of its work: every transfer and every lookup once, as it turned out."""

from __future__ import annotations

import pytest

from kvbm_schemas import step
from kvbm_schemas.block import Tier, pack
from kvbm_schemas.events import Source
from kvbm_service.core import outbox
from kvbm_service.core.accounts import Account, Looked, Path, Refusal, Transferred
from kvbm_service.core.columns import pack_u32
from kvbm_service.core.effects import Announce, AskOwner, AskRegistry
from tests.core.builders import Rig, chain, leased, located, told_to_fetch

BLOCK_BYTES = 64
"""Of one rank."""


def transferred(
    path: Path, blocks: int, failed: int = 0, reason: str = "", seconds: float = 0.0, ranks: int = 1
) -> Transferred:
    size = blocks * BLOCK_BYTES * ranks
    return Transferred(path, blocks, size, failed, reason, seconds)


def accounts(rig: Rig) -> list[Account]:
    """Everything told since the last call, but for what the filter holds back."""
    told = rig.leader.take_accounts()
    return [one for one in told if not (isinstance(one, Refusal) and one.reason == "filter")]


# -- moves -------------------------------------------------------------------------------------


def test_nothing_is_told_before_it_has_happened() -> None:
    rig = Rig(world_size=2)
    rig.leader.store(chain("ab"), [1, 2])
    (save,) = rig.step().saves
    rig.moved(save.op, rank=0)
    assert accounts(rig) == []


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DISK])
def test_a_save_is_told_of_once_with_the_slowest_ranks_time(tier: Tier) -> None:
    rig = Rig(world_size=2, disk=8, disk_only=tier is Tier.DISK)
    rig.leader.store(chain("abc"), [1, 2, 3])
    (save,) = rig.step().saves
    rig.moved(save.op, rank=0, seconds=0.25)
    rig.moved(save.op, rank=1, failed=(1,), seconds=0.125)
    path = Path.DEVICE_TO_HOST if tier is Tier.HOST else Path.DEVICE_TO_DISK
    assert accounts(rig) == [transferred(path, 2, 1, "broken", 0.25, ranks=2)]
    rig.moved(save.op, rank=1)
    assert accounts(rig) == []


def test_a_spill_is_told_of_once() -> None:
    rig = Rig(disk=8, min_frequency=0)
    rig.save("ab")
    accounts(rig)
    (spill,) = rig.step().spills
    rig.all_moved(spill.op)
    assert accounts(rig) == [transferred(Path.HOST_TO_DISK, 2)]


def test_a_fetch_for_another_node_is_told_of_once() -> None:
    rig = Rig(disk=8)
    rig.on_disk("ab")
    rig.leader.acquire(pack(chain("ab")), "a-token-of-sixteen", 0.0)
    rig.all_moved(told_to_fetch(rig).op, failed=(1,))
    assert accounts(rig) == [transferred(Path.DISK_TO_HOST, 1, 1, "broken")]


def test_a_move_of_which_nothing_arrived_is_a_failure_and_no_success() -> None:
    rig = Rig(disk=8, min_frequency=0)
    rig.save("ab")
    accounts(rig)
    (spill,) = rig.step().spills
    rig.all_moved(spill.op, failed=(0, 1))
    assert accounts(rig) == [transferred(Path.HOST_TO_DISK, 0, 2, "broken")]


# -- loads -------------------------------------------------------------------------------------


def loading(rig: Rig, request: str = "r") -> step.Load:
    """`ab` come from the host, `c` from the disk, `de` from node `b`, into blocks 10 to 14."""
    rig.meet("b")
    rig.save("ab")
    rig.on_disk("c")
    rig.leader.arrive(request, chain("abcdef"), now=0.0)
    rig.leader.located(request, rig.effect(AskRegistry).attempt, located(("b", 2)), 0.0)
    assert rig.leader.match(request, 0, now=0.0) is None
    asked = rig.effect(AskOwner)
    grant = leased("b", 2, rig.world_size)
    rig.leader.answered(request, asked.attempt, "b", asked.start, grant, 0.0, 0.0)
    assert rig.leader.match(request, 0, now=0.0) == 5
    accounts(rig)
    rig.leader.load(request, 0, [10, 11, 12, 13, 14], now=0.0)
    return rig.load_command()


def done(
    rig: Rig, load: step.Load, rank: int, failed: tuple[int, ...] = (), **seconds: float
) -> None:
    """A rank has come to the end of a load."""
    result = step.LoadResult(
        op=load.op, request=load.request, failed_blocks=pack_u32(failed),
        reason="torn" if failed else "", **seconds,
    )  # fmt: skip
    rig.leader.report(step.StepResults(rank=rank, loads=(result,)), now=1.0)
    rig.leader.check_integrity()


def test_a_load_is_told_of_by_path_when_the_last_rank_is_done() -> None:
    rig = Rig(disk=8, world_size=2)
    load = loading(rig)
    accounts(rig)
    done(rig, load, rank=1, host_seconds=0.5, disk_seconds=0.25, remote_seconds=0.125)
    assert accounts(rig) == []
    done(rig, load, rank=0, host_seconds=0.25, disk_seconds=0.5, remote_seconds=1.0)
    assert set(accounts(rig)) == {
        transferred(Path.HOST_TO_DEVICE, 2, seconds=0.5, ranks=2),
        transferred(Path.DISK_TO_DEVICE, 1, seconds=0.5, ranks=2),
        transferred(Path.REMOTE_TO_DEVICE, 2, seconds=1.0, ranks=2),
    }


def test_a_block_that_failed_counts_for_its_own_path_only_and_once() -> None:
    rig = Rig(disk=8, world_size=2)
    load = loading(rig)
    accounts(rig)
    done(rig, load, rank=0, failed=(12, 14))
    done(rig, load, rank=1, failed=(12, 10))
    told = {one.path: (one.blocks, one.failed, one.reason) for one in rig.accounts(Transferred)}
    assert told == {
        Path.HOST_TO_DEVICE: (1, 1, "torn"),
        Path.DISK_TO_DEVICE: (0, 1, "torn"),
        Path.REMOTE_TO_DEVICE: (1, 1, "torn"),
    }


def test_a_load_is_announced_with_the_tiers_that_its_blocks_came_from() -> None:
    rig = Rig(disk=8)
    done(rig, loading(rig), rank=0, failed=(13,))
    loaded = rig.effect(Announce).loaded
    assert set(loaded.sources) == {
        Source("me", Tier.HOST, 2, 2 * BLOCK_BYTES),
        Source("me", Tier.DISK, 1, BLOCK_BYTES),
        Source("b", Tier.HOST, 1, BLOCK_BYTES),
    }
    assert loaded.failed == 1


# -- lookups -----------------------------------------------------------------------------------


def test_a_lookup_is_told_of_once_with_where_the_blocks_were() -> None:
    rig = Rig(disk=8)
    load = loading(rig)
    assert rig.accounts(Looked) == [Looked(wanted=6, host=2, disk=1, remote=2)]
    done(rig, load, rank=0)
    rig.leader.peers.online = False
    assert rig.leader.match("r", 0, now=1.0) == 3, "it was preempted"
    rig.leader.load("r", 0, [1, 2, 3], now=1.0)
    rig.loaded(rig.load_command())
    rig.leader.finish("r")
    assert rig.accounts(Looked) == []


def test_what_the_engine_has_computed_is_not_wanted() -> None:
    rig = Rig(online=False)
    rig.save("abc")
    rig.leader.arrive("r", chain("abcd"), now=0.0)
    assert rig.leader.match("r", 1, now=0.0) == 2
    rig.leader.load("r", 1, [1, 2], now=0.0)
    assert rig.accounts(Looked) == [Looked(wanted=3, host=2, disk=0, remote=0)]


@pytest.mark.parametrize("end", ["not wanted", "finished"])
def test_what_was_found_and_not_loaded_is_no_hit(end: str) -> None:
    rig = Rig(online=False)
    rig.save("ab")
    rig.leader.arrive("r", chain("ab"), now=0.0)
    assert rig.leader.match("r", 0, now=0.0) == 2
    if end == "not wanted":
        rig.leader.load("r", 0, [], now=0.0)
    rig.leader.finish("r")
    assert rig.accounts(Looked) == [Looked(wanted=2, host=0, disk=0, remote=0)]


def test_a_request_that_was_over_before_it_was_answered_has_missed_nothing() -> None:
    rig = Rig()
    rig.save("ab")
    rig.leader.arrive("unasked", chain("ab"), now=0.0)
    rig.leader.finish("unasked")
    rig.leader.arrive("waiting", chain("abc"), now=0.0)
    assert rig.leader.match("waiting", 0, now=0.0) is None
    rig.leader.finish("waiting")
    assert rig.accounts(Looked) == []


# -- refusals ----------------------------------------------------------------------------------


def test_a_full_tier_is_told_of() -> None:
    rig = Rig(slots=2)
    rig.leader.store(chain("abc"), [1, 2, 3])
    assert rig.accounts(Refusal) == [Refusal("G2 is full", 1)]


def test_blocks_that_the_filter_holds_back_are_told_of() -> None:
    rig = Rig(disk=8)
    rig.save("ab")
    assert rig.accounts(Refusal) == [Refusal("filter", 2)]


@pytest.mark.parametrize("disk", [0, 8])
def test_a_lease_that_is_refused_is_told_of(disk: int) -> None:
    rig = Rig(disk=disk)
    rig.leader.acquire(pack(chain("ab")), "a-token-of-sixteen", 0.0)
    assert rig.accounts(Refusal) == [Refusal("not here", 2)]


@pytest.mark.parametrize("too_slow", [True, False])
def test_a_lease_that_is_refused_late_is_told_of_once(too_slow: bool) -> None:
    rig = Rig(disk=8)
    rig.on_disk("ab")
    accounts(rig)
    rig.leader.acquire(pack(chain("abc")), "a-token-of-sixteen", 0.0)
    fetch = told_to_fetch(rig)
    if too_slow:
        rig.leader.tick(now=100.0)
    rig.all_moved(fetch.op, failed=(0, 1))
    assert rig.accounts(Refusal) == [Refusal("not here", 3)]


def test_a_request_of_low_priority_is_told_of_once_and_saved_up_to_there() -> None:
    rig = Rig(min_priority=5)
    stored = rig.leader.store(chain("abc"), [1, 2, 3], request="r", priorities=[5, 4, 9])
    assert stored == (3, [1])
    assert rig.accounts(Refusal) == [Refusal("priority", 2)]
    later = rig.leader.store(chain("de"), [4, 5], request="r", priorities=[9, 9])
    assert later == (2, [])
    assert rig.accounts(Refusal) == []
    rig.leader.finish("r")
    assert rig.leader.store(chain("de"), [4, 5], request="r", priorities=[9, 9]) == (2, [4, 5])


# -- who does not listen -----------------------------------------------------------------------


def test_what_nobody_fetches_is_dropped_oldest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "MAX_ACCOUNTS", 4)
    rig = Rig(slots=64)
    for name in "abcdefghij":
        rig.save(name)
    rig.save("xyz")
    told = rig.leader.take_accounts()
    assert len(told) <= 4
    assert told[-1] == transferred(Path.DEVICE_TO_HOST, 3)

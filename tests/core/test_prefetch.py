"""Bringing blocks up while their request waits: from the own disk, and from other nodes."""

from __future__ import annotations

import pytest

from kvbm_schemas.block import BlockHash, Tier, unpack
from kvbm_schemas.requests import Leased, Refused
from kvbm_schemas.step import Fetch, RemoteFetch, StepCommands
from kvbm_service.core import prefetch as prefetch_module
from kvbm_service.core.accounts import Path, Transferred
from kvbm_service.core.columns import unpack_u32, unpack_u64
from kvbm_service.core.effects import AskOwner, AskRegistry, GiveBack
from kvbm_service.core.reads import Hits
from tests.core.builders import LEASE_SECONDS, LOOKUP_SECONDS, Rig, chain, leased, located

TRANSFER_SECONDS = 10.0


def rig_with(budget: int, online: bool = False, slots: int = 32, **others: int) -> Rig:
    """A node that brings up so many blocks at most."""
    return Rig(slots, online=online, disk=32, prefetch_share=budget / slots, **others)


def wait(rig: Rig, names: str, request: str = "r", now: float = 0.0) -> None:
    """A request arrives, and the engine has no room for it."""
    rig.leader.arrive(request, chain(names), now)


def brought(commands: StepCommands) -> list[list[BlockHash]]:
    return [unpack(fetch.hashes) for fetch in commands.fetches]


def one_fetch(rig: Rig) -> Fetch:
    (fetch,) = rig.step().fetches
    return fetch


def load(rig: Rig, count: int, request: str = "r") -> Hits:
    """The engine has room for the request now."""
    assert rig.leader.match(request, 0, now=0.0) == count
    rig.leader.load(request, 0, range(count), now=0.0)
    rig.loaded(rig.load_command())
    return rig.leader.hits(request)


# -- from the own disk -------------------------------------------------------------------------


def test_blocks_of_a_request_that_waits_are_brought_up_from_the_disk() -> None:
    rig = rig_with(budget=8)
    rig.save("b")
    rig.on_disk("acd")
    wait(rig, "abcde")
    first, second = rig.step().fetches
    assert [unpack(first.hashes), unpack(second.hashes)] == [chain("a"), chain("cd")]
    assert list(unpack_u32(second.disk)) == [1, 2]
    assert rig.leader.tiers.host.fills(unpack_u32(second.host)) == [second.op, second.op]
    assert rig.step().fetches == (), "they are brought up once"
    rig.all_moved(first.op)
    rig.all_moved(second.op)
    assert set(rig.readable(Tier.DISK)) == set(chain("acd"))
    assert load(rig, 4) == Hits(host=4)


def test_a_request_that_is_scheduled_reads_from_where_its_blocks_are() -> None:
    rig = rig_with(budget=8)
    rig.on_disk("ab")
    wait(rig, "ab")
    assert rig.leader.match("r", 0, now=0.0) == 2
    rig.leader.load("r", 0, [1, 2], now=0.0)
    commands = rig.step()
    assert commands.fetches == ()
    (command,) = commands.loads
    assert command.disk is not None


def test_a_request_that_waits_for_an_answer_only_brings_nothing_up() -> None:
    """The engine asks again in a moment, and may have room for it."""
    rig = rig_with(budget=8, online=True)
    rig.on_disk("ab")
    wait(rig, "abc")
    question = rig.effect(AskRegistry)
    assert rig.leader.match("r", 0, now=0.0) is None
    assert rig.step().fetches == ()
    rig.leader.located("r", question.attempt, located(), now=0.001)
    assert rig.step(now=0.001).fetches == ()
    assert rig.leader.match("r", 0, now=0.002) == 2


def test_a_request_that_the_engine_has_not_come_back_to_is_one_that_waits() -> None:
    rig = rig_with(budget=8, online=True)
    rig.on_disk("ab")
    wait(rig, "abc")
    question = rig.effect(AskRegistry)
    assert rig.leader.match("r", 0, now=0.0) is None
    rig.leader.located("r", question.attempt, located(), now=0.001)
    assert brought(rig.step(now=2 * LOOKUP_SECONDS)) == [chain("ab")]


def test_while_it_waits_a_request_can_be_scheduled_and_reads_from_disk() -> None:
    """The fetch is under way, and does not get in the load's way."""
    rig = rig_with(budget=8)
    rig.on_disk("ab")
    wait(rig, "ab")
    fetch = one_fetch(rig)
    assert load(rig, 2) == Hits(disk=2)
    rig.all_moved(fetch.op)
    assert set(rig.readable()) == set(chain("ab"))
    assert rig.leader.tiers.pool(Tier.DISK).pinned == 0
    assert rig.leader.tiers.host.pinned == 0


def test_what_the_engine_has_computed_is_not_brought_up() -> None:
    rig = rig_with(budget=8)
    rig.on_disk("abc")
    wait(rig, "abc")
    rig.leader.match("r", 1, now=0.0)
    rig.step()
    rig.leader.tick(now=LEASE_SECONDS)  # the plan is dropped
    assert brought(rig.step()) == [chain("bc")]


def test_no_more_is_brought_up_than_the_budget_allows() -> None:
    rig = rig_with(budget=3)
    rig.on_disk("abcdef")
    wait(rig, "ab", "one")
    wait(rig, "cdef", "two")
    wait(rig, "f", "three")
    assert brought(rig.step()) == [chain("ab"), chain("c")]


@pytest.mark.parametrize("end", ["load", "finish", "not wanted", "failed load"])
def test_whoever_waits_no_longer_leaves_the_budget_to_others(end: str) -> None:
    rig = rig_with(budget=2)
    rig.on_disk("abcd")
    wait(rig, "ab", "one")
    wait(rig, "cd", "two")
    fetch = one_fetch(rig)
    rig.all_moved(fetch.op)
    assert rig.step().fetches == ()
    if end == "finish":
        rig.leader.finish("one")
    else:
        assert rig.leader.match("one", 0, now=0.0) == 2
        rig.leader.load("one", 0, [] if end == "not wanted" else [1, 2], now=0.0)
    commands = rig.step()
    assert brought(commands) == [chain("cd")]
    if end == "failed load":
        rig.loaded(commands.loads[0], failed=(1, 2))
    rig.leader.finish("one")
    rig.leader.finish("two")
    rig.on_disk("ef")
    wait(rig, "ef", "three")
    assert brought(rig.step()) == [chain("ef")], "the budget is whole again"


def test_only_the_first_that_wait_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch_module, "MAX_LOOKED_AT", 2)
    rig = rig_with(budget=8)
    rig.on_disk("abc")
    for name in "abc":
        wait(rig, name, name)
    assert brought(rig.step()) == [chain("a"), chain("b")]
    rig.leader.finish("a")
    assert brought(rig.step()) == [chain("c")]


def test_requests_that_run_are_not_among_those_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch_module, "MAX_LOOKED_AT", 1)
    rig = rig_with(budget=8)
    rig.on_disk("ab")
    wait(rig, "a", "one")
    wait(rig, "b", "two")
    assert rig.leader.match("one", 0, now=0.0) == 1
    rig.leader.load("one", 0, [1], now=0.0)
    commands = rig.step()
    assert len(commands.loads) == 1
    assert brought(commands) == [chain("b")]


def test_a_host_tier_without_a_slot_to_give_brings_nothing_up() -> None:
    rig = rig_with(budget=2, slots=4)
    rig.on_disk("ab")
    rig.leader.store(chain("wxyz"), [1, 2, 3, 4])
    wait(rig, "ab")
    assert rig.step().fetches == ()


def test_with_only_a_disk_nothing_is_brought_up() -> None:
    rig = rig_with(budget=8, disk_only=True)
    rig.on_disk("ab")
    wait(rig, "ab")
    assert rig.step().fetches == ()


def test_without_a_budget_nothing_is_brought_up() -> None:
    rig = rig_with(budget=0)
    rig.on_disk("ab")
    wait(rig, "ab")
    assert rig.step().fetches == ()


def test_a_block_that_could_not_be_read_is_not_on_disk_any_more() -> None:
    rig = rig_with(budget=8)
    rig.on_disk("abc")
    wait(rig, "abc")
    rig.moved(one_fetch(rig).op, failed=(1,))
    assert set(rig.readable(Tier.DISK)) == set(chain("ac"))
    assert load(rig, 1) == Hits(host=1)


def test_an_engine_whose_requests_all_wait_is_told_to_step_on() -> None:
    rig = rig_with(budget=8)
    rig.on_disk("ab")
    wait(rig, "ab")
    fetch = one_fetch(rig)
    assert rig.leader.busy
    rig.all_moved(fetch.op)
    assert not rig.leader.busy


# -- from other nodes --------------------------------------------------------------------------


def read_from_b(rig: Rig, names: str, request: str = "earlier") -> None:
    """A request reads these blocks from node `b`, in place."""
    rig.meet("b")
    rig.leader.arrive(request, chain(names), now=0.0)
    rig.leader.located(request, rig.effect(AskRegistry).attempt, located(("b", len(names))), 0.0)
    assert rig.leader.match(request, 0, now=0.0) is None
    asked = rig.effect(AskOwner)
    grant = leased("b", len(names))
    rig.leader.answered(request, asked.attempt, "b", asked.start, grant, 0.0, 0.0)
    assert load(rig, len(names), request) == Hits(remote=len(names))
    rig.leader.store(chain(names), range(len(names)), request=request)
    assert rig.step().saves == ()
    rig.leader.finish(request)
    rig.effects(GiveBack)


def wanted_of_b(rig: Rig, names: str, here: str) -> list[AskOwner]:
    """A request waits whose blocks `b` has; what `b` is asked for with the coming step."""
    wait(rig, names)
    absent = [name for name in names if name not in here]
    question = rig.effect(AskRegistry)
    rig.leader.located("r", question.attempt, located(("b", len(absent))), now=0.0)
    rig.step()
    return rig.effects(AskOwner)


def fetching(rig: Rig, asked: AskOwner, grant: Leased, now: float = 0.0) -> RemoteFetch:
    """Node `b` has granted a lease."""
    rig.leader.answered("r", asked.attempt, "b", asked.start, grant, 0.0, now)
    rig.leader.check_integrity()
    (fetch,) = rig.step(now).remote_fetches
    return fetch


def test_blocks_of_another_node_are_read_in_place_the_first_time() -> None:
    rig = rig_with(budget=8, online=True)
    rig.meet("b")
    assert wanted_of_b(rig, "ab", here="") == []
    assert rig.leader.match("r", 0, now=0.0) is None
    assert rig.effect(AskOwner).node == "b"


def test_blocks_that_were_wanted_here_before_get_a_copy_here() -> None:
    rig = rig_with(budget=8, online=True)
    rig.save("x")
    read_from_b(rig, "ab")
    (asked,) = wanted_of_b(rig, "xab", here="x")
    assert (asked.node, asked.start, unpack(asked.hashes)) == ("b", 1, chain("ab"))

    fetch = fetching(rig, asked, leased("b", 2))
    assert (fetch.node, fetch.agents) == ("b", ("b/0/1",))
    assert unpack(fetch.hashes) == chain("ab")
    assert list(unpack_u32(fetch.slots)) == [100, 101]
    assert list(unpack_u64(fetch.fills)) == [500, 501]
    assert fetch.seconds == TRANSFER_SECONDS
    assert rig.effects(GiveBack) == []

    rig.accounts(Transferred)
    rig.all_moved(fetch.op)
    assert rig.effect(GiveBack) == GiveBack("b", leased("b", 2).lease)
    (account,) = rig.accounts(Transferred)
    assert (account.path, account.blocks, account.failed) == (Path.REMOTE_TO_HOST, 2, 0)
    assert set(rig.readable()) == set(chain("xab"))
    assert load(rig, 3) == Hits(host=3)


def test_blocks_that_are_wanted_again_are_saved_when_they_were_read_in_place() -> None:
    """Nobody waited, so there was no time to fetch them; the engine's copy is taken."""
    rig = rig_with(budget=8, online=True)
    read_from_b(rig, "ab")
    rig.leader.arrive("again", chain("ab"), now=0.0)
    rig.leader.located("again", rig.effect(AskRegistry).attempt, located(("b", 2)), 0.0)
    rig.leader.match("again", 0, now=0.0)
    asked = rig.effect(AskOwner)
    rig.leader.answered("again", asked.attempt, "b", 0, leased("b", 2), 0.0, 0.0)
    assert load(rig, 2, "again") == Hits(remote=2)
    assert rig.leader.store(chain("ab"), [1, 2], request="again") == (2, [1, 2])


def test_only_the_head_that_was_wanted_before_is_fetched() -> None:
    rig = rig_with(budget=8, online=True)
    read_from_b(rig, "ab")
    (asked,) = wanted_of_b(rig, "abcd", here="")
    assert unpack(asked.hashes) == chain("ab")


def test_what_others_have_counts_against_the_budget() -> None:
    rig = rig_with(budget=3, online=True)
    rig.on_disk("xy")
    read_from_b(rig, "ab")
    (asked,) = wanted_of_b(rig, "xyab", here="xy")
    assert unpack(asked.hashes) == chain("a")


def test_blocks_that_came_home_meanwhile_are_not_fetched_again() -> None:
    rig = rig_with(budget=8, online=True)
    read_from_b(rig, "ab")
    (asked,) = wanted_of_b(rig, "ab", here="")
    rig.save("a")
    fetch = fetching(rig, asked, leased("b", 2))
    assert unpack(fetch.hashes) == chain("b")
    assert list(unpack_u32(fetch.slots)) == [101]
    assert list(unpack_u64(fetch.fills)) == [501]


def test_a_shorter_lease_brings_less() -> None:
    rig = rig_with(budget=8, online=True)
    read_from_b(rig, "ab")
    (asked,) = wanted_of_b(rig, "ab", here="")
    assert unpack(fetching(rig, asked, leased("b", 1)).hashes) == chain("a")


@pytest.mark.parametrize("why", ["all came home", "host is full", "other agents", "too many"])
def test_a_lease_that_is_of_no_use_is_given_back(why: str) -> None:
    rig = rig_with(budget=4, slots=8, online=True)
    read_from_b(rig, "ab")
    (asked,) = wanted_of_b(rig, "ab", here="")
    if why == "all came home":
        rig.save("ab")
    if why == "host is full":
        rig.leader.store(chain("stuvwxyz"), range(8))
    grant = leased("b", 3 if why == "too many" else 2, life=2 if why == "other agents" else 1)
    rig.leader.answered("r", asked.attempt, "b", 0, grant, 0.0, 0.0)
    assert rig.effect(GiveBack) == GiveBack("b", grant.lease)
    assert rig.step().remote_fetches == ()


@pytest.mark.parametrize("answer", [None, Refused(reason="not here")])
def test_an_owner_that_lends_nothing_is_asked_again_when_the_request_is_scheduled(
    answer: Refused | None,
) -> None:
    rig = rig_with(budget=8, online=True)
    read_from_b(rig, "ab")
    (asked,) = wanted_of_b(rig, "ab", here="")
    rig.leader.answered("r", asked.attempt, "b", 0, answer, 0.0, 0.0)
    assert rig.step().remote_fetches == ()
    if answer is None:
        assert not rig.leader.peers.can_ask("b", now=0.0), "it is left alone for a while"
    else:
        assert rig.leader.match("r", 0, now=0.0) is None
        assert rig.effect(AskOwner).attempt != asked.attempt


def test_a_request_can_be_scheduled_while_its_blocks_come_from_another_node() -> None:
    """It reads them in place, under a lease of its own; the copy is for those who come later."""
    rig = rig_with(budget=8, online=True)
    read_from_b(rig, "ab")
    (asked,) = wanted_of_b(rig, "ab", here="")
    fetch = fetching(rig, asked, leased("b", 2, number=1))
    assert rig.leader.match("r", 0, now=0.0) is None
    again = rig.effect(AskOwner)
    rig.leader.answered("r", again.attempt, "b", 0, leased("b", 2, number=2), 0.0, 0.0)
    assert load(rig, 2) == Hits(remote=2)
    assert rig.effect(GiveBack).lease == leased("b", 2, number=2).lease
    rig.all_moved(fetch.op)
    assert rig.effect(GiveBack).lease == leased("b", 2, number=1).lease
    assert set(rig.readable()) == set(chain("ab"))


def test_a_lease_for_a_request_that_is_over_still_brings_its_blocks() -> None:
    rig = rig_with(budget=8, online=True)
    read_from_b(rig, "ab")
    (asked,) = wanted_of_b(rig, "ab", here="")
    rig.leader.finish("r")
    rig.all_moved(fetching(rig, asked, leased("b", 2)).op)
    assert set(rig.readable()) == set(chain("ab"))


def test_a_node_whose_blocks_could_not_be_fetched_is_left_alone() -> None:
    rig = rig_with(budget=8, online=True)
    read_from_b(rig, "ab")
    (asked,) = wanted_of_b(rig, "ab", here="")
    rig.moved(fetching(rig, asked, leased("b", 2)).op, failed=(0, 1))
    assert not rig.leader.peers.can_ask("b", now=0.0)
    assert rig.readable() == []
    assert rig.effect(GiveBack).node == "b"


@pytest.mark.parametrize(("now", "left"), [(1.0, 3.0), (9.0, 0.0)])
def test_a_fetch_gets_no_more_time_than_its_lease_has_left(now: float, left: float) -> None:
    rig = rig_with(budget=8, online=True)
    read_from_b(rig, "ab")
    (asked,) = wanted_of_b(rig, "ab", here="")
    assert fetching(rig, asked, leased("b", 2, seconds=4.0), now).seconds == left


def test_leases_are_asked_for_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch_module, "MAX_ASKED", 0)
    rig = rig_with(budget=8, online=True)
    read_from_b(rig, "ab")
    assert wanted_of_b(rig, "ab", here="") == []

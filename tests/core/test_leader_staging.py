"""Leases on blocks that are on disk: they are brought up first, and the one who asked waits."""

from __future__ import annotations

import pytest

from kvbm_schemas.block import Tier, pack, unpack
from kvbm_schemas.events import Stored
from kvbm_schemas.requests import LeaseAnswer, Leased, Refused
from kvbm_schemas.step import Fetch
from kvbm_service.core import lending as lending_module
from kvbm_service.core.accounts import Path, Transferred
from kvbm_service.core.columns import unpack_u32, unpack_u64
from kvbm_service.core.effects import Answer, AskOwner, AskRegistry, GiveBack, Publish, TellRanks
from tests.core.builders import (
    INSTANCE,
    LEASE_SECONDS,
    LOOKUP_SECONDS,
    Rig,
    chain,
    leased,
    located,
    told_to_fetch,
)

STAGING_SECONDS = 0.2
IN_TIME = STAGING_SECONDS / 4
TOO_LATE = STAGING_SECONDS
TOKEN = "a-token-of-sixteen"


def ask(rig: Rig, names: str, token: str = TOKEN, now: float = 0.0) -> LeaseAnswer | None:
    """Another node asks for a lease."""
    answer = rig.leader.acquire(pack(chain(names)), token, now)
    rig.leader.check_integrity()
    return answer


def staging(rig: Rig, names: str, token: str = TOKEN) -> Fetch:
    """Another node asks for a lease on what is on disk, and has to wait for this."""
    assert ask(rig, names, token) is None
    return told_to_fetch(rig)


def lent(answer: LeaseAnswer | None) -> int:
    """How many blocks."""
    return len(unpack_u32(answer.slots)) if isinstance(answer, Leased) else 0


def answer(rig: Rig, token: str = TOKEN) -> LeaseAnswer:
    """What the one who waited is told."""
    effect = rig.effect(Answer)
    assert effect.lease == token
    return effect.answer


# -- the owner ---------------------------------------------------------------------------------


def test_blocks_on_disk_are_brought_into_the_host_tier_and_lent_from_there() -> None:
    rig = Rig(disk=8)
    rig.on_disk("xab")
    fetch = staging(rig, "ab")
    assert unpack(fetch.hashes) == chain("ab")
    assert list(unpack_u32(fetch.disk)) == [1, 2]
    assert list(unpack_u64(fetch.fills)) == rig.leader.tiers.pool(Tier.DISK).fills([1, 2])
    assert fetch.instance == INSTANCE

    rig.all_moved(fetch.op, now=IN_TIME)
    told = answer(rig)
    assert isinstance(told, Leased)
    assert told.lease == TOKEN
    assert told.slots == fetch.host
    assert list(unpack_u64(told.fills)) == [fetch.op, fetch.op]
    assert rig.leader.tiers.host.pinned == 2
    assert rig.leader.tiers.pool(Tier.DISK).pinned == 0


def test_blocks_on_their_way_up_count_against_what_may_be_lent() -> None:
    rig = Rig(slots=8, disk=8)
    rig.on_disk("abcdefgh")
    assert unpack(staging(rig, "abc", "first-token-of-16").hashes) == chain("abc")
    assert unpack(staging(rig, "defg", "second-token-of-16").hashes) == chain("d")
    assert lent(ask(rig, "h", "third-token-of-sixteen")) == 0
    assert rig.leader.tiers.host.used == 4, "half of the tier is left to the own engine"


def test_blocks_that_came_up_are_in_both_tiers() -> None:
    rig = Rig(disk=8, min_frequency=0)
    rig.on_disk("ab")
    rig.all_moved(staging(rig, "ab").op)
    (event,) = [effect.event for effect in rig.effects(Publish)]
    assert isinstance(event, Stored)
    assert (event.tier, unpack(event.hashes)) == (Tier.HOST, chain("ab"))
    assert rig.readable(Tier.DISK) == chain("ab")
    assert rig.step().spills == ()


def test_the_lease_lasts_from_when_it_was_given() -> None:
    rig = Rig(disk=8)
    rig.on_disk("ab")
    rig.all_moved(staging(rig, "ab").op, now=IN_TIME)
    rig.leader.tick(now=LEASE_SECONDS)
    assert rig.leader.tiers.host.pinned == 2
    rig.leader.tick(now=LEASE_SECONDS + IN_TIME)
    assert rig.leader.tiers.host.pinned == 0


def test_only_what_is_not_in_the_host_tier_is_brought_up() -> None:
    rig = Rig(disk=8)
    rig.save("ac")
    rig.on_disk("abcd")
    fetch = staging(rig, "abcd")
    assert unpack(fetch.hashes) == chain("bd")
    rig.all_moved(fetch.op)
    assert lent(answer(rig)) == 4


def test_while_blocks_come_up_they_stay_on_disk() -> None:
    rig = Rig(disk=2, min_frequency=0)
    rig.on_disk("ab")
    fetch = staging(rig, "ab")
    rig.save("x")
    assert rig.step().spills == ()
    rig.all_moved(fetch.op)
    rig.leader.tick(now=LEASE_SECONDS)
    assert rig.readable(Tier.DISK) == chain("ab")


def test_every_rank_is_waited_for() -> None:
    rig = Rig(disk=8, world_size=2)
    rig.on_disk("ab")
    fetch = staging(rig, "ab")
    rig.moved(fetch.op, rank=1)
    assert rig.effects(Answer) == []
    rig.moved(fetch.op, rank=0)
    assert lent(answer(rig)) == 2


def test_a_block_that_one_rank_cannot_read_is_neither_lent_nor_kept() -> None:
    rig = Rig(disk=8, world_size=2)
    rig.on_disk("abc")
    fetch = staging(rig, "abc")
    rig.moved(fetch.op, rank=1, failed=(1,))
    rig.moved(fetch.op, rank=0)
    assert lent(answer(rig)) == 1
    assert rig.readable(Tier.DISK) == chain("ac")
    assert set(rig.readable()) == set(chain("ac"))
    assert rig.accounts(Transferred) == [
        Transferred(Path.DISK_TO_HOST, 2, 2 * 2 * 64, 1, "broken", 0.0)
    ]


def test_when_the_first_block_cannot_be_read_the_lease_is_refused() -> None:
    rig = Rig(disk=8)
    rig.on_disk("ab")
    rig.moved(staging(rig, "ab").op, failed=(0,))
    assert isinstance(answer(rig), Refused)
    assert rig.leader.tiers.host.pinned == 0


def test_a_chain_whose_head_is_nowhere_is_refused_at_once() -> None:
    rig = Rig(disk=8)
    rig.on_disk("bc")
    assert isinstance(ask(rig, "abc"), Refused)
    assert rig.effects(TellRanks) == []


def test_a_chain_is_brought_up_as_far_as_it_goes_without_a_gap() -> None:
    rig = Rig(disk=8)
    rig.on_disk("abd")
    fetch = staging(rig, "abcd")
    assert unpack(fetch.hashes) == chain("ab")
    rig.all_moved(fetch.op)
    assert lent(answer(rig)) == 2


def test_what_is_all_in_the_host_tier_is_lent_at_once() -> None:
    rig = Rig(disk=8)
    rig.save("ab")
    rig.on_disk("c")
    assert lent(ask(rig, "abx")) == 2
    assert rig.effects(TellRanks) == []


def test_no_more_is_brought_up_than_may_be_lent() -> None:
    rig = Rig(slots=8, disk=8)
    rig.on_disk("abcdefgh")
    fetch = staging(rig, "abcdefgh")
    assert unpack(fetch.hashes) == chain("abcd")


def test_bringing_up_a_chains_tail_does_not_evict_its_head() -> None:
    rig = Rig(slots=4, disk=8)
    rig.save("axyz")
    rig.on_disk("b")
    fetch = staging(rig, "ab")
    rig.all_moved(fetch.op)
    assert lent(answer(rig)) == 2


def test_a_host_tier_without_a_slot_to_give_lends_what_it_has() -> None:
    rig = Rig(slots=4, disk=8)
    rig.save("a")
    rig.on_disk("b")
    rig.leader.store(chain("xyz"), [1, 2, 3])
    assert lent(ask(rig, "ab")) == 1
    assert rig.effects(TellRanks) == []


def test_so_many_may_wait_for_the_disk_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lending_module, "MAX_STAGED", 1)
    rig = Rig(disk=8)
    rig.on_disk("abc")
    fetch = staging(rig, "a")
    assert isinstance(ask(rig, "b", "another-token-of-16"), Refused)
    assert rig.effects(TellRanks) == []
    rig.all_moved(fetch.op)
    assert lent(answer(rig)) == 1
    staging(rig, "c", "another-token-of-16")


def test_two_who_ask_for_the_same_blocks_both_get_them_though_they_come_up_once() -> None:
    rig = Rig(slots=16, disk=8)
    rig.on_disk("abc")
    fetch = staging(rig, "ab", "first-token-of-16")
    assert ask(rig, "ab", "second-token-of-16") is None
    assert rig.effects(TellRanks) == []
    assert ask(rig, "abc", "third-token-of-16") is None
    rest = told_to_fetch(rig)
    assert unpack(rest.hashes) == chain("c")

    rig.all_moved(fetch.op)
    answers = {effect.lease: lent(effect.answer) for effect in rig.effects(Answer)}
    assert answers == {"first-token-of-16": 2, "second-token-of-16": 2}
    rig.all_moved(rest.op)
    assert lent(answer(rig, "third-token-of-16")) == 3


# -- when it takes too long --------------------------------------------------------------------


def test_one_who_has_waited_long_enough_gets_what_is_there() -> None:
    rig = Rig(disk=8)
    rig.save("a")
    rig.on_disk("bc")
    fetch = staging(rig, "abc")
    rig.leader.tick(now=IN_TIME)
    assert rig.effects(Answer) == []
    rig.leader.tick(now=TOO_LATE)
    assert lent(answer(rig)) == 1

    rig.all_moved(fetch.op, now=TOO_LATE)
    assert rig.effects(Answer) == [], "it is told once"
    assert set(rig.readable()) == set(chain("abc"))
    assert lent(ask(rig, "abc", "another-token-of-16", TOO_LATE)) == 3


def test_one_who_waited_for_nothing_is_refused() -> None:
    rig = Rig(disk=8)
    rig.on_disk("ab")
    staging(rig, "ab")
    rig.leader.tick(now=TOO_LATE)
    assert isinstance(answer(rig), Refused)


def test_ranks_that_say_nothing_are_told_again_with_the_engines_step() -> None:
    rig = Rig(disk=8, world_size=2)
    rig.on_disk("ab")
    fetch = staging(rig, "ab")
    assert not rig.leader.busy, "no step is needed"
    rig.moved(fetch.op, rank=0)
    rig.leader.unheard(fetch)
    assert rig.leader.busy
    assert rig.step().fetches == (fetch,)
    assert rig.step().fetches == ()
    rig.moved(fetch.op, rank=0)
    assert rig.effects(Answer) == []
    rig.moved(fetch.op, rank=1)
    assert lent(answer(rig)) == 2


def test_whoever_waits_is_answered_though_the_disk_is_lost() -> None:
    rig = Rig(disk=8)
    rig.save("a")
    rig.on_disk("b")
    fetch = staging(rig, "ab")
    rig.lose_disk()
    rig.moved(fetch.op, failed=(0,))
    assert lent(answer(rig)) == 1
    assert rig.leader.tiers.host.used == 1


def test_whoever_waits_is_refused_when_all_blocks_are_forgotten() -> None:
    rig = Rig(disk=8)
    rig.on_disk("ab")
    fetch = staging(rig, "ab")
    rig.leader.reset()
    rig.all_moved(fetch.op)
    assert isinstance(answer(rig), Refused)
    assert rig.leader.tiers.host.used == 0
    assert rig.leader.tiers.pool(Tier.DISK).used == 0


def test_one_who_asks_after_blocks_were_forgotten_waits_for_none_of_them() -> None:
    rig = Rig(slots=16, disk=8)
    rig.on_disk("a")
    staging(rig, "a")
    rig.leader.reset()
    rig.effects(Answer)
    rig.on_disk("b")
    assert isinstance(ask(rig, "ab", "another-token-of-16"), Refused)
    fetch = staging(rig, "ba", "a-third-token-of-16")
    assert unpack(fetch.hashes) == chain("b")


# -- the reader --------------------------------------------------------------------------------


def leasing(rig: Rig, tier: Tier) -> AskOwner:
    """Node `b` has `ab` in `tier`, and is being asked for them."""
    rig.meet("b")
    rig.leader.arrive("r", chain("ab"), now=0.0)
    where = located(("b", 2), tier=tier)
    rig.leader.located("r", rig.effect(AskRegistry).attempt, where, now=0.0)
    assert rig.leader.match("r", 0, now=0.0) is None
    return rig.effect(AskOwner)


def test_an_owner_gets_more_time_for_blocks_on_its_disk() -> None:
    rig = Rig()
    asked = leasing(rig, Tier.DISK)
    assert asked.seconds == pytest.approx(LOOKUP_SECONDS + STAGING_SECONDS)
    just_in_time = LOOKUP_SECONDS + STAGING_SECONDS - 0.001
    assert rig.leader.match("r", 0, now=just_in_time) is None
    rig.leader.answered("r", asked.attempt, "b", 0, leased("b", 2), 0.0, just_in_time)
    assert rig.leader.match("r", 0, now=just_in_time) == 2


def test_an_owner_that_takes_longer_is_not_waited_for() -> None:
    rig = Rig()
    asked = leasing(rig, Tier.DISK)
    assert rig.leader.match("r", 0, now=LOOKUP_SECONDS + STAGING_SECONDS) == 0
    rig.leader.answered("r", asked.attempt, "b", 0, leased("b", 2), 0.0, 1.0)
    assert rig.effect(GiveBack).node == "b"


def test_an_owner_gets_no_more_time_for_blocks_in_its_host_tier() -> None:
    rig = Rig()
    assert leasing(rig, Tier.HOST).seconds == pytest.approx(LOOKUP_SECONDS)
    assert rig.leader.match("r", 0, now=LOOKUP_SECONDS) == 0


def test_the_engine_is_kept_waiting_for_a_disk_only_once() -> None:
    """Each answer comes just in time, and each makes another question necessary."""
    rig = Rig()
    rig.meet("b")
    now, computed = 0.0, 0
    rig.leader.arrive("r", chain("abcdefghijklmnop"), now)
    while rig.leader.match("r", computed, now) is None:
        assert now < 2 * LOOKUP_SECONDS + STAGING_SECONDS
        asked = rig.leader.take_effects()
        for question in asked:
            if isinstance(question, AskRegistry):
                here = located(("b", 1), tier=Tier.DISK)
                rig.leader.located("r", question.attempt, here, now)
            elif isinstance(question, AskOwner):
                now += question.seconds * 0.9
                rig.leader.answered(
                    "r", question.attempt, "b", question.start, leased("b", 1), now, now
                )
                computed = min(computed + 2, 14)

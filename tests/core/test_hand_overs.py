"""Blocks handed over from a prefill engine to a decode engine: both leaders' halves."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from kvbm_schemas import step
from kvbm_schemas.block import Tier, pack
from kvbm_schemas.records import DeviceRecord
from kvbm_schemas.requests import Leased, Refused
from kvbm_service.core import hand_overs
from kvbm_service.core.columns import unpack_u32, unpack_u64
from kvbm_service.core.effects import (
    Answer,
    AskOwner,
    AskRegistry,
    GiveBack,
    KeepUp,
    TellRanks,
)
from kvbm_service.core.leader import Leader
from kvbm_service.core.limits import Limits
from kvbm_service.core.reads import Origin
from tests.core.builders import LEASE_SECONDS, LOOKUP_SECONDS, Rig, chain, leased, rank_record

TOKEN = "handed-over-of-sixteen"
QUESTION = "question-of-sixteen-1"
HAND_OVER = 2.0


class Owner(Rig):
    """A prefill engine's leader, whose ranks can lend device blocks."""

    def __init__(self, world_size: int = 1, lent_blocks: int = 8, **limits: object) -> None:
        super().__init__(slots=8, world_size=world_size)
        device = DeviceRecord(headers=0, blocks=16, device=None, regions=())
        ranks = [
            replace(rank_record("me", rank, world_size), device=device)
            for rank in range(world_size)
        ]
        chosen = Limits(LOOKUP_SECONDS, LEASE_SECONDS, lent_blocks=lent_blocks)
        self.leader = Leader(ranks, chosen._replace(**limits))  # type: ignore[arg-type]
        self.leader.journal.begin(1, empty=True)

    def hand_over(
        self, names: str, device: list[int], token: str = TOKEN, now: float = 0.0
    ) -> list[int] | None:
        held = self.leader.hand_over(token, chain(names), device, now)
        self.leader.check_integrity()
        return held

    def order(self) -> step.Lend:
        """What the ranks are told at once."""
        order = self.effect(TellRanks).order
        assert isinstance(order, step.Lend)
        return order

    def lend(self, names: str, device: list[int], token: str = TOKEN) -> step.Lend:
        """Hand over, and let all ranks answer."""
        self.hand_over(names, device, token)
        order = self.order()
        self.all_moved(order.op)
        return order

    def claim(self, names: str, token: str = TOKEN, now: float = 0.0) -> object:
        answer = self.leader.acquire(pack(chain(names)), QUESTION, now, handed_over=token)
        self.leader.check_integrity()
        return answer

    def given_back(self) -> list[int]:
        """Let the ranks answer what they are told now; what the engine gets back then."""
        for unlend in self.step().unlends:
            assert self.leader.take_freed_blocks() == []
            self.all_moved(unlend.op)
        return self.leader.take_freed_blocks()


def test_device_blocks_are_held_and_lent_at_once() -> None:
    owner = Owner()
    assert owner.hand_over("abc", [5, 6, 7]) == [5, 6, 7]
    order = owner.order()
    assert order.hashes == pack(chain("abc"))
    assert list(unpack_u32(order.blocks)) == [5, 6, 7]


def test_whoever_names_the_lease_is_told_the_device_blocks_and_their_stamp() -> None:
    owner = Owner(world_size=2)
    order = owner.lend("abc", [5, 6, 7])
    answer = owner.claim("bcx")
    assert isinstance(answer, Leased)
    assert answer.tier is Tier.DEVICE
    assert list(unpack_u32(answer.slots)) == [6, 7]
    assert list(unpack_u64(answer.fills)) == [order.op] * 2
    assert answer.agents == ("me/0/1", "me/1/1")


def test_whoever_does_not_name_it_gets_nothing_of_the_device() -> None:
    owner = Owner()
    owner.lend("abc", [5, 6, 7])
    assert isinstance(owner.leader.acquire(pack(chain("abc")), QUESTION, 0.0), Refused)
    assert isinstance(owner.claim("abc", token="a-made-up-token-16"), Refused)


def test_nobody_is_told_before_every_rank_lends() -> None:
    owner = Owner(world_size=2)
    owner.hand_over("ab", [5, 6])
    order = owner.order()
    assert owner.claim("ab") is None
    owner.moved(order.op, rank=0)
    assert owner.effects(Answer) == []
    owner.moved(order.op, rank=1)
    assert isinstance(owner.effect(Answer).answer, Leased)


def test_one_who_asks_too_early_does_not_wait_for_ever() -> None:
    owner = Owner()
    owner.hand_over("ab", [5, 6])
    assert owner.claim("ab") is None
    owner.leader.tick(HAND_OVER / 2 - 0.1)
    assert owner.effects(Answer) == [], "its time is longer than a disk's"
    owner.leader.tick(HAND_OVER)
    assert isinstance(owner.effect(Answer).answer, Refused)


def test_a_rank_that_cannot_lend_ends_it() -> None:
    owner = Owner(world_size=2)
    owner.hand_over("ab", [5, 6])
    order = owner.order()
    assert owner.claim("ab") is None
    owner.moved(order.op, 0, failed=[0])
    assert isinstance(owner.effect(Answer).answer, Refused)
    owner.moved(order.op, 1)
    assert owner.given_back() == [5, 6]


def test_the_engine_gets_its_blocks_back_only_when_no_rank_lends_them_any_more() -> None:
    owner = Owner(world_size=2)
    owner.lend("ab", [5, 6])
    owner.leader.release(TOKEN)
    assert owner.leader.busy
    (unlend,) = owner.step().unlends
    owner.moved(unlend.op, rank=0)
    assert owner.leader.take_freed_blocks() == []
    owner.moved(unlend.op, rank=1)
    assert owner.leader.take_freed_blocks() == [5, 6]
    assert not owner.leader.busy


def test_the_engine_is_told_to_wait_for_blocks_only_while_they_are_coming_back() -> None:
    """While they are lent it would wait in vain, and must preempt somebody."""
    owner = Owner()
    owner.hand_over("ab", [5, 6])
    waits = [owner.leader.holds_device_blocks]
    owner.all_moved(owner.order().op)
    waits.append(owner.leader.holds_device_blocks)
    owner.leader.release(TOKEN)
    waits.append(owner.leader.holds_device_blocks)
    assert owner.given_back() == [5, 6]
    waits.append(owner.leader.holds_device_blocks)
    assert waits == [False, False, True, False]


def test_ranks_are_told_to_stop_only_after_they_have_begun() -> None:
    """The order to lend goes by the bus, the other by the step: either may be late."""
    owner = Owner()
    owner.hand_over("ab", [5, 6])
    order = owner.order()
    owner.leader.release(TOKEN)
    assert owner.step().unlends == ()
    owner.all_moved(order.op)
    assert owner.given_back() == [5, 6]


def test_an_order_that_was_not_heard_rides_the_next_step_though_nobody_waits_any_more() -> None:
    owner = Owner()
    owner.hand_over("ab", [5, 6])
    order = owner.order()
    owner.leader.release(TOKEN)
    owner.leader.unheard(order)
    (again,) = owner.step().lends
    assert again.op == order.op
    assert owner.leader.busy
    owner.all_moved(order.op)
    assert owner.given_back() == [5, 6]


def test_a_block_that_two_requests_share_is_lent_until_both_have_ended() -> None:
    owner = Owner()
    first = owner.lend("ab", [5, 6])
    assert owner.hand_over("ac", [5, 7], token="the-second-of-sixteen") == [7]
    owner.all_moved(owner.order().op)
    answer = owner.claim("ac", token="the-second-of-sixteen")
    assert isinstance(answer, Leased)
    assert unpack_u64(answer.fills)[0] == first.op
    owner.leader.release(TOKEN)
    assert owner.given_back() == [6]
    owner.leader.release("the-second-of-sixteen")
    assert sorted(owner.given_back()) == [5, 7]


def test_more_device_blocks_than_may_be_lent_are_kept_in_the_host_tier() -> None:
    owner = Owner(lent_blocks=2)
    owner.save("abc")
    assert owner.hand_over("abc", [5, 6, 7]) == []
    assert owner.leader.tiers.host.pinned == 3
    answer = owner.claim("abc")
    assert isinstance(answer, Leased)
    assert answer.tier is Tier.HOST
    owner.leader.release(answer.lease)
    owner.leader.release(TOKEN)
    assert owner.leader.tiers.host.pinned == 0


def test_ranks_that_cannot_lend_device_blocks_are_not_asked_to() -> None:
    rig = Rig(world_size=2)
    rig.save("ab")
    assert rig.leader.hand_over(TOKEN, chain("ab"), [1, 2], 0.0) == []
    assert rig.effects(TellRanks) == []


def test_blocks_that_are_still_being_saved_are_waited_for_and_kept() -> None:
    rig = Rig()
    rig.leader.store(chain("ab"), [1, 2])
    (save,) = rig.step().saves
    assert rig.leader.hand_over(TOKEN, chain("ab"), [], 0.0) == []
    assert rig.leader.acquire(pack(chain("ab")), QUESTION, 0.0, handed_over=TOKEN) is None
    rig.saved(save.op)
    answer = rig.effect(Answer).answer
    assert isinstance(answer, Leased)
    assert len(unpack_u32(answer.slots)) == 2
    rig.leader.release(QUESTION)
    assert rig.leader.tiers.host.pinned == 2, "until the hand-over has ended"
    rig.leader.release(TOKEN)
    assert rig.leader.tiers.host.pinned == 0


@pytest.mark.parametrize("device", [[], [5, 6]], ids=["in the tiers", "on the device"])
def test_what_nobody_fetches_is_given_back_when_its_time_is_up(device: list[int]) -> None:
    owner = Owner()
    owner.save("ab")
    owner.hand_over("ab", device)
    for order in owner.effects(TellRanks):
        owner.all_moved(order.order.op)
    owner.leader.tick(LEASE_SECONDS - 0.1)
    assert isinstance(owner.claim("ab", now=LEASE_SECONDS - 0.1), Leased)
    owner.leader.release(QUESTION)
    owner.leader.tick(LEASE_SECONDS)
    assert isinstance(owner.claim("ab", now=LEASE_SECONDS), Refused)
    assert owner.given_back() == device
    assert owner.leader.tiers.host.pinned == 0


def test_a_renewed_lease_lasts_longer_but_not_for_ever() -> None:
    owner = Owner()
    owner.lend("ab", [5, 6])
    now = 0.0
    while now < hand_overs.MAX_HAND_OVER_SECONDS - 1:
        now += LEASE_SECONDS / 2
        owner.leader.renew(TOKEN, now)
        owner.leader.tick(now)
        assert isinstance(owner.claim("ab", now=now), Leased) == (
            now < hand_overs.MAX_HAND_OVER_SECONDS
        )
    assert owner.given_back() == [5, 6]


def test_an_answer_is_good_for_no_longer_than_the_hand_over() -> None:
    owner = Owner()
    owner.lend("ab", [5, 6])
    answer = owner.claim("ab", now=10.0)
    assert isinstance(answer, Leased)
    assert answer.seconds == LEASE_SECONDS - 10.0


def test_a_reset_ends_what_was_handed_over() -> None:
    owner = Owner()
    owner.lend("ab", [5, 6])
    owner.leader.reset()
    assert isinstance(owner.claim("ab"), Refused)
    assert owner.given_back() == [5, 6]


def test_so_many_may_be_open_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hand_overs, "MAX_HAND_OVERS", 2)
    owner = Owner()
    owner.save("ab")
    given = [owner.hand_over("ab", [], token=f"number-{n}-of-sixteen") for n in range(3)]
    assert given == [[], [], None]


def test_so_many_may_wait_for_one_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hand_overs, "MAX_CLAIMS", 1)
    owner = Owner()
    owner.hand_over("ab", [5, 6])
    assert owner.claim("ab") is None
    assert isinstance(owner.claim("ab"), Refused)


def test_when_a_rank_is_lost_blocks_come_back_once_all_are_at_rest() -> None:
    owner = Owner(world_size=2)
    owner.lend("ab", [5, 6])
    owner.leader.rank_lost(1, now=0.0)
    owner.leader.check_integrity()
    assert isinstance(owner.claim("ab"), Refused)
    assert owner.step().unlends == ()
    owner.leader.rank_took_place(rank_record("me", 1, 2, life=2), (), now=0.0)
    fence = owner.step().fence
    owner.all_moved(fence)
    assert owner.given_back() == [5, 6]


# -- the decode engine's half ----------------------------------------------------------------

ORIGIN = Origin("a", TOKEN, 3)


def reader(origin: Origin = ORIGIN, names: str = "abcd") -> Rig:
    rig = Rig()
    rig.meet("a")
    rig.leader.arrive("r", chain(names), 0.0, origin)
    return rig


def test_who_hands_blocks_over_is_asked_and_no_registry() -> None:
    rig = reader()
    assert rig.leader.match("r", 0, now=0.0) is None
    effects = rig.leader.take_effects()
    assert not any(isinstance(effect, AskRegistry) for effect in effects)
    (question,) = [effect for effect in effects if isinstance(effect, AskOwner)]
    assert (question.node, question.handed_over) == ("a", TOKEN)
    assert question.hashes == pack(chain("abc"))


def answered(rig: Rig, answer: Leased | Refused | None, now: float = 0.0) -> None:
    assert rig.leader.match("r", 0, now) is None
    question = rig.effect(AskOwner)
    rig.leader.answered("r", question.attempt, "a", question.start, answer, now, now)
    rig.leader.check_integrity()


def test_what_is_lent_on_the_device_is_read_from_there() -> None:
    rig = reader()
    answered(rig, replace(leased("a", 3), tier=Tier.DEVICE))
    assert rig.leader.match("r", 0, now=0.0) == 3
    rig.leader.load("r", 0, [1, 2, 3], now=0.0)
    (read,) = rig.load_command().remote
    assert read.tier is Tier.DEVICE


def test_it_is_released_when_the_blocks_have_come() -> None:
    rig = reader()
    answered(rig, leased("a", 3))
    assert rig.leader.match("r", 0, now=0.0) == 3
    rig.leader.load("r", 0, [1, 2, 3], now=0.0)
    load = rig.load_command()
    assert not any(effect.lease == TOKEN for effect in rig.effects(GiveBack))
    rig.loaded(load)
    assert TOKEN in [effect.lease for effect in rig.effects(GiveBack)]


@pytest.mark.parametrize("answer", [Refused(reason="no"), None], ids=["refused", "silent"])
def test_if_it_cannot_be_had_the_registry_is_asked(answer: Refused | None) -> None:
    rig = reader()
    if answer is None:
        assert rig.leader.match("r", 0, now=0.0) is None
        rig.effect(AskOwner)
        rig.leader.match("r", 0, now=HAND_OVER + LOOKUP_SECONDS)
    else:
        answered(rig, answer)
        assert rig.leader.match("r", 0, now=0.0) is None
    rig.effect(AskRegistry)


def test_who_hands_blocks_over_may_take_longer_than_a_disk() -> None:
    rig = reader()
    assert rig.leader.match("r", 0, now=0.0) is None
    assert rig.effect(AskOwner).seconds == HAND_OVER + LOOKUP_SECONDS
    assert rig.leader.match("r", 0, now=HAND_OVER) is None
    assert rig.effects(AskRegistry) == []


def test_an_unknown_node_is_not_asked() -> None:
    rig = reader(origin=Origin("nobody", TOKEN, 3))
    rig.leader.match("r", 0, now=0.0)
    assert rig.effects(AskOwner) == []


def test_it_is_kept_up_while_the_request_waits_and_released_when_it_ends() -> None:
    rig = reader()
    rig.leader.take_effects()
    for now in (0.1, 5.0, 9.9):
        rig.leader.tick(now)
    assert rig.effects(KeepUp) == []
    rig.leader.tick(10.0)
    assert rig.effects(KeepUp) == [KeepUp("a", TOKEN)]
    rig.leader.finish("r")
    assert rig.effects(GiveBack) == [GiveBack("a", TOKEN)]
    rig.leader.tick(30.0)
    assert rig.effects(KeepUp) == []


def test_it_is_kept_up_at_once_for_it_may_be_old_already() -> None:
    assert reader().effects(KeepUp) == [KeepUp("a", TOKEN)]


def test_it_is_released_when_a_lost_rank_breaks_the_promise() -> None:
    rig = reader()
    answered(rig, leased("a", 3))
    assert rig.leader.match("r", 0, now=0.0) == 3
    rig.leader.rank_lost(0, now=0.0)
    rig.leader.load("r", 0, [1, 2, 3], now=0.0)
    assert TOKEN in [effect.lease for effect in rig.effects(GiveBack)]
    rig.leader.tick(LEASE_SECONDS)
    assert rig.effects(KeepUp) == []


def test_what_the_engine_does_not_want_is_released_at_once() -> None:
    rig = reader()
    rig.leader.take_effects()
    rig.leader.load("r", 0, [], now=0.0)
    assert rig.effects(GiveBack) == [GiveBack("a", TOKEN)]
    rig.leader.finish("r")
    assert rig.effects(GiveBack) == []


def test_a_request_of_which_no_block_is_wanted_gives_it_back_at_once() -> None:
    rig = reader(names="")
    assert rig.effects(GiveBack) == [GiveBack("a", TOKEN)]

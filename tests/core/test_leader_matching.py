"""The read path up to the answer: what is here, what others have, and how long that may take."""

from __future__ import annotations

import pytest

from kvbm_schemas.block import Tier, unpack
from kvbm_schemas.requests import Refused
from kvbm_service.core.effects import AskOwner, AskRegistry, GiveBack
from tests.core.builders import (
    LEASE_SECONDS,
    LOOKUP_SECONDS,
    Rig,
    chain,
    leased,
    located,
    node_record,
    rank_record,
)


def looking(rig: Rig, names: str, now: float = 0.0) -> AskRegistry:
    """A request `r` has arrived, and the registry is being asked."""
    rig.leader.arrive("r", chain(names), now)
    return rig.effect(AskRegistry)


def leasing(rig: Rig, names: str, *places: tuple[str, int], now: float = 0.0) -> list[AskOwner]:
    """The registry has named these owners, and they are being asked."""
    for node, _ in places:
        rig.meet(node)
    question = looking(rig, names, now)
    rig.leader.located("r", question.attempt, located(*places), now)
    assert rig.leader.match("r", 0, now) is None
    return rig.effects(AskOwner)


def answer(rig: Rig, question: AskOwner, answer: object, now: float = 0.0) -> None:
    rig.leader.answered(
        question.request, question.attempt, question.node, question.start, answer, now, now  # type: ignore[arg-type]
    )  # fmt: skip
    rig.leader.check_integrity()


# -- what is here ------------------------------------------------------------------------------


def test_a_request_of_which_all_is_here_is_matched_at_once() -> None:
    rig = Rig()
    rig.save("abc")
    rig.leader.arrive("r", chain("abc"), now=0.0)
    assert rig.effects(AskRegistry) == []
    assert rig.leader.match("r", 0, now=0.0) == 3


def test_what_the_engine_has_computed_itself_is_not_counted() -> None:
    rig = Rig()
    rig.save("abc")
    rig.leader.arrive("r", chain("abc"), now=0.0)
    assert rig.leader.match("r", 2, now=0.0) == 1


def test_a_request_of_which_nothing_is_here_is_a_miss_when_nobody_can_be_asked() -> None:
    rig = Rig(online=False)
    rig.leader.arrive("r", chain("abc"), now=0.0)
    assert rig.leader.match("r", 0, now=0.0) == 0


def test_offline_the_own_blocks_are_still_found() -> None:
    rig = Rig(online=False)
    rig.save("ab")
    rig.leader.arrive("r", chain("abc"), now=0.0)
    assert rig.leader.match("r", 0, now=0.0) == 2


def test_a_matched_block_stays_until_it_is_loaded() -> None:
    rig = Rig(slots=2, online=False)
    rig.save("ab")
    rig.leader.arrive("r", chain("ab"), now=0.0)
    assert rig.leader.match("r", 0, now=0.0) == 2
    assert rig.leader.store(chain("cd"), [1, 2]) == (0, [])
    rig.leader.finish("r")
    assert rig.leader.store(chain("cd"), [1, 2]) == (2, [1, 2])


def test_the_same_question_has_the_same_answer() -> None:
    rig = Rig(online=False)
    rig.save("ab")
    rig.leader.arrive("r", chain("ab"), now=0.0)
    assert [rig.leader.match("r", 0, now=t) for t in (0.0, 1.0, 2.0)] == [2, 2, 2]
    assert rig.leader.tiers.host.pinned == 2


def test_an_unknown_request_and_an_empty_chain_match_nothing() -> None:
    rig = Rig()
    assert rig.leader.match("r", 0, now=0.0) == 0
    rig.leader.arrive("e", [], now=0.0)
    assert rig.leader.match("e", 0, now=0.0) == 0


# -- what others have --------------------------------------------------------------------------


def test_for_what_is_not_here_the_registry_is_asked() -> None:
    rig = Rig()
    rig.save("a")
    question = looking(rig, "abc")
    assert unpack(question.hashes) == chain("bc")


def test_the_engine_is_told_to_ask_again_while_the_registry_is_asked() -> None:
    rig = Rig()
    looking(rig, "ab")
    assert rig.leader.match("r", 0, now=LOOKUP_SECONDS / 2) is None


def test_without_an_answer_the_deadline_makes_it_a_miss() -> None:
    rig = Rig()
    looking(rig, "ab")
    assert rig.leader.match("r", 0, now=LOOKUP_SECONDS) == 0
    assert rig.effects(AskRegistry) == []


def test_an_unreachable_registry_makes_it_a_miss_at_once() -> None:
    rig = Rig()
    question = looking(rig, "ab")
    rig.leader.located("r", question.attempt, None, now=0.001)
    assert rig.leader.match("r", 0, now=0.001) == 0


def test_own_and_leased_blocks_serve_one_prefix_together() -> None:
    rig = Rig()
    rig.save("ab")
    (question,) = leasing(rig, "abcde", ("b", 2))
    assert (question.node, question.start, unpack(question.hashes)) == ("b", 2, chain("cd"))
    answer(rig, question, leased("b", 2))
    assert rig.leader.match("r", 0, now=0.0) == 4


def test_a_prefix_may_come_from_several_nodes() -> None:
    rig = Rig()
    first, second = leasing(rig, "abcd", ("b", 1), ("c", 3))
    answer(rig, second, leased("c", 3))
    assert rig.leader.match("r", 0, now=0.0) is None
    answer(rig, first, leased("b", 1))
    assert rig.leader.match("r", 0, now=0.0) == 4


def test_a_refused_lease_ends_the_prefix_there() -> None:
    rig = Rig()
    first, second = leasing(rig, "abcd", ("b", 2), ("c", 2))
    answer(rig, first, leased("b", 2))
    answer(rig, second, Refused(reason="not here"))
    assert rig.leader.match("r", 0, now=0.0) == 2


def test_a_shorter_lease_ends_the_prefix_there_and_what_lies_behind_is_given_back() -> None:
    rig = Rig()
    first, second = leasing(rig, "abcd", ("b", 2), ("c", 2))
    answer(rig, first, leased("b", 1))
    answer(rig, second, leased("c", 2))
    assert rig.leader.match("r", 0, now=0.0) == 1
    rig.leader.finish("r")
    assert {effect.node for effect in rig.effects(GiveBack)} == {"b", "c"}


def test_a_lease_on_more_than_was_asked_for_is_given_back() -> None:
    rig = Rig()
    (question,) = leasing(rig, "abcd", ("b", 2))
    answer(rig, question, leased("b", 3))
    assert rig.effect(GiveBack).node == "b"
    assert rig.leader.match("r", 0, now=0.0) == 0


def test_a_lease_on_nothing_is_a_miss() -> None:
    rig = Rig()
    (question,) = leasing(rig, "ab", ("b", 2))
    answer(rig, question, leased("b", 0))
    assert rig.leader.match("r", 0, now=0.0) == 0
    rig.leader.finish("r")
    assert rig.effect(GiveBack).node == "b"


def test_a_lease_from_agents_that_the_ranks_do_not_know_is_given_back() -> None:
    rig = Rig()
    (question,) = leasing(rig, "abcd", ("b", 2))
    answer(rig, question, leased("b", 2, life=2))
    assert rig.effect(GiveBack).node == "b"
    assert rig.leader.match("r", 0, now=0.0) == 0


def test_without_an_owners_answer_the_deadline_leaves_what_is_certain() -> None:
    rig = Rig()
    rig.save("a")
    leasing(rig, "abc", ("b", 2))
    assert rig.leader.match("r", 0, now=LOOKUP_SECONDS / 2) is None
    assert rig.leader.match("r", 0, now=LOOKUP_SECONDS) == 1


def test_an_owner_that_does_not_answer_is_left_alone() -> None:
    rig = Rig()
    (question,) = leasing(rig, "ab", ("b", 2))
    answer(rig, question, None)
    assert rig.leader.match("r", 0, now=0.0) == 0
    rig.leader.finish("r")
    question_again = looking(rig, "ab", now=1.0)
    rig.leader.located("r", question_again.attempt, located(("b", 2)), now=1.0)
    assert rig.leader.match("r", 0, now=1.0) == 0


@pytest.mark.parametrize("known", ["nobody", "only the leader", "only the rank"])
def test_an_owner_that_is_not_all_there_is_not_asked(known: str) -> None:
    rig = Rig()
    if known == "only the leader":
        rig.leader.peers.leader_changed("b", node_record("b"))
    if known == "only the rank":
        rig.leader.peers.rank_changed("b", 0, rank_record("b"))
    question = looking(rig, "ab")
    rig.leader.located("r", question.attempt, located(("b", 2)), now=0.0)
    assert rig.leader.match("r", 0, now=0.0) == 0
    assert rig.effects(AskOwner) == []


def test_blocks_in_a_tier_that_cannot_be_leased_are_not_asked_for() -> None:
    rig = Rig()
    rig.meet("b")
    question = looking(rig, "ab")
    rig.leader.located("r", question.attempt, located(("b", 2), tier=Tier.DEVICE), now=0.0)
    assert rig.leader.match("r", 0, now=0.0) == 0


def test_what_came_home_meanwhile_is_not_asked_of_others() -> None:
    rig = Rig()
    rig.meet("b")
    question = looking(rig, "abcd")
    rig.leader.located("r", question.attempt, located(("b", 4)), now=0.0)
    rig.save("ab")
    assert rig.leader.match("r", 0, now=0.0) is None
    (question_to_owner,) = rig.effects(AskOwner)
    assert question_to_owner.start == 2
    assert unpack(question_to_owner.hashes) == chain("cd")


def test_the_registry_is_asked_again_when_its_answer_does_not_reach_so_far() -> None:
    rig = Rig()
    question = looking(rig, "abcd")
    rig.leader.located("r", question.attempt, located(("b", 1)), now=0.0)
    assert rig.leader.match("r", 2, now=0.0) is None
    assert unpack(rig.effect(AskRegistry).hashes) == chain("cd")


def test_an_answer_with_a_hole_is_used_up_to_the_hole() -> None:
    rig = Rig()
    rig.meet("b")
    question = looking(rig, "abcd")
    answer_with_hole = located(("b", 1), ("nobody", 1), ("b", 2))
    rig.leader.located("r", question.attempt, answer_with_hole, now=0.0)
    assert rig.leader.match("r", 0, now=0.0) is None
    (asked,) = rig.effects(AskOwner)
    assert unpack(asked.hashes) == chain("a")


def test_an_answer_that_is_longer_than_the_chain_is_cut() -> None:
    rig = Rig()
    (asked,) = leasing(rig, "ab", ("b", 30))
    assert unpack(asked.hashes) == chain("ab")


# -- late, old and repeated --------------------------------------------------------------------


def test_a_late_answer_of_the_registry_changes_nothing() -> None:
    rig = Rig()
    rig.meet("b")
    question = looking(rig, "ab")
    assert rig.leader.match("r", 0, now=LOOKUP_SECONDS) == 0
    rig.leader.located("r", question.attempt, located(("b", 2)), now=1.0)
    assert rig.leader.match("r", 0, now=1.0) == 0


def test_an_answer_to_an_older_question_changes_nothing() -> None:
    rig = Rig()
    rig.meet("b")
    question = looking(rig, "abcd")
    rig.leader.located("r", question.attempt, located(("b", 1)), now=0.0)
    assert rig.leader.match("r", 2, now=0.0) is None
    rig.effects(AskRegistry)
    rig.leader.located("r", question.attempt, located(("b", 4)), now=0.0)
    assert rig.leader.match("r", 2, now=0.001) is None


@pytest.mark.parametrize("why", ["deadline", "finished", "plan dropped"])
def test_a_lease_that_comes_too_late_is_given_back(why: str) -> None:
    rig = Rig()
    (question,) = leasing(rig, "ab", ("b", 2))
    if why == "deadline":
        assert rig.leader.match("r", 0, now=LOOKUP_SECONDS) == 0
    elif why == "finished":
        rig.leader.finish("r")
    else:
        rig.leader.tick(now=LEASE_SECONDS)
    answer(rig, question, leased("b", 2), now=LOOKUP_SECONDS)
    assert rig.effect(GiveBack) == GiveBack("b", leased("b", 2).lease)


def test_a_second_lease_for_the_same_question_is_given_back() -> None:
    rig = Rig()
    first, _ = leasing(rig, "abcd", ("b", 2), ("c", 2))
    answer(rig, first, leased("b", 2, number=1))
    answer(rig, first, leased("b", 2, number=2))
    assert rig.effect(GiveBack).lease == leased("b", 2, number=2).lease


def test_the_engine_is_never_kept_waiting_for_longer_than_two_deadlines() -> None:
    """Each answer comes just in time, and each makes another question necessary."""
    rig = Rig()
    rig.meet("b")
    now, computed = 0.0, 0
    questions = [looking(rig, "abcdefgh")]
    while rig.leader.match("r", computed, now) is None:
        assert now < 2 * LOOKUP_SECONDS
        questions += rig.effects(AskRegistry)
        now += LOOKUP_SECONDS * 0.9
        rig.leader.located("r", questions[-1].attempt, located(("b", 1)), now)
        computed = min(computed + 2, 7)
    assert len(questions) > 2


def test_one_who_asks_again_after_an_answer_has_new_patience() -> None:
    rig = Rig()
    looking(rig, "ab")
    assert rig.leader.match("r", 0, now=LOOKUP_SECONDS) == 0
    rig.leader.load("r", 0, [], now=LOOKUP_SECONDS)
    assert rig.leader.match("r", 0, now=100.0) is None
    assert len(rig.effects(AskRegistry)) == 1


# -- old plans ---------------------------------------------------------------------------------


def test_a_plan_that_got_too_old_is_made_anew() -> None:
    rig = Rig()
    (question,) = leasing(rig, "ab", ("b", 2))
    answer(rig, question, leased("b", 2))
    assert rig.leader.match("r", 0, now=0.0) == 2
    assert rig.leader.match("r", 0, now=LEASE_SECONDS / 2) is None
    assert rig.effect(AskRegistry).request == "r"


def test_time_drops_a_plan_that_nobody_uses() -> None:
    rig = Rig()
    rig.save("a")
    (question,) = leasing(rig, "ab", ("b", 1))
    answer(rig, question, leased("b", 1))
    assert rig.leader.match("r", 0, now=0.0) == 2
    rig.leader.take_commands(0.0)  # the step is built without it
    rig.leader.tick(now=LEASE_SECONDS)
    assert rig.effect(GiveBack).node == "b"
    assert rig.leader.tiers.host.pinned == 0


def test_what_was_promised_can_be_loaded_however_long_the_process_stood_still() -> None:
    rig = Rig()
    rig.save("a")
    (question,) = leasing(rig, "ab", ("b", 1))
    answer(rig, question, leased("b", 1))
    assert rig.leader.match("r", 0, now=0.0) == 2
    rig.leader.tick(now=10 * LEASE_SECONDS)
    rig.leader.load("r", 0, [5, 6], now=10 * LEASE_SECONDS)
    command = rig.load_command()
    assert command.local is not None
    assert command.remote[0].seconds == 0.0, "the lease is over: the ranks are not to read"


def test_what_was_promised_can_be_loaded_though_time_goes_on() -> None:
    """The engine loads a moment after it has asked; the clock may tick in between."""
    rig = Rig(online=False)
    rig.save("a")
    rig.leader.arrive("r", chain("a"), now=0.0)
    just_before = LEASE_SECONDS / 2 - 0.001
    assert rig.leader.match("r", 0, now=0.0) == 1
    assert rig.leader.match("r", 0, now=just_before) == 1
    rig.leader.tick(now=just_before + 0.002)
    rig.leader.load("r", 0, [5], now=just_before + 0.003)
    assert rig.load_command().request == "r"


def test_a_lease_that_ends_early_shortens_the_plan() -> None:
    rig = Rig()
    (question,) = leasing(rig, "ab", ("b", 2))
    answer(rig, question, leased("b", 2, seconds=2.0))
    assert rig.leader.match("r", 0, now=0.0) == 2
    assert rig.leader.match("r", 0, now=1.9) is None


def test_a_plan_serves_an_engine_that_has_computed_more_meanwhile() -> None:
    rig = Rig(online=False)
    rig.save("abc")
    rig.leader.arrive("r", chain("abc"), now=0.0)
    assert rig.leader.match("r", 0, now=0.0) == 3
    assert rig.leader.match("r", 2, now=0.0) == 1


def test_a_plan_is_made_anew_for_an_engine_that_has_lost_blocks_meanwhile() -> None:
    rig = Rig(online=False)
    rig.save("abc")
    rig.leader.arrive("r", chain("abc"), now=0.0)
    assert rig.leader.match("r", 2, now=0.0) == 1
    assert rig.leader.match("r", 0, now=0.0) == 3
    assert rig.leader.tiers.host.pinned == 3


def test_a_request_that_arrives_again_starts_over_and_leaks_nothing() -> None:
    rig = Rig(online=False)
    rig.save("ab")
    for _ in range(2):
        rig.leader.arrive("r", chain("ab"), now=0.0)
        assert rig.leader.match("r", 0, now=0.0) == 2
    rig.leader.finish("r")
    assert rig.leader.tiers.host.pinned == 0

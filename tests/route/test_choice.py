"""Which engine a prompt goes to."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from kvbm_service.route.choice import RUNNING_TOKENS, Candidate, choose, cost, fresh

TOKENS = st.integers(0, 10_000)
CANDIDATE = st.builds(Candidate, TOKENS, TOKENS, TOKENS, TOKENS, st.integers(0, 100))
SOME = st.lists(CANDIDATE, min_size=1, max_size=8)


@given(SOME, TOKENS, st.integers(0, 1000))
def test_nobody_is_cheaper_than_who_is_chosen(
    some: list[Candidate], tokens: int, turn: int
) -> None:
    chosen = some[choose(some, tokens, turn)]
    assert cost(chosen, tokens) == min(cost(one, tokens) for one in some)


@given(CANDIDATE, TOKENS, st.integers(1, 8))
def test_equal_engines_take_turns(one: Candidate, tokens: int, count: int) -> None:
    chosen = Counter(choose([one] * count, tokens, turn) for turn in range(3 * count))
    assert chosen == dict.fromkeys(range(count), 3)


@given(CANDIDATE, TOKENS, TOKENS)
def test_more_of_the_prefix_never_costs_more(one: Candidate, tokens: int, more: int) -> None:
    for field in ("device", "own", "others"):
        better = one._replace(**{field: getattr(one, field) + more})
        assert cost(better, tokens) <= cost(one, tokens)
        assert fresh(better, tokens) <= fresh(one, tokens)


@given(CANDIDATE, TOKENS, TOKENS)
def test_more_to_do_always_costs_more(one: Candidate, tokens: int, more: int) -> None:
    later = one._replace(ahead=one.ahead + more + 1)
    assert cost(later, tokens) > cost(one, tokens)
    assert cost(one._replace(running=one.running + 1), tokens) > cost(one, tokens)


@given(CANDIDATE, TOKENS)
def test_a_prompt_costs_between_nothing_and_all_of_it_beside_what_is_ahead(
    one: Candidate, tokens: int
) -> None:
    waiting = one.ahead + RUNNING_TOKENS * one.running
    assert waiting <= cost(one, tokens) <= waiting + tokens


def test_near_is_better_than_far_is_better_than_nowhere() -> None:
    device, own, others = Candidate(device=800), Candidate(own=800), Candidate(others=800)
    costs = [cost(one, 1_000) for one in (device, own, others, Candidate())]
    assert costs == [200, 240, 400, 1_000]


def test_a_prefix_is_worth_a_queue_that_is_shorter_than_it() -> None:
    holder, idle = Candidate(device=900, ahead=500), Candidate()
    assert choose([holder, idle], 1_000, 0) == 0
    assert choose([holder._replace(ahead=2_000), idle], 1_000, 0) == 1

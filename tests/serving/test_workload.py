"""Who asks what and when in `kvbm bench serve`."""

from __future__ import annotations

from itertools import islice, takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbm_service.bench.serving.workload import Turn, Workload, answered, ask, begin, seat

SMALL = Workload(users=4, rounds=6, qps=2.0, system_words=5, history_words=30)


def turns(workload: Workload, seconds: float) -> list[Turn]:
    """All that is asked in this time, in order."""
    found: list[Turn] = []
    for index in range(workload.users):
        found += takewhile(lambda turn: turn.seconds < seconds, seat(workload, index))
    return sorted(found, key=lambda turn: turn.seconds)


@given(users=st.integers(1, 20), rounds=st.integers(1, 20), qps=st.floats(0.1, 50))
def test_so_many_questions_are_asked_per_second_as_was_wanted(
    users: int, rounds: int, qps: float
) -> None:
    asked = turns(Workload(users=users, rounds=rounds, qps=qps), 100 / qps)
    assert len(asked) == pytest.approx(100, abs=1)


def test_a_user_asks_again_only_after_the_pause() -> None:
    for index in range(SMALL.users):
        first, second = islice(seat(SMALL, index), 2)
        assert second.seconds - first.seconds == SMALL.pause_seconds == 2.0


def test_so_many_users_talk_at_a_time_and_each_leaves_after_its_rounds() -> None:
    asked = turns(SMALL, 200)
    by_user: dict[int, list[int]] = {}
    for turn in asked:
        by_user.setdefault(turn.user, []).append(turn.number)
    last = max(by_user)
    for user, numbers in by_user.items():
        assert numbers == list(range(len(numbers)))
        if SMALL.users <= user < last - 2 * SMALL.users:
            assert len(numbers) == SMALL.rounds
    window = {turn.user for turn in asked if 50 <= turn.seconds < 52}
    assert len(window) == SMALL.users


def test_the_first_users_leave_one_after_the_other() -> None:
    rounds = [next(seat(SMALL, index)).rounds for index in range(SMALL.users)]
    assert rounds == sorted(rounds, reverse=True)
    assert len(set(rounds)) == SMALL.users


def test_all_users_share_the_beginning_and_each_has_a_text_of_its_own() -> None:
    one, other = (begin(SMALL, next(seat(SMALL, index))) for index in (0, 1))
    assert one.messages[0] == other.messages[0]
    assert one.messages[1] != other.messages[1]
    assert len(one.messages[1]["content"].split()) == SMALL.history_words


def test_a_question_follows_all_that_was_said_before() -> None:
    conversation = begin(SMALL, next(seat(SMALL, 0)))
    ask(SMALL, conversation)
    before = list(conversation.messages)
    answered(conversation, "because")
    ask(SMALL, conversation)
    assert conversation.messages[: len(before)] == before
    assert [m["role"] for m in conversation.messages[len(before) :]] == ["assistant", "user"]
    assert conversation.asked == 2


def test_another_seed_gives_other_texts_and_the_same_seed_the_same() -> None:
    def text(seed: int) -> list[dict[str, str]]:
        workload = Workload(seed=seed, history_words=50)
        return begin(workload, next(seat(workload, 0))).messages

    assert text(1) == text(1) != text(2)

"""Schedules: random, repeatable, and fair."""

from __future__ import annotations

from collections import Counter
from itertools import islice

from tests.chaos.schedule import SPREAD_SECONDS, Card, Round, schedule

CARDS = (
    Card("stopped", ("ann", "bob"), 1, 6),
    Card("rank stopped", ("ann/0", "bob/0", "bob/1"), 1, 6),
    Card("killed", ("ann", "bob"), 1, 2, restarts=True),
    Card("rank killed", ("bob/1",), 1, 2, restarts=True),
    Card("server killed", ("nats",), 0.5, 1),
    Card("nobody's", (), 1, 2),
)


def rounds(seed: int, count: int = 200) -> list[Round]:
    return list(islice(schedule(seed, CARDS), count))


def test_the_same_seed_gives_the_same_schedule_and_another_gives_another() -> None:
    assert rounds(7) == rounds(7)
    assert rounds(7) != rounds(8)


def test_each_kind_comes_up_as_often_as_any_other() -> None:
    counts = Counter(plan.kind for faults in rounds(1) for plan in faults)
    assert set(counts) == {card.kind for card in CARDS if card.victims}
    assert max(counts.values()) - min(counts.values()) <= 1


def test_faults_stay_within_their_limits_and_come_in_order() -> None:
    cards = {card.kind: card for card in CARDS}
    for faults in rounds(2):
        assert faults
        assert list(faults) == sorted(faults)
        for plan in faults:
            card = cards[plan.kind]
            assert 0 <= plan.at_seconds <= SPREAD_SECONDS
            assert card.shortest_seconds <= plan.seconds <= card.longest_seconds
            assert plan.victim in card.victims


def test_in_a_round_a_node_is_struck_once_and_one_engine_at_most_restarts() -> None:
    restarting = {card.kind for card in CARDS if card.restarts}
    for faults in rounds(3):
        struck = [plan.victim.partition("/")[0] for plan in faults]
        assert len(struck) == len(set(struck))
        assert sum(plan.kind in restarting for plan in faults) <= 1

"""When which fault strikes whom: random, and the same for the same seed.

A schedule is rounds without end. In a round one to three faults strike, at times counted from its
begin; the next one begins when everyone agrees again. Kinds are drawn like cards: each comes up
once before any comes up again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

SIZES = (1, 1, 1, 2, 2, 3)
SPREAD_SECONDS = 3.0
"""Within this time all faults of a round have struck."""


class Card(NamedTuple):
    """What a schedule has to know of a kind of fault."""

    kind: str
    victims: Sequence[str]
    shortest_seconds: float
    longest_seconds: float
    restarts: bool = False


class Planned(NamedTuple):
    """A fault that is going to strike."""

    at_seconds: float
    kind: str
    victim: str
    seconds: float

    def __str__(self) -> str:
        return f"at {self.at_seconds:.1f} s for {self.seconds:.1f} s: {self.kind} ({self.victim})"


Round = tuple[Planned, ...]


def schedule(seed: int, cards: Sequence[Card]) -> Iterator[Round]:
    """Rounds without end. Cards without victims are left out."""
    chooser = random.Random(seed)
    playable = {card.kind: card for card in cards if card.victims}
    deck: list[str] = []
    while True:
        planned: list[Planned] = []
        for _ in range(chooser.choice(SIZES)):
            if not deck:
                deck = chooser.sample(sorted(playable), len(playable))
            plan = _play(chooser, playable[deck[-1]], planned, playable)
            if plan is None:
                break
            deck.pop()
            planned.append(plan)
        yield tuple(sorted(planned))


def _play(
    chooser: random.Random, card: Card, planned: Sequence[Planned], cards: Mapping[str, Card]
) -> Planned | None:
    """None: it does not go with what is planned. No two befall one node, one engine restarts."""
    if card.restarts and any(cards[plan.kind].restarts for plan in planned):
        return None
    struck = {_whole(plan.victim) for plan in planned}
    free = [victim for victim in card.victims if _whole(victim) not in struck]
    if not free:
        return None
    return Planned(
        round(chooser.uniform(0, SPREAD_SECONDS), 2),
        card.kind,
        chooser.choice(free),
        round(chooser.uniform(card.shortest_seconds, card.longest_seconds), 2),
    )


def _whole(victim: str) -> str:
    """What a victim is part of: a rank of its node."""
    return victim.partition("/")[0]

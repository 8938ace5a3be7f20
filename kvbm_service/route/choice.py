"""Which engine a prompt goes to. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

LOADED_SHARE = 0.05
"""What a token costs that is loaded from the engine's own host memory or disk …"""
FETCHED_SHARE = 0.25
"""… or from another node, where one that is computed costs 1."""
RUNNING_TOKENS = 64
"""What each request that is being answered costs a new one: it shares every step with it."""


class Candidate(NamedTuple):
    """One engine as a prompt sees it. The first three are tokens of the prompt's prefix."""

    device: int = 0
    """On the engine's device, as far as anyone knows."""
    own: int = 0
    """In the engine's own tiers."""
    others: int = 0
    """In tiers that the engine can read, of whichever node."""
    ahead: int = 0
    """Tokens that the engine has still to compute for requests sent before."""
    running: int = 0
    """Requests that it has been sent and has not finished."""


def fresh(candidate: Candidate, tokens: int) -> int:
    """How many of a prompt's `tokens` the engine would have to compute."""
    return max(0, tokens - max(candidate.device, candidate.own, candidate.others))


def cost(candidate: Candidate, tokens: int) -> float:
    """What a prompt of `tokens` costs there, in tokens to be computed before its first answer:

        fresh + 0.25 × fetched + 0.05 × loaded + ahead + 64 × running

    The prompt's head lies on the device (free), what follows in the engine's own tiers is
    `loaded`, what follows on other nodes is `fetched`, and the rest is `fresh`. `ahead` and
    `running` are what the engine has been sent before.
    """
    device = min(candidate.device, tokens)
    own = min(max(device, candidate.own), tokens)
    others = min(max(own, candidate.others), tokens)
    return (
        (tokens - others)
        + FETCHED_SHARE * (others - own)
        + LOADED_SHARE * (own - device)
        + candidate.ahead
        + RUNNING_TOKENS * candidate.running
    )


def choose(candidates: Sequence[Candidate], tokens: int, turn: int) -> int:
    """The position of the candidate with the least cost; of equal ones, one after the other.

    `turn` is a number that grows by one with each choice.
    """
    count = len(candidates)
    return min(range(count), key=lambda at: (cost(candidates[at], tokens), (at - turn) % count))

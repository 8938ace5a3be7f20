"""How soon blocks of a kind are used again, learned from what happened to others of that kind.

For each kind and each span of ages (1–2 s, 2–4 s …) two sums are kept: how many blocks came to
that age without having been used again, and how many of those were used within the span. A
block counts as soon as it comes to an age, not when its fate is known, so their quotient, the
odds, is right at any moment. From the odds follows what it is worth to keep a block:

    density(kind, age) = max over t of  P(used before t) / E(time until then, at most t)

the hits that its slot brings per second if it is kept for the best time from now on (Gittins'
index). While nothing is known, that falls with age alone, which is LRU.

Kinds come in families. A kind of which little is known is taken for its family, and a family
for all blocks. Old sums fade, so that what is learned follows the load.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

SPANS = 20
"""Ages from below 1 s to beyond 3 days, in powers of two."""

ENDS = tuple(2.0**span for span in range(SPANS - 1))
"""Where each span but the last ends, in seconds."""

_WIDTHS = tuple(end - begin for begin, end in zip((0.0, *ENDS), (*ENDS, 2 * ENDS[-1]), strict=True))

PRIOR_ODDS = 0.1
"""What is assumed of a span before anything is known; alike for all ages, it leads to LRU."""

PRIOR_BLOCKS = 16.0
"""How many blocks must have come to an age until what they did weighs as much as what was
assumed."""


class ReuseOdds:
    """The odds of each of some kinds, which are counted from 0 through all families."""

    def __init__(self, families: Sequence[int]) -> None:
        """`families`: how many kinds each has."""
        self._families = families
        kinds = sum(families)
        self._came = [[0.0] * SPANS for _ in range(kinds)]
        self._used = [[0.0] * SPANS for _ in range(kinds)]
        self._density: list[list[float]] = []
        self.learn()

    def came(self, kind: int, span: int, blocks: int) -> None:
        """So many blocks came to this span's age unused; span 0: they were just used."""
        self._came[kind][span] += blocks

    def used(self, kind: int, age: float, blocks: int) -> None:
        """So many blocks were used again at this age."""
        self._used[kind][bisect_right(ENDS, age)] += blocks

    def density(self, kind: int, age: float) -> float:
        """The hits per second of a slot with such a block, if it is kept as long as is best."""
        return self._density[kind][bisect_right(ENDS, age)]

    def fade(self, share: float) -> None:
        """Let what was learned so far count only this much."""
        for row in (*self._came, *self._used):
            row[:] = [amount * share for amount in row]

    def learn(self) -> None:
        """Draw the conclusions: `density` is by what was known when this was last called."""
        everyone = _odds(_sum(self._came), _sum(self._used), [PRIOR_ODDS] * SPANS)
        self._density = []
        end = 0
        for kinds in self._families:
            begin, end = end, end + kinds
            came, used = self._came[begin:end], self._used[begin:end]
            family = _odds(_sum(came), _sum(used), everyone)
            for its_came, its_used in zip(came, used, strict=True):
                self._density.append(_densities(_odds(its_came, its_used, family)))


def _sum(rows: Iterable[Sequence[float]]) -> list[float]:
    return [sum(column) for column in zip(*rows, strict=True)]


def _odds(came: Sequence[float], used: Sequence[float], assumed: Sequence[float]) -> list[float]:
    return [
        min(1.0, (u + PRIOR_BLOCKS * a) / (c + PRIOR_BLOCKS))
        for c, u, a in zip(came, used, assumed, strict=True)
    ]


def _densities(odds: Sequence[float]) -> list[float]:
    """The density at the beginning of each span.

    Backwards: a span stands alone, unless what follows is denser than it; then the two are one
    stretch, for whoever keeps a block through the first wants the second, too.
    """
    stretches: list[tuple[float, float, float]] = []
    """Hits, seconds, and the share that comes out unused; the next stretch last."""
    densities = [0.0] * SPANS
    for span in range(SPANS - 1, -1, -1):
        hits, seconds = odds[span], _WIDTHS[span] * (1 - odds[span] / 2)
        left = 1 - odds[span]
        while stretches and stretches[-1][0] * seconds > hits * stretches[-1][1]:
            more_hits, more_seconds, more_left = stretches.pop()
            hits += left * more_hits
            seconds += left * more_seconds
            left *= more_left
        stretches.append((hits, seconds, left))
        densities[span] = hits / seconds
    return densities

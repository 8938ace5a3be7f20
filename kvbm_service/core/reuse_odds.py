"""How soon blocks of a kind are used again, learned from what happened to others of that kind.

For each kind and each span of ages (1–2 s, 2–4 s …) two sums are kept: how many blocks came to
that age without having been used again, and how many of those were used within the span. A
block counts as soon as it comes to an age, not when its fate is known, so their quotient, the
odds, is right at any moment. Who was used at one time comes to an age at one time: they are a
cohort, which those leave who are used again. From the odds follows what it is worth to keep a
block:

    density(kind, age) = max over t of  P(used before t) / E(time until then, at most t)

the hits that its slot brings per second if it is kept for the best time from now on (Gittins'
index). While nothing is known, that falls with age alone, which is LRU.

Kinds come in families. A kind of which little is known is taken for its family, and a family
for all blocks. Old sums fade, so that what is learned follows the load.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

SPANS = 20
"""Ages from below 1 s to beyond 3 days, in powers of two."""

ENDS = tuple(2.0**span for span in range(SPANS - 1))
"""Where each span but the last ends, in seconds."""

_WIDTHS_BACKWARDS = (ENDS[-1], *(end - end / 2 for end in reversed(ENDS[1:])), ENDS[0])

PRIOR_ODDS = 0.1
"""What is assumed of a span before anything is known; alike for all ages, it leads to LRU."""

PRIOR_BLOCKS = 16.0
"""How many blocks must have come to an age until what they did weighs as much as what was
assumed."""

FADE_USES = 32_768
"""After so many uses, what was learned before counts half."""


class Cohort:
    """Those that were used at one time and not since; it has the same age for all of them."""

    __slots__ = ("at", "blocks", "members", "span")

    def __init__(self, at: float) -> None:
        self.at = at
        self.span = 0
        """Of ages, the one that it has come to."""
        self.members = 0
        """How many have joined it and not left."""
        self.blocks: dict[int, int] = {}
        """How many blocks they have, by kind."""


NOBODY = Cohort(0.0)
"""The cohort of what is in none."""


class ReuseOdds:
    """The odds of each of some kinds, which are counted from 0 through all families."""

    def __init__(self, families: Sequence[int]) -> None:
        """`families`: how many kinds each has."""
        self._families = families
        self._came = [[0.0] * SPANS for _ in range(sum(families))]
        self._used = [[0.0] * SPANS for _ in range(sum(families))]
        self.densities: list[list[float]] = []
        """By kind and span: the hits per second of a slot with such a block, if it is kept for as
        long as is best, by what was known when `learn` was last called."""
        self._ages: list[OrderedDict[Cohort, None]] = [OrderedDict() for _ in range(SPANS)]
        """The cohorts that have members, by span, oldest first."""
        self._newest = Cohort(0.0)
        self._now = 0.0
        self._uses = 0
        self.learn()

    # -- what happens ----------------------------------------------------------------

    def grow_older(self, now: float) -> None:
        """Count those who have come to another span; `now`, in seconds, never goes back."""
        if now == self._now:
            return
        self._now = now
        for span, end in enumerate(ENDS):
            cohorts = self._ages[span]
            while cohorts:
                cohort = next(iter(cohorts))
                if now - cohort.at < end:
                    break
                del cohorts[cohort]
                self._ages[span + 1][cohort] = None
                cohort.span = span + 1
                for kind, blocks in cohort.blocks.items():
                    self._came[kind][span + 1] += blocks

    def join(self, kind: int, blocks: int) -> Cohort:
        """So many blocks are used now. Returns with which others they grow older."""
        cohort = self._newest
        if cohort.at != self._now or not cohort.members:
            cohort = self._newest = Cohort(self._now)
            self._ages[0][cohort] = None
        cohort.members += 1
        cohort.blocks[kind] = cohort.blocks.get(kind, 0) + blocks
        self._came[kind][0] += blocks
        self._uses += 1
        if self._uses % FADE_USES == 0:
            self._fade(0.5)
        return cohort

    def extend(self, cohort: Cohort, kind: int, blocks: int) -> None:
        """One who has joined has so many blocks more now."""
        cohort.blocks[kind] += blocks
        self._came[kind][cohort.span] += blocks

    def split(self, cohort: Cohort) -> None:
        """One who has joined is two now."""
        cohort.members += 1

    def used(self, cohort: Cohort, kind: int, blocks: int) -> None:
        """One of so many blocks is used again, and leaves."""
        self._used[kind][cohort.span] += blocks
        self.leave(cohort, kind, blocks)

    def leave(self, cohort: Cohort, kind: int, blocks: int) -> None:
        """Nobody will ever know whether these are used again."""
        cohort.blocks[kind] -= blocks
        cohort.members -= 1
        if not cohort.members:
            del self._ages[cohort.span][cohort]

    # -- what follows from it --------------------------------------------------------

    def _fade(self, share: float) -> None:
        """Let what was learned so far count only this much."""
        for row in (*self._came, *self._used):
            row[:] = [amount * share for amount in row]

    def learn(self) -> None:
        """Draw the conclusions."""
        rows, end = [], 0
        for kinds in self._families:
            begin, end = end, end + kinds
            came, used = self._came[begin:end], self._used[begin:end]
            rows.append((came, used, _sum(came), _sum(used)))
        _, _, family_cames, family_useds = zip(*rows, strict=True)
        everyone = _odds(_sum(family_cames), _sum(family_useds), [PRIOR_ODDS] * SPANS)
        self.densities = []
        for came, used, family_came, family_used in rows:
            family = _odds(family_came, family_used, everyone)
            for its_came, its_used in zip(came, used, strict=True):
                self.densities.append(_densities(_odds(its_came, its_used, family)))

    def check_integrity(self, members: Mapping[Cohort, int]) -> None:
        """The cohorts that have members are these, and as old as is counted."""
        known = {cohort: cohort.members for cohorts in self._ages for cohort in cohorts}
        assert known == members, "not everybody is in the cohort that he joined"
        for span, cohorts in enumerate(self._ages):
            for cohort in cohorts:
                assert cohort.span == span, "a cohort waits in another span"
                assert all(blocks >= 0 for blocks in cohort.blocks.values()), "too many left"


def _sum(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) for column in zip(*rows, strict=True)]


def _odds(came: Sequence[float], used: Sequence[float], assumed: Sequence[float]) -> list[float]:
    odds = [
        (u + PRIOR_BLOCKS * a) / (c + PRIOR_BLOCKS)
        for c, u, a in zip(came, used, assumed, strict=True)
    ]
    return odds if max(odds) <= 1.0 else [min(1.0, share) for share in odds]


def _densities(odds: Sequence[float]) -> list[float]:
    """The density at the beginning of each span.

    Backwards: a span stands alone, unless what follows is denser than it; then the two are one
    stretch, for whoever keeps a block through the first wants the second, too.
    """
    stretches: list[tuple[float, float, float]] = []
    """Hits, seconds, and the share that comes out unused; the next stretch last."""
    densities: list[float] = []
    for hits, width in zip(reversed(odds), _WIDTHS_BACKWARDS, strict=True):
        seconds = width * (1 - hits / 2)
        left = 1 - hits
        while stretches:
            more_hits, more_seconds, more_left = stretches[-1]
            if more_hits * seconds <= hits * more_seconds:
                break
            stretches.pop()
            hits += left * more_hits
            seconds += left * more_seconds
            left *= more_left
        stretches.append((hits, seconds, left))
        densities.append(hits / seconds)
    densities.reverse()
    return densities

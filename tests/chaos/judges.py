"""What must hold, faults or not. Judges only look at what they are given: they strike nobody."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from kvbm_schemas.block import Tier
from kvbm_schemas.records import TierStatus
from kvbm_schemas.requests import Holder
from kvbm_schemas.subjects import Scope
from kvbm_service.core.limits import Limits
from tests.integration.witness import Witness

LOOKUP_SECONDS = 0.5
STAGING_SECONDS = 0.5
TRANSFER_SECONDS = 2.0
HAND_OVER_SECONDS = Limits().hand_over_seconds
SLACK_SECONDS = 12.0
"""For computing, behind others' prompts, on cores that engines which start meanwhile want, too."""
DEADLINE_SECONDS = (
    2 * LOOKUP_SECONDS + STAGING_SECONDS + HAND_OVER_SECONDS + TRANSFER_SECONDS + SLACK_SECONDS
)
"""No request of an engine that is let work waits longer."""

REST_SECONDS = 20.0
"""How soon after its last request a node has let go of everything."""
POLL_SECONDS = 0.1
LOCATED_AT_ONCE = 4096
ASKED_TIMES = 5
"""How often each question goes to the registries: each time one of them answers."""

Copy = tuple[bytes, Tier]
Placements = Sequence[tuple[Holder, ...]]


# -- answers ---------------------------------------------------------------------------------


class Asked(NamedTuple):
    """A request, from when it was asked to when its fate was known."""

    node: str
    began: float
    ended: float
    answered: bool
    right: bool = False
    why_not: str = ""
    aborted: bool = False


class Verdict(enum.StrEnum):
    """What became of a request."""

    RIGHT = "answered right"
    WRONG = "answered wrong"
    LATE = "answered late"
    LOST = "not answered"
    STRUCK = "lost with its engine"
    ABORTED = "aborted"


STALLS = (Verdict.LATE, Verdict.LOST)


def judge(asked: Asked, halted_seconds: float, struck: bool) -> Verdict:
    """`halted_seconds` of the time, its engine was kept from working; `struck`: at any time."""
    waited = asked.ended - asked.began - halted_seconds
    if asked.aborted:
        return Verdict.ABORTED
    if asked.answered and not asked.right:
        return Verdict.WRONG
    if waited > DEADLINE_SECONDS:
        return Verdict.LATE if asked.answered else Verdict.LOST
    if asked.answered:
        return Verdict.RIGHT
    return Verdict.STRUCK if struck else Verdict.LOST


# -- what is held ----------------------------------------------------------------------------


def leaked(tiers: Sequence[TierStatus], held: set[Copy]) -> int:
    """Slots of a node at rest that are pinned, or taken by nothing that it knows to hold."""
    leaks = 0
    for tier in tiers:
        blocks = sum(where is tier.tier for _, where in held)
        leaks += tier.pinned + abs(tier.used - blocks)
    return leaks


def leaks_of(witness: Witness, scope: Scope, node: str) -> int:
    """What a node without requests has still not let go of after a while."""
    began = time.monotonic()
    leaks = 1  # it says nothing
    while True:
        waited = time.monotonic() - began
        record = witness.nodes(younger_than=waited).get(node)
        held = witness.snapshot(scope, node)
        if record is not None and held is not None:
            leaks = leaked(record.tiers, held)
        if leaks == 0 or waited > REST_SECONDS:
            return leaks
        time.sleep(POLL_SECONDS)


# -- what the registry says --------------------------------------------------------------------


class Heard(NamedTuple):
    """Blocks that nodes have told of."""

    ever: set[bytes]
    """All that anyone has stored."""
    told: list[bytes]
    """Each block as often as anyone has stored or removed it, in order."""


def disagreement(
    blocks: Sequence[bytes],
    placed: Placements,
    before: Mapping[str, set[Copy]],
    after: Mapping[str, set[Copy]],
    restless: AbstractSet[bytes] = frozenset(),
) -> str:
    """How what a registry says differs from what the nodes held before and after; "" if not.

    What came or went meanwhile may be said or not. `restless` blocks did, though they may be
    held before and after.
    """
    for block, holders in zip(blocks, placed, strict=True):
        if block in restless:
            continue
        said = {(holder.node, holder.tier) for holder in holders}
        always = {(n, t) for n in before for t in Tier if (block, t) in before[n] & after[n]}
        ever = {(n, t) for n in before for t in Tier if (block, t) in before[n] | after[n]}
        if always - said:
            return f"{block.hex()[:8]} is not known to be in {sorted(always - said)}"
        if said - ever:
            return f"{block.hex()[:8]} is said to be in {sorted(said - ever)}"
    return ""


def untruth(witness: Witness, scopes: Mapping[str, Scope], tell_heard: Callable[[], Heard]) -> str:
    """What keeps any registry's view from being the nodes' own; "" if nothing does.

    `scopes` has the scope of each node; `tell_heard` tells what has been heard so far.
    """
    start = len(tell_heard().told)
    for scope in set(scopes.values()):
        nodes = [node for node in scopes if scopes[node] == scope]
        before = _snapshots(witness, scope, nodes)
        if isinstance(before, str):
            return before
        known = tell_heard().ever
        blocks = sorted(known.union(*({name for name, _ in held} for held in before.values())))
        views = [_placements(witness, scope, blocks) for _ in range(ASKED_TIMES)]
        after = _snapshots(witness, scope, nodes)
        if isinstance(after, str):
            return after
        restless = set(tell_heard().told[start:])
        for placed in views:
            if len(placed) != len(blocks):
                return "no registry answers"
            if problem := disagreement(blocks, placed, before, after, restless):
                return problem
    return ""


def _placements(witness: Witness, scope: Scope, blocks: Sequence[bytes]) -> Placements:
    """Where one of the registries says that the blocks are; fewer if none answers."""
    placed: list[tuple[Holder, ...]] = []
    for start in range(0, len(blocks), LOCATED_AT_ONCE):
        placed += witness.placements(scope, blocks[start : start + LOCATED_AT_ONCE])
    return placed


def _snapshots(witness: Witness, scope: Scope, nodes: Sequence[str]) -> dict[str, set[Copy]] | str:
    held = {node: witness.snapshot(scope, node) for node in nodes}
    for node, copies in held.items():
        if copies is None:
            return f"{node} does not say what it holds"
    return {node: copies for node, copies in held.items() if copies is not None}


class Healed(NamedTuple):
    """How everyone came to agree again."""

    seconds: float
    """Until there was no untruth any more; or, if there still is, until patience was over."""
    untruths: tuple[str, ...]
    """What was untrue on the way, in order; the last of them still is if `not done`."""
    done: bool


def heal(tell: Callable[[], str], patience_seconds: float) -> Healed:
    """Wait until there is nothing untrue to tell any more."""
    began = time.monotonic()
    untruths: list[str] = []
    while True:
        problem = tell()
        waited = time.monotonic() - began
        if problem and problem not in untruths[-1:]:
            untruths.append(problem)
        if not problem or waited > patience_seconds:
            return Healed(waited, tuple(untruths), done=not problem)
        time.sleep(POLL_SECONDS)

"""A round of faults under load, and everything that is judged afterwards."""

from __future__ import annotations

import heapq
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from kvbm_service.demo.engine import EngineFailed
from tests.chaos.arena import Arena
from tests.chaos.fault import FAULTS, Heal
from tests.chaos.judges import (
    POLL_SECONDS,
    REST_SECONDS,
    STALLS,
    Asked,
    Verdict,
    heal,
    judge,
    leaks_of,
)
from tests.chaos.load import Load
from tests.chaos.member import Member
from tests.chaos.schedule import Card, Planned, Round

WARM_SECONDS = 1.5
"""Load before the first fault of a round."""
UNTRUTHS_SAID = 5
CALM_SECONDS = 1.0
"""Load after everyone agrees again."""

BY_NAME = {fault.name: fault for fault in FAULTS}


@dataclass
class Result:
    """What came of one or more rounds."""

    faults: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[Verdict] = field(default_factory=Counter)
    leaks: int = 0
    heal_seconds: dict[str, float] = field(default_factory=dict)
    """The longest of each kind of fault."""
    slowest_seconds: float = 0.0
    """The longest wait for an answer, halts not counted."""
    untruths: tuple[str, ...] = ()
    """What was untrue on the way to healing, of one round."""
    problems: list[str] = field(default_factory=list)
    """Everything that must not be, in words."""

    @property
    def requests(self) -> int:
        """How many were asked."""
        return sum(self.verdicts.values())

    @property
    def stalls(self) -> int:
        """Requests that were not answered in time."""
        return sum(self.verdicts[verdict] for verdict in STALLS)

    @property
    def wrong(self) -> int:
        """Wrong answers."""
        return self.verdicts[Verdict.WRONG]

    @property
    def heal_seconds_max(self) -> float:
        """How long it took everyone to agree again, at worst."""
        return max(self.heal_seconds.values(), default=0.0)

    def add(self, other: Result) -> None:
        """What came of further rounds."""
        self.faults += other.faults
        self.verdicts += other.verdicts
        self.leaks += other.leaks
        for kind, seconds in other.heal_seconds.items():
            self.heal_seconds[kind] = max(seconds, self.heal_seconds.get(kind, 0.0))
        self.slowest_seconds = max(self.slowest_seconds, other.slowest_seconds)
        self.problems += other.problems


def cards(arena: Arena) -> list[Card]:
    """All kinds of faults, with their victims in this arena."""
    return [
        Card(f.name, f.victims(arena), f.shortest_seconds, f.longest_seconds, f.restarts)
        for f in FAULTS
    ]


def play(
    arena: Arena,
    load: Load,
    rounds: Iterable[Round],
    seconds: float,
    say: Callable[[str], object],
) -> Iterator[Result]:
    """Play rounds until the time is over or someone does not come back, and tell of each."""
    began = time.monotonic()
    for number, faults in enumerate(rounds, 1):
        if time.monotonic() - began > seconds:
            return
        say(f"{time.monotonic() - began:.0f} s, round {number}")
        for plan in faults:
            say(f"  {plan}")
        result = suffer(arena, load, faults)
        say(
            f"  {result.requests} requests, all agree again "
            f"{result.heal_seconds_max:.1f} s after the last fault"
        )
        for untruth in result.untruths[:UNTRUTHS_SAID]:
            say(f"    until then: {untruth}")
        for problem in result.problems:
            say(f"  {problem}")
        yield result
        if arena.wait_up():
            return


def suffer(arena: Arena, load: Load, faults: Round) -> Result:
    """Strike with these faults, heal them, wait until everyone agrees, and judge."""
    start = len(load.asked())
    load.begin()
    time.sleep(WARM_SECONDS)
    try:
        _strike_and_heal(arena, faults)
        down = arena.wait_up()
        allowed = max((BY_NAME[plan.kind].heal_seconds for plan in faults), default=REST_SECONDS)
        healed = heal(arena.untruth, allowed)
        time.sleep(CALM_SECONDS)
    finally:
        load.pause()
    result = Result(faults=Counter(plan.kind for plan in faults))
    result.heal_seconds = {plan.kind: healed.seconds for plan in faults}
    result.untruths = healed.untruths
    for name in down:
        why = arena.members[name].engine.what_went_wrong()
        result.problems.append(f"{name} does not come back: {why}")
    if not healed.done:
        result.problems.append(f"not healed after {healed.seconds:.1f} s: {healed.untruths[-1]}")
    _judge_requests(arena, load.asked(start), result)
    _judge_rest(arena, result)
    return result


def _strike_and_heal(arena: Arena, faults: Round) -> None:
    began = time.monotonic()
    ties = itertools.count()
    todo: list[tuple[float, int, Callable[[], Heal | None]]] = []

    def at(seconds: float, what: Callable[[], Heal | None]) -> None:
        heapq.heappush(todo, (seconds, next(ties), what))

    def strike(plan: Planned) -> None:
        mend = BY_NAME[plan.kind].strike(arena, plan.victim)
        at(plan.at_seconds + plan.seconds, lambda: (mend(), None)[1])

    for plan in faults:
        at(plan.at_seconds, lambda plan=plan: strike(plan))  # type: ignore[misc]
    try:
        while todo:
            time.sleep(max(0.0, began + todo[0][0] - time.monotonic()))
            heapq.heappop(todo)[2]()
    finally:
        for _, _, act in todo:  # something went wrong: leave nothing broken behind
            act()


def _judge_requests(arena: Arena, asked: Sequence[Asked], result: Result) -> None:
    for one in asked:
        member = arena.members[one.node]
        halted = member.halted(one.began, one.ended)
        verdict = judge(one, halted, member.was_struck(one.began, one.ended))
        result.verdicts[verdict] += 1
        if one.answered:
            result.slowest_seconds = max(result.slowest_seconds, one.ended - one.began - halted)
        if verdict in (*STALLS, Verdict.WRONG):
            waited = one.ended - one.began
            result.problems.append(
                f"{one.node}: {verdict} after {waited:.1f} s ({halted:.1f} s halted) {one.why_not}"
            )


def _judge_rest(arena: Arena, result: Result) -> None:
    """Nobody asks anything now: what registries say must be all true."""
    agreed = heal(arena.untruth, REST_SECONDS)
    if not agreed.done:
        result.problems.append(f"at rest, {agreed.untruths[-1]}")
    for name, member in arena.members.items():
        if not member.up:
            continue
        try:
            held = not _gives_device_back(member)
        except EngineFailed as error:
            result.verdicts[Verdict.LOST] += 1
            result.problems.append(f"{name} ended by itself: {error}")
            member.restart()
            continue
        if held:
            result.problems.append(f"{name} holds device blocks")
        leaks = leaks_of(arena.witness, arena.scopes[name], name)
        if leaks:
            result.problems.append(f"{name} has {leaks} slots that nobody uses")
        result.leaks += held + leaks


def _gives_device_back(member: Member) -> bool:
    deadline = time.monotonic() + REST_SECONDS
    while not member.engine.reset_prefix_cache():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True

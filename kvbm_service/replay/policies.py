"""The policies by name, and how each one's hits are found."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from kvbm_service.core.pool import Pool
from kvbm_service.replay.clairvoyant import clairvoyant_hits
from kvbm_service.replay.through_core import leader_hits, pool_hits
from kvbm_service.replay.trace import Trace
from kvbm_service.replay.yardsticks import NAMES, yardstick_hits

POLICIES = ("default", *NAMES, "clairvoyant")

T = TypeVar("T")

Advance = Callable[[int], None]
"""To be told of so many requests more that are done."""


class Outcome(NamedTuple):
    """What one policy reached on one trace with one capacity.

    Prefix-hit ratio: of all blocks asked for, those that lie in the longest head of their
    request whose blocks are all stored when it comes.
    """

    trace: str
    policy: str
    capacity: float
    """As a share of the unique blocks."""
    slots: int
    prefix_hit_ratio: float


class TierOutcome(NamedTuple):
    """What the default policy reached with a disk tier behind the host tier, by tier."""

    trace: str
    host_slots: int
    disk_slots: int
    host_hit_ratio: float
    disk_hit_ratio: float


class Cost(NamedTuple):
    """What the default policy costs, its pool included."""

    microseconds_per_block: float
    """Of a request: to match it, to use it, and to store what is missing."""
    bytes_per_slot: float


def replay(trace: Trace, policy: str, share: float, advance: Advance) -> Outcome:
    """Replay all requests with one tier: the default policy through the leader."""
    slots = trace.slots(share)
    if policy == "clairvoyant":
        hits = clairvoyant_hits(trace, slots)
        advance(len(trace.requests))
    elif policy == "default":
        hits = sum(one.host for one in _counted(leader_hits(trace, slots), advance))
    else:
        hits = sum(_counted(yardstick_hits(trace, policy, slots), advance))
    return Outcome(trace.name, policy, share, slots, hits / trace.blocks)


def replay_tiers(trace: Trace, share: float, times: float, advance: Advance) -> TierOutcome:
    """Replay all requests through the leader, with a disk tier `times` the host tier."""
    host_slots = trace.slots(share)
    disk_slots = max(1, int(host_slots * times))
    hits = list(_counted(leader_hits(trace, host_slots, disk_slots), advance))
    host, disk = (
        sum(part) / trace.blocks for part in ((h.host for h in hits), (h.disk for h in hits))
    )
    return TierOutcome(trace.name, host_slots, disk_slots, host, disk)


def cost(trace: Trace, share: float) -> Cost:
    """Time and memory of the default policy at this capacity."""
    slots = trace.slots(share)
    began = time.process_time()
    for _ in pool_hits(trace, Pool(slots)):
        pass
    seconds = time.process_time() - began
    tracemalloc.start()
    pool = Pool(slots)
    for _ in pool_hits(trace, pool):
        pass
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return Cost(seconds / trace.blocks * 1e6, held / slots)


def _counted(things: Iterator[T], advance: Advance) -> Iterator[T]:
    for thing in things:
        advance(1)
        yield thing

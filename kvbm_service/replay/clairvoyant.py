"""The bound: what a cache of so many slots could hit if it knew the future.

A block that is used at one request and next at another can be a hit there only if it has a
slot in between. So the most hits are those of the largest set of such stretches of which no
more than the capacity overlap at any time; taking away, whenever there are too many, the one
that ends last gives the largest set (Belady's rule, with the freedom not to store at all).
A block is never used later than the blocks behind it in a chain; with the deeper of two blocks
taken away first, what is kept are heads of chains, so all these hits are prefix hits, too.
"""

from __future__ import annotations

import heapq

from kvbm_schemas.block import BlockHash
from kvbm_service.replay.trace import Trace


def clairvoyant_hits(trace: Trace, capacity: int) -> int:
    """The most blocks that any policy can hit."""
    kept: dict[BlockHash, tuple[int, int]] = {}
    """Block → when it is used next and how deep it is, negative: the first to go is the least."""
    heap: list[tuple[tuple[int, int], BlockHash]] = []
    hits = 0
    for request, following in zip(trace.requests, _next_uses(trace), strict=True):
        for depth, (block, then) in enumerate(zip(request.chain, following, strict=True)):
            if kept.pop(block, None) is not None:
                hits += 1
            if then is not None:
                kept[block] = (-then, -depth)
                heapq.heappush(heap, ((-then, -depth), block))
        while len(kept) > capacity:
            last, block = heapq.heappop(heap)
            if kept.get(block) == last:
                del kept[block]
    return hits


def _next_uses(trace: Trace) -> list[list[int | None]]:
    """For each block of each request, the number of the request that uses it next."""
    uses: dict[BlockHash, int] = {}
    following: list[list[int | None]] = []
    for number in range(len(trace.requests) - 1, -1, -1):
        chain = trace.requests[number].chain
        following.append([uses.get(block) for block in chain])
        uses.update(dict.fromkeys(chain, number))
    following.reverse()
    return following

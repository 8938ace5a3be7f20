"""What the default eviction gains over LRU on made-up conversations, and what it costs.

For recorded requests, and for more policies: `kvbm replay`.
"""

from __future__ import annotations

import random
import time

from kvbm_service.bench.row import Row
from kvbm_service.core.lru import Lru
from kvbm_service.core.pool import Pool
from kvbm_service.replay.through_core import pool_hits
from kvbm_service.replay.trace import Request, Trace, block_name

PEOPLE = 1_500
SYSTEM_PROMPTS = 8
CAPACITIES = (0.01, 0.05, 0.10, 0.25)
"""As shares of the unique blocks."""


def rows() -> list[Row]:
    """Prefix-hit ratios, and CPU time per block of a request, pool included."""
    trace = conversations()
    found = []
    for share in CAPACITIES:
        slots = trace.slots(share)
        hits, seconds = _replay(trace, Pool(slots))
        lru_hits, lru_seconds = _replay(trace, Pool(slots, Lru()))
        percent = f"{share:.0%}".replace("%", "_percent")
        found += [
            _row(f"prefix_hits_at_{percent}", hits / trace.blocks, lru_hits / trace.blocks, ""),
            _row(
                f"evict_us_per_block_at_{percent}",
                seconds / trace.blocks * 1e6,
                lru_seconds / trace.blocks * 1e6,
                "us",
            ),
        ]
    return found


def conversations() -> Trace:
    """Chats behind a few system prompts: most end soon, some go on. Always the same ones."""
    dice = random.Random(1)
    requests, began = [], 0.0
    for person in range(PEOPLE):
        began += dice.expovariate(1.0)
        system = min(int(dice.paretovariate(1.0)), SYSTEM_PROMPTS)
        chain = [block_name(system * 1_000 + index) for index in range(16)]
        came, turn = began, 0
        while turn < 40:
            first = 1_000_000 + person * 10_000 + turn * 100
            chain = chain + [block_name(first + index) for index in range(dice.randint(4, 40))]
            requests.append(Request(came, chain))
            turn += 1
            if dice.random() > 0.4 + 0.1 * min(turn, 4):
                break
            came += 5 + dice.expovariate(1 / 60)
    return Trace.of("conversations", requests)


def _replay(trace: Trace, pool: Pool) -> tuple[int, float]:
    began = time.process_time()
    hits = sum(pool_hits(trace, pool))
    return hits, time.process_time() - began


def _row(name: str, value: float, yardstick: float, unit: str) -> Row:
    return Row(name, value, unit, "LRU in the same pool", yardstick, value / yardstick)

"""Small made-up loads. Numbers come from a fixed seed; nothing else in a test is random."""

from __future__ import annotations

import random

from kvbm_service.replay.trace import Request, Trace, block_name


def chats(seed: int = 1, requests: int = 3000) -> Trace:
    """Conversations behind a few system prompts; most end soon, some go on and on."""
    rng = random.Random(seed)
    arrivals: list[tuple[float, int, int]] = []
    prompts = rng.choices(range(8), [1 / (rank + 1) for rank in range(8)], k=requests)
    at = 0.0
    for person in range(requests // 2):
        at += rng.expovariate(1.0)
        turn_at = at
        for turn in range(40):
            arrivals.append((turn_at, person, turn))
            if rng.random() > 0.35 + 0.1 * min(turn, 5):
                break
            turn_at += 5 + rng.expovariate(1 / 60)
    made = [
        Request(
            when,
            [block_name(10**6 * (prompts[person] + 1) + i) for i in range(4)]
            + [block_name(10**9 + 1000 * person + i) for i in range(6 + 3 * turn)],
        )
        for when, person, turn in sorted(arrivals)[:requests]
    ]
    return Trace.of("chats", made)


def documents(seed: int = 2, requests: int = 2500) -> Trace:
    """Questions about documents, a few of which everybody asks about."""
    rng = random.Random(seed)
    shares = [1 / (rank + 1) for rank in range(400)]
    made, at, fresh = [], 0.0, 10**12
    for document in rng.choices(range(400), shares, k=requests):
        at += rng.expovariate(2.0)
        fresh += 2
        length = 10 + document * 7 % 40
        chain = [block_name(10**6 * (document + 1) + i) for i in range(length)]
        made.append(Request(at, [*chain, block_name(fresh), block_name(fresh + 1)]))
    return Trace.of("documents", made)


def scans(seed: int = 3, requests: int = 2500) -> Trace:
    """Documents as above, while a batch job reads long texts that nobody reads again."""
    rng = random.Random(seed)
    made, fresh = [], 10**15
    for request in documents(seed, requests).requests:
        made.append(request)
        if rng.random() < 0.5:
            fresh += 1000
            made.append(Request(request.seconds, [block_name(fresh + i) for i in range(40)]))
    return Trace.of("scans", made)

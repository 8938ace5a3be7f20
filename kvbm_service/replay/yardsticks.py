"""Other people's policies, from libcachesim: they see one block after the other.

A block that misses is stored at once, as these policies want it. A request hits the blocks up
to the first that misses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from kvbm_service.errors import SettingError
from kvbm_service.replay.trace import Trace

NAMES = {"lru": "LRU", "arc": "ARC", "s3fifo": "S3FIFO"}


def available() -> bool:
    """Whether libcachesim is installed."""
    try:
        import libcachesim  # noqa: F401
    except ImportError:
        return False
    return True


def yardstick_hits(trace: Trace, policy: str, capacity: int) -> Iterator[int]:
    """The hits of each request.

    Raises:
        SettingError: libcachesim is not installed.
    """
    get = _cache(policy, capacity)
    numbers: dict[bytes, int] = {}
    for request in trace.requests:
        hits, missed = 0, False
        for block in request.chain:
            missed = not get(numbers.setdefault(block, len(numbers) + 1)) or missed
            hits += not missed
        yield hits


def _cache(policy: str, capacity: int) -> Callable[[int], bool]:
    try:
        import libcachesim
    except ImportError:
        cure = "it needs libcachesim (pip install libcachesim); without it, default, clairvoyant"
        raise SettingError("--policy", policy, cure) from None
    cache: Any = getattr(libcachesim, NAMES[policy])(capacity)
    asked: Any = libcachesim.Request()
    asked.obj_size = 1

    def get(number: int) -> bool:
        asked.obj_id = number
        return bool(cache.get(asked))

    return get

"""Waiting for what has to come about, and no longer than anybody should."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

PATIENCE_SECONDS = 30.0
"""No test waits longer for anything, and none needs nearly as long on a machine of its own."""


def until(
    is_so: Callable[[], object], what: object = "", seconds: float = PATIENCE_SECONDS
) -> None:
    """Wait until it is so; fail if it never is."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, what or f"not within {seconds:g} s"
        time.sleep(0.005)


async def eventually(is_so: Callable[[], object], seconds: float = PATIENCE_SECONDS) -> None:
    """The same on an event loop."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        await asyncio.sleep(0.01)

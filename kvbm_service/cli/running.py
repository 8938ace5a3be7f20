"""Running a command until it ends, or until somebody asks it to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Coroutine


def logging_to_stderr(level: int = logging.WARNING, line: str = "kvbm: %(message)s") -> None:
    """Log lines of at least `level` to stderr, replacing what was set up before."""
    logging.basicConfig(level=level, format=line, stream=sys.stderr, force=True)


def log_as_a_service() -> None:
    """As services log: more of it, with the time."""
    logging_to_stderr(logging.INFO, "%(asctime)s %(levelname)-7s %(message)s")


def run(command: Coroutine[None, None, None]) -> None:
    """Run `command` to its end; SIGINT or SIGTERM cancels it, and it ends cleanly.

    A second signal changes nothing: everything a command does to stop has a deadline.
    """
    asyncio.run(_until_stopped(command))


async def _until_stopped(command: Coroutine[None, None, None]) -> None:
    task = asyncio.ensure_future(command)
    stopping = False

    def stop() -> None:
        nonlocal stopping
        if not stopping:
            stopping = True
            task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        await task
    except asyncio.CancelledError:
        if not stopping:
            raise

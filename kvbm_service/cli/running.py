"""Running a command until it ends, or until somebody asks it to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterator

LOG_SECONDS = 30.0
"""The shortest time between two lines of the log that say how a service is doing."""

_log = logging.getLogger(__name__)


def logging_to_stderr(level: int = logging.WARNING, line: str = "kvbm: %(message)s") -> None:
    """Log lines of at least `level` to stderr, replacing what was set up before."""
    logging.basicConfig(level=level, format=line, stream=sys.stderr, force=True)


def log_as_a_service() -> None:
    """As services log: more of it, with the time."""
    logging_to_stderr(logging.INFO, "%(asctime)s %(levelname)-7s %(message)s")


@contextlib.contextmanager
def status_line() -> Iterator[Callable[[str], None]]:
    """What shows how a service is doing: a line at the bottom of a terminal, else the log.

    In the log it is said when it has changed, and not more often than every `LOG_SECONDS`.
    """
    if not sys.stderr.isatty():
        yield _to_the_log()
        return
    from rich.console import Console
    from rich.highlighter import NullHighlighter
    from rich.logging import RichHandler

    console = Console(stderr=True, highlight=False)
    handler = RichHandler(
        console=console, show_path=False, log_time_format="%X", highlighter=NullHighlighter()
    )
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler], force=True)
    with console.status("starting") as status:
        yield status.update


def _to_the_log() -> Callable[[str], None]:
    said, said_at = "", 0.0

    def show(line: str) -> None:
        nonlocal said, said_at
        now = time.monotonic()
        if line != said and now >= said_at + LOG_SECONDS:
            said, said_at = line, now
            _log.info(line)

    return show


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

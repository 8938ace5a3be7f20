"""A task in the background that ends when told to, and does not die in silence."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine

CANCEL_SECONDS = 0.1
"""How long to wait for a task to notice that it was cancelled, before telling it again."""

log = logging.getLogger(__name__)


class Background:
    """One running task, owned by whoever made this."""

    def __init__(self, work: Coroutine[None, None, None], name: str) -> None:
        self._task = asyncio.create_task(work, name=name)
        self._task.add_done_callback(_report)

    async def end(self) -> None:
        """Cancel it and wait for its end. Called by the task itself, it does nothing."""
        if self._task is asyncio.current_task():
            return
        while not self._task.done():
            # Told more than once: nats-py swallows cancellations in places.
            self._task.cancel()
            await asyncio.wait([self._task], timeout=CANCEL_SECONDS)


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("%s has ended by a fault of ours", task.get_name(), exc_info=task.exception())

"""Whether a disk still answers. A system call to one that does not may hang for ever, and with it
the thread that made it: so another thread looks.

What it counts is its own looks, not the time. A process that was stopped for an hour has not
looked meanwhile, and its disk gets as long as any other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from kvbm_service.adapters.disk import Disk, DiskLost

LOOK_SECONDS = 1.0
ANSWER_LOOKS = 30
"""A call that has got nowhere in so many looks gives the disk up."""


class DiskWatch:
    """Looks after `disk` until `close`. What it gives up is told to `lost`, once."""

    def __init__(self, disk: Disk, lost: Callable[[DiskLost], None]) -> None:
        self._disk = disk
        self._lost = lost
        self._looks: dict[int, int] = {}
        """How often each step under way has been seen."""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvbm-disk-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(LOOK_SECONDS):
            looks = self._looks
            self._looks = {step: looks.get(step, 0) + 1 for step in self._disk.under_way()}
            if max(self._looks.values(), default=0) > ANSWER_LOOKS:
                reason = f"the disk has not answered for {ANSWER_LOOKS * LOOK_SECONDS:g} s"
                self._disk.give_up(reason)
                self._lost(DiskLost(reason))
                return

"""A process that saves to its disk until its stdin is closed, and then says how it went.

Its disk is given up when it does not answer for `DEADLINE_SECONDS`.
"""

from __future__ import annotations

import select
import sys
from pathlib import Path

from kvbm_service import disk_watch
from tests.failures.disk_worker import DiskWorker

MORE_SAVES = 50

DEADLINE_SECONDS = 5.0
"""Longer than a machine with a lot to do keeps a thread, or a write, waiting."""

LOOKS = 10


def save(worker: DiskWorker) -> None:
    """Save, and wait for the end of it."""
    op = worker.save([0, 1, 2, 3], [0, 1, 2, 3])
    worker.until(lambda: op in worker.moved)


def main() -> None:
    disk_watch.LOOK_SECONDS, disk_watch.ANSWER_LOOKS = DEADLINE_SECONDS / LOOKS, LOOKS
    worker = DiskWorker(Path(sys.argv[1]))
    save(worker)
    print("saving", flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        save(worker)
    for _ in range(MORE_SAVES):
        save(worker)
    print(f"lost: {worker.disk_lost!r}", flush=True)


if __name__ == "__main__":
    main()

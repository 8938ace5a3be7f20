"""A process that saves to its disk until its stdin is closed, and then says how it went.

Its disk is given up when it does not answer for half a second.
"""

from __future__ import annotations

import select
import sys
from pathlib import Path

from kvbm_service import disk_watch
from kvbm_service.adapters import disk_lane
from tests.failures.disk_worker import DiskWorker

MORE_SAVES = 50

disk_lane.ANSWER_SECONDS = 0.5
disk_watch.LOOK_SECONDS, disk_watch.ANSWER_LOOKS = 0.05, 10


def save(worker: DiskWorker) -> None:
    """Save, and wait for the end of it."""
    op = worker.save([0, 1, 2, 3], [0, 1, 2, 3])
    worker.until(lambda: op in worker.moved)


def main() -> None:
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

"""A lane: one thread that works off jobs for an engine that must not wait for them."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from kvbm_service.adapters.affinity import use_every_cpu
from kvbm_service.errors import TransferError

_log = logging.getLogger(__name__)

PROGRESS_SECONDS = 0.002
"""How often an idle lane lets others' connections to us make progress. Over TCP, UCX aborts a
process that comes back to a queued read after its reader has died, so this is not to be long."""


class Job(NamedTuple):
    """Something to do, and whom to tell why it could not be done."""

    run: Callable[[], None]
    failed: Callable[[TransferError], None]
    urgent: bool = True


class Lane:
    """One thread that works off jobs, urgent ones first. Whatever a job raises, it is told of."""

    def __init__(self, name: str, idle: Callable[[], None] | None = None) -> None:
        self._urgent: deque[Job] = deque()
        self._other: deque[Job] = deque()
        self._idle = idle
        self._woken = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def add(self, job: Job) -> None:
        """Do `job` soon."""
        with self._woken:
            (self._urgent if job.urgent else self._other).append(job)
            self._woken.notify()

    def close(self) -> None:
        """Finish what was begun, forget the rest, end."""
        with self._woken:
            self._closed = True
            self._woken.notify()
        self._thread.join()

    def _run(self) -> None:
        use_every_cpu()
        while (job := self._next()) is not None:
            try:
                job.run()
            except TransferError as error:
                job.failed(error)
            except Exception as error:  # noqa: BLE001
                # Tasks are supervised here: a bug of ours costs a recompute, never a hang.
                _log.exception("a job failed")
                job.failed(TransferError(f"internal error: {error}"))

    def _next(self) -> Job | None:
        """The next job, or None when the lane is closed."""
        while True:
            with self._woken:
                if not (self._urgent or self._other or self._closed):
                    self._woken.wait(PROGRESS_SECONDS if self._idle else None)
                if self._closed:
                    return None
                jobs = self._urgent or self._other
                if jobs:
                    return jobs.popleft()
            if self._idle is not None:
                self._idle()

"""A lane: one thread that works off jobs for an engine that must not wait for them."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from kvbm_service.adapters.affinity import use_every_cpu
from kvbm_service.errors import TransferError

_log = logging.getLogger(__name__)

CLOSING_SECONDS = 0.1
"""How often `close` looks whether the thread it waits for has been abandoned."""

ABANDONED_SECONDS = 1.0
"""How long `close` waits for a thread that was abandoned: it may hang in the kernel for ever."""

Tell = Callable[[], None]


class Job(NamedTuple):
    """Something to do, and whom to tell why it could not be done."""

    run: Callable[[], Tell | None]
    """Returns how to tell of what it has done. Told, it cannot be taken back."""
    failed: Callable[[TransferError], None]
    urgent: bool = True


class Lane:
    """One thread that works off jobs, urgent ones first. Each is told of once, however it ends."""

    def __init__(self, name: str, idle: Callable[[], float] | None = None) -> None:
        """`idle` is called whenever there is nothing to do; returns how soon again, in seconds."""
        self._urgent: deque[Job] = deque()
        self._other: deque[Job] = deque()
        self._begun: Job | None = None
        self._abandoned: TransferError | None = None
        self._idle = idle
        self._woken = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def add(self, job: Job) -> None:
        """Do `job` soon."""
        with self._woken:
            if self._abandoned is None:
                (self._urgent if job.urgent else self._other).append(job)
                self._woken.notify()
                return
        job.failed(self._abandoned)

    def wake(self) -> None:
        """Call `idle` now, whatever it has said, unless there is something to do."""
        with self._woken:
            self._woken.notify()

    def abandon(self, error: TransferError) -> None:
        """Every job has failed: the one begun, those that wait, and those to come.

        To be called by another thread, when this one may never come back. Should it come back
        all the same, nobody is told.
        """
        with self._woken:
            jobs = [*([self._begun] if self._begun else []), *self._urgent, *self._other]
            self._begun, self._abandoned = None, error
            self._urgent.clear()
            self._other.clear()
        for job in jobs:
            job.failed(error)

    def close(self) -> bool:
        """Finish what was begun, forget the rest, end. False if the thread hangs."""
        with self._woken:
            self._closed = True
            self._woken.notify()
        while self._abandoned is None and self._thread.is_alive():
            self._thread.join(CLOSING_SECONDS)
        self._thread.join(ABANDONED_SECONDS)
        return not self._thread.is_alive()

    def _run(self) -> None:
        use_every_cpu()
        while (job := self._next()) is not None:
            tell = _outcome(job)
            with self._woken:
                ours, self._begun = self._begun is not None, None
            if ours and tell is not None:
                tell()

    def _next(self) -> Job | None:
        """The next job, or None when the lane is closed."""
        rest = None if self._idle is None else 0.0
        while True:
            with self._woken:
                if not (self._urgent or self._other or self._closed):
                    self._woken.wait(rest)
                if self._closed:
                    return None
                jobs = self._urgent or self._other
                if jobs:
                    self._begun = jobs.popleft()
                    return self._begun
            if self._idle is not None:
                rest = self._idle()


def _outcome(job: Job) -> Tell | None:
    """Do it; how to tell of it, whatever it raises."""
    try:
        return job.run()
    except TransferError as error:
        return partial(job.failed, error)
    except Exception as error:  # noqa: BLE001
        # Tasks are supervised here: a bug of ours costs a recompute, never a hang.
        _log.exception("a job failed")
        return partial(job.failed, TransferError(f"internal error: {error}"))

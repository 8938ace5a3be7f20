"""An asyncio loop on a thread of its own, beside an engine that knows nothing of asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Coroutine

from kvbm_service.adapters.affinity import use_every_cpu

_log = logging.getLogger(__name__)

STOP_SECONDS = 5.0
"""How long `stop` waits for the work to end before it gives up on it."""
RESTART_SECONDS = 1.0


class LoopThread:
    """Runs one coroutine until it ends or `stop` cancels it. Never keeps the process alive.

    Should it fail, by a bug of ours, it is started again after a pause.
    """

    def __init__(self, name: str, main: Callable[[], Coroutine[None, None, None]]) -> None:
        self._loop = asyncio.new_event_loop()
        self._main = main
        self._task: asyncio.Task[None] | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def call(self, function: Callable[[], object]) -> None:
        """Run `function` soon, on the loop. After `stop`, does nothing."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(function)

    def stop(self) -> None:
        """Cancel the coroutine and wait for it to clean up."""
        self._stopping.set()
        if self._thread.ident is None:  # never started
            self._loop.close()
            return
        self.call(self._cancel)
        self._thread.join(STOP_SECONDS)
        if self._thread.is_alive():
            _log.warning("%s did not end within %g s", self._thread.name, STOP_SECONDS)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _run(self) -> None:
        use_every_cpu()
        asyncio.set_event_loop(self._loop)
        try:
            while not (self._ended() or self._stopping.wait(RESTART_SECONDS)):
                _log.error("%s starts again", self._thread.name)
        finally:
            self._loop.close()

    def _ended(self) -> bool:
        """Run the coroutine once. False if it failed."""
        self._task = self._loop.create_task(self._main())
        try:
            self._loop.run_until_complete(self._task)
        except asyncio.CancelledError:
            return True
        except Exception:  # noqa: BLE001
            # The one place where a failure of ours ends: the engine goes on without us.
            _log.exception("%s failed", self._thread.name)
            return False
        return True

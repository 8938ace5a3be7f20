"""Time in the simulated world: a heap of (time, tie, action), and processes that can stop."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

Action = Callable[[], None]


class Process:
    """Whom an action belongs to. While it is stopped, its actions wait; when dead, for ever."""

    def __init__(self) -> None:
        self.alive = True
        self.wakes_at = 0.0


class Timeline:
    """What is going to happen, in order. Nothing takes time unless it says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Process, Action]] = []
        self._tie = 0

    def after(self, delay: float, process: Process, action: Action) -> None:
        """Let `process` do `action` in `delay` seconds."""
        self._tie += 1
        heapq.heappush(self._heap, (self.now + delay, self._tie, process, action))

    def every(self, period: float, process: Process, action: Action) -> None:
        """Let `process` do `action` now and again, for as long as it lives."""

        def once() -> None:
            action()
            self.after(period, process, once)

        self.after(0.0, process, once)

    def play(self, process: Process, script: Iterator[float]) -> None:
        """Let `process` go through `script`, which yields how long each pause takes."""

        def resume() -> None:
            pause = next(script, None)
            if pause is not None:
                self.after(pause, process, resume)

        self.after(0.0, process, resume)

    def run(self, until: float) -> None:
        """Let everything happen that is due up to `until`."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            due, tie, process, action = heapq.heappop(heap)
            if not process.alive:
                continue
            if process.wakes_at > due:
                heapq.heappush(heap, (process.wakes_at, tie, process, action))
                continue
            self.now = due
            action()
        self.now = until

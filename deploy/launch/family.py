"""Processes that are started together and end together, whatever happens to one of them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from kvbm_service.adapters.embedded_server import mortal
from kvbm_service.demo.engine import what_a_log_tells
from kvbm_service.demo.process_group import end_group, members

STOP_SECONDS = 30.0
"""How long a process may take to end by itself before it is killed."""
GONE_SECONDS = 5.0
"""For what was killed to be gone, and for Python's resource tracker to tidy up."""
LOOK_SECONDS = 0.1
PROGRESS_SECONDS = 2.0
"""After which one is told what is being waited for."""


class Stopped(Exception):
    """Somebody wants everything to end."""


class ChildEnded(Exception):
    """A process ended that should not have."""

    def __init__(self, child: Child) -> None:
        super().__init__(
            f"{child.name} has ended with status {child.process.poll()}\n{child.last_words()}"
        )


@dataclass(frozen=True, eq=False)
class Child:
    """A process of ours. It leads a group of its own, in which all that it starts are."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    generation: int

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process.poll() is None

    def last_words(self) -> str:
        """The errors that its log names, and the log's end."""
        return what_a_log_tells(self.log)

    def ask_to_end(self) -> None:
        """As Ctrl-C would; it may take its time."""
        if self.alive:
            self.process.send_signal(signal.SIGTERM)

    def end(self) -> None:
        """Kill whatever is left of it and of those that it started."""
        group, deadline = self.process.pid, time.monotonic() + GONE_SECONDS
        end_group(group)
        while members(group) and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS / 10)
        if members(group):
            os.killpg(group, signal.SIGKILL)
        self.process.wait()


class Family:
    """All processes that were started here. Use it as a context: at its end none is left.

    From its beginning on, SIGINT, SIGTERM and SIGHUP only count; `look` raises when there was one.
    A second one ends the waiting for processes that end slowly.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._children: list[Child] = []
        self._signals = 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._note)

    def start(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], generation: int
    ) -> Child:
        """Start a process that also ends when we are killed. Its output goes to its log.

        `generation`: those of one end side by side, after those of the next one have.
        """
        log = self._logs / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                mortal(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        child = Child(name, process, log, generation)
        self._children.append(child)
        return child

    def look(self) -> None:
        """Let a moment pass.

        Raises:
            Stopped: there was a signal.
        """
        if self._signals:
            raise Stopped
        time.sleep(LOOK_SECONDS)

    def ended(self) -> list[Child]:
        """Those that have ended since this was asked last; what they left is ended, too."""
        found = [child for child in self._children if not child.alive]
        for child in found:
            child.end()
            self._children.remove(child)
        return found

    def lives(self, generation: int) -> bool:
        """Whether any of that generation does."""
        return any(child.alive for child in self._children if child.generation == generation)

    def end_all(self, say: Callable[[str], None]) -> None:
        """End what was started last first: those that others need stay until nobody needs them."""
        ended_by = self._signals
        for number in sorted({child.generation for child in self._children}, reverse=True):
            generation = [child for child in self._children if child.generation == number]
            for child in generation:
                child.ask_to_end()
            self._wait_for(generation, ended_by, say)
            for child in generation:
                child.end()
        self._children.clear()

    def _wait_for(
        self, generation: Sequence[Child], ended_by: int, say: Callable[[str], None]
    ) -> None:
        began, told = time.monotonic(), False
        while left := [child for child in generation if child.alive]:
            waited = time.monotonic() - began
            if waited > STOP_SECONDS or self._signals > ended_by:
                return
            if waited > PROGRESS_SECONDS and not told:
                say(f"waiting for {_names(left)} to end; Ctrl-C kills them")
                told = True
            time.sleep(LOOK_SECONDS)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._signals += 1


def _names(children: Sequence[Child]) -> str:
    return ", ".join(child.name for child in children)

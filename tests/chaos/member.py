"""A node of the arena: its engine dies and another one takes its place, under the same name."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvbm_schemas.events import Beat
from kvbm_service.demo.engine import Engine, EngineFailed, EngineOptions
from kvbm_service.demo.process_group import members
from tests.chaos.passage import Passage
from tests.chaos.wall_clock import WallClock
from tests.integration.node import Node
from tests.integration.witness import Witness

LOOK_SECONDS = 0.05

LEADER, WORKER = "VLLM::EngineCore", "VLLM::Worker"


@dataclass
class Halt:
    """A time in which a member was kept from working, and what asked of it may fail."""

    began: float
    ended: float = float("inf")


class Member:
    """A node under its name, whatever engine it has just now."""

    def __init__(
        self,
        name: str,
        options: Callable[[int], EngineOptions],
        witness: Witness,
        passages: tuple[Passage, ...],
        clock: WallClock,
        ranks: int,
        has_disk: bool,
    ) -> None:
        """`options` gives those of its nth engine."""
        self.name = name
        self.passages = passages
        self.clock = clock
        self.ranks = ranks
        self.has_disk = has_disk
        self.lives = 0
        self._options = options
        self._witness = witness
        self._halts: list[Halt] = []
        self._lock = threading.Lock()
        self._engine: Engine | None = None
        self._up = threading.Event()
        self._starting: threading.Thread | None = None
        self.start()

    # -- its life ------------------------------------------------------------------------------

    def start(self) -> None:
        """Start an engine, and do not wait for it."""
        self.lives += 1
        self._engine = Engine(self._options(self.lives))
        self._starting = threading.Thread(target=self._become_ready, name=f"{self.name} starts")
        self._starting.start()

    @property
    def engine(self) -> Engine:
        """The present one."""
        assert self._engine is not None
        return self._engine

    @property
    def node(self) -> Node:
        """The present engine, as tests see it."""
        return Node(self.engine, self._witness)

    @property
    def up(self) -> bool:
        """Whether it takes part."""
        return self._up.is_set()

    def wait_up(self, seconds: float) -> bool:
        """Wait until it does; False: not in time."""
        return self._up.wait(seconds)

    def kill(self) -> None:
        """kill -9 of all its processes."""
        self._fall()
        self.engine.kill()

    def restart(self) -> None:
        """Put another engine in the place of this one, which is killed if anything is left."""
        self.kill()
        if self._starting is not None:
            self._starting.join()
        self.start()

    def end(self) -> None:
        """Kill it, and wait for all that works on it."""
        self.kill()
        if self._starting is not None:
            self._starting.join()

    def _fall(self) -> None:
        with self._lock:
            if self._up.is_set() or not self._halts:
                self._halts.append(Halt(time.monotonic()))
            self._up.clear()

    def _become_ready(self) -> None:
        engine = self.engine
        try:
            engine.wait_ready()
        except EngineFailed:
            return  # `up` stays what it is, and whoever waits for it says so
        report = self._witness.listen()
        while not report.of(Beat, self.name):
            if not engine.alive:
                return
            time.sleep(LOOK_SECONDS)
        with self._lock:
            for halt in self._halts:
                halt.ended = min(halt.ended, time.monotonic())
            self._up.set()

    # -- what befalls it -------------------------------------------------------------------------

    def processes(self, title: str) -> list[int]:
        """Its processes that vLLM has given this title, or a longer one; in order of ranks."""
        found = []
        for process in members(self.engine.pid):
            try:
                command = Path(f"/proc/{process}/cmdline").read_bytes().rstrip(b"\0").decode()
            except OSError:  # it has just ended
                continue
            if command.startswith(title):
                found.append((command, process))
        return [process for _, process in sorted(found)]

    def strike(self, process: int) -> None:
        """kill -9 of one of its processes: what the engine does about it is up to vLLM."""
        self._fall()
        os.kill(process, signal.SIGKILL)

    def stop(self, process: int) -> Callable[[], None]:
        """SIGSTOP of one of its processes; returns what lets it go on."""
        halt = Halt(time.monotonic())
        with self._lock:
            self._halts.append(halt)
        os.kill(process, signal.SIGSTOP)

        def go_on() -> None:
            with contextlib.suppress(ProcessLookupError):  # it has ended for another reason
                os.kill(process, signal.SIGCONT)
            halt.ended = min(halt.ended, time.monotonic())

        return go_on

    def limit_files(self, nbytes: int) -> None:
        """Let its workers write nothing beyond so many bytes into any file; -1: no limit."""
        for process in self.processes(WORKER):
            _, hard = resource.prlimit(process, resource.RLIMIT_FSIZE)
            resource.prlimit(process, resource.RLIMIT_FSIZE, (nbytes, hard))

    # -- what judges ask -------------------------------------------------------------------------

    def halted(self, began: float, ended: float) -> float:
        """For how many seconds of this time it was kept from working."""
        with self._lock:
            spans = [(max(h.began, began), min(h.ended, ended)) for h in self._halts]
        halted, known = 0.0, began
        for start, stop in sorted(span for span in spans if span[0] < span[1]):
            halted += max(0.0, stop - max(start, known))
            known = max(known, stop)
        return halted

    def was_struck(self, began: float, ended: float) -> bool:
        """Whether something befell its processes in this time."""
        with self._lock:
            return any(h.began <= ended and h.ended >= began for h in self._halts)

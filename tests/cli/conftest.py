"""The real command in a real process, beside a real nats-server."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvbm_service.adapters.nats_server import EmbeddedNats

ROOT = Path(__file__).parents[2]
DEADLINE_SECONDS = 30.0

COMMAND = [sys.executable, "-m", "kvbm_service.cli"]


def clean_environment(**extra: str) -> dict[str, str]:
    """Ours, without settings of ours, at 80 columns and without colours."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("KVBM_", "DYN_KVBM_"))
    }
    roots = os.pathsep.join(str(ROOT / root) for root in ("", "schemas", "connectors"))
    return {**kept, "PYTHONPATH": roots, "COLUMNS": "80", "NO_COLOR": "1", **extra}


Kvbm = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture
def kvbm() -> Kvbm:
    """Run `kvbm` with these arguments to its end."""

    def run(
        *arguments: str, stdin: bytes = b"", **extra: str
    ) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [*COMMAND, *arguments],
            input=stdin,
            capture_output=True,
            env=clean_environment(**extra),
            timeout=DEADLINE_SECONDS,
            check=False,
        )

    return run


class Running:
    """A `kvbm` that runs on, and what it has printed."""

    def __init__(self, *arguments: str, **extra: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=clean_environment(**extra),
        )
        self.seen: list[str] = []
        self._lines: queue.Queue[str] = queue.Queue()
        self._readers = [
            threading.Thread(target=self._read, args=(stream,), daemon=True)
            for stream in (self.process.stdout, self.process.stderr)
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: Iterator[str]) -> None:
        for line in stream:
            self._lines.put(line.rstrip("\n"))

    def wait_for(self, text: str) -> str:
        """The first line from now on that contains `text`."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            try:
                line = self._lines.get(timeout=left)
            except queue.Empty:
                break
            self.seen.append(line)
            if text in line:
                return line
        raise AssertionError(f"no {text!r} in time; seen: {self.seen}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status; `seen` is then complete."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """The exit status, once the process ends by itself."""
        status = self.process.wait(DEADLINE_SECONDS)
        for reader in self._readers:
            reader.join(DEADLINE_SECONDS)
        while not self._lines.empty():
            self.seen.append(self._lines.get())
        return status

    def close(self) -> None:
        """End it whatever it does."""
        if self.process.poll() is None:
            self.process.kill()
        self.wait()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


Start = Callable[..., Running]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start `kvbm` with these arguments; whatever still runs at the end is killed."""
    running: list[Running] = []

    def begin(*arguments: str, **extra: str) -> Running:
        running.append(Running(*arguments, **extra))
        return running[-1]

    yield begin
    for one in running:
        one.close()


@pytest.fixture(scope="session")
def nats() -> Iterator[EmbeddedNats]:
    """A nats-server for all tests that only use it."""
    with EmbeddedNats() as server:
        yield server

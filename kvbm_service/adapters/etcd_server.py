"""The embedded etcd: the real one, as a child process on the loopback interface.

It is no Python package. Where the system has none, `make test` unpacks Debian's into the
checkout's `build`, where it is found, too.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvbm_service.adapters.embedded_server import HOST, EmbeddedServer
from kvbm_service.errors import DirectoryError, PortTaken

UNPACKED = Path(__file__).parents[2] / "build" / "etcd-server" / "usr" / "bin"
PORT_ATTEMPTS = 5
"""How often a free port, for clients or the peers that never come, may be taken by another."""

DEFAULTS = {
    "logger": "zap",
    # Alone, it can be quick: it answers sooner, and lets leases be shorter than 2 s.
    "heartbeat-interval": "30",
    "election-timeout": "300",
    # Every renewal of a record is a revision; nobody wants the old ones.
    "auto-compaction-mode": "revision",
    "auto-compaction-retention": "10000",
}


def etcd_binary() -> Path:
    """Where the etcd executable is.

    Raises:
        DirectoryError: there is none.
    """
    found = shutil.which("etcd") or shutil.which("etcd", path=UNPACKED)
    if found is None:
        raise DirectoryError("no etcd here: apt-get install etcd-server, or put one on PATH")
    return Path(found)


class EmbeddedEtcd(EmbeddedServer):
    """A cluster of one etcd, listening on 127.0.0.1 only.

    `options` are etcd's own command-line flags without dashes; they win over our defaults.
    """

    NAME = "etcd"

    def __init__(
        self,
        port: int = 0,
        store_dir: Path | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(port, store_dir)
        self._options = options or {}

    @property
    def url(self) -> str:
        """Where clients connect, without user and password. Known once started."""
        return f"{'etcds' if self._tls else 'etcd'}://{HOST}:{self.port}"

    def start(self) -> None:
        for left in reversed(range(PORT_ATTEMPTS)):
            try:
                self._start_on(self.port or _free_port())
                return
            except PortTaken:
                if not left:
                    raise

    def _start_on(self, port: int) -> None:
        before, self.port = self.port, port
        try:
            super().start()
        except BaseException:
            self.port = before
            raise

    @property
    def _tls(self) -> bool:
        return "cert-file" in self._options

    def _command(self, store_dir: Path) -> Sequence[str | Path]:
        scheme = "https" if self._tls else "http"
        peer = f"http://{HOST}:{_free_port()}"
        options = {
            **DEFAULTS,
            "data-dir": str(store_dir),
            "log-outputs": str(self.log_path),
            "listen-client-urls": f"{scheme}://{HOST}:{self.port}",
            "advertise-client-urls": f"{scheme}://{HOST}:{self.port}",
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": f"default={peer}",
            **self._options,
        }
        return [etcd_binary(), *(f"--{name}={value}" for name, value in options.items())]

    def _environment(self) -> dict[str, str]:
        # etcd takes options from there, which are meant for another one.
        return {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")}

    def _answering_port(self, process: subprocess.Popen[bytes]) -> int:
        # By its own log, since another one may answer on the port that this one did not get.
        said = any("serving client traffic" in line["msg"] for line in self._log())
        return self.port if said and _answers(self.port) else 0

    def _ended(self) -> DirectoryError | PortTaken:
        words = self._last_words()
        if "address already in use" in words:
            return PortTaken(
                f"port {self.port} on {HOST} is in use: stop what listens there, choose another "
                "port, or use the etcd that is already there by its URL"
            )
        return DirectoryError(f"etcd ended at once: {words}")

    def _trouble(self, words: str) -> DirectoryError:
        return DirectoryError(words)

    def _last_words(self) -> str:
        lines = self._log()
        fatal = [line for line in lines if line.get("level") in ("error", "fatal", "panic")]
        if not lines:
            return "it wrote no log"
        line = (fatal or lines)[-1]
        return f"{line['msg']} {line.get('error', '')}".rstrip()

    def _log(self) -> list[dict[str, str]]:
        try:
            lines = self.log_path.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return []
        return [parsed for parsed in map(_parsed, lines) if "msg" in parsed]


def _parsed(line: str) -> dict[str, str]:
    try:
        parsed = json.loads(line)
    except json.JSONDecodeError:
        return {}  # half written
    return parsed if isinstance(parsed, dict) else {}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _answers(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), timeout=1.0).close()
    except OSError:
        return False
    return True

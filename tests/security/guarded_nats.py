"""A real nats-server with a configuration of its own, on a free port of the loopback interface."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from kvbm_service.adapters.nats_server import nats_server_binary

DEADLINE_SECONDS = 20.0


class GuardedNats:
    """A running server: where it is, and what it has logged."""

    def __init__(self, folder: Path, configuration: Path, environ: Mapping[str, str]) -> None:
        self._log = folder / "server.log"
        self.process = subprocess.Popen(
            [
                nats_server_binary(),
                *("-c", configuration, "-a", "127.0.0.1", "-p", "-1"),
                *("--ports_file_dir", folder, "-l", self._log),
            ],
            env={**os.environ, **environ},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        ports = folder / f"nats-server_{self.process.pid}.ports"
        self.port = int(self._listening(ports).rpartition(":")[2])

    def _listening(self, ports: Path) -> str:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                listing = json.loads(ports.read_text())
            except (FileNotFoundError, json.JSONDecodeError):
                time.sleep(0.01)
                continue
            return str((listing.get("nats") or listing["tls"])[0])
        self.close()
        raise AssertionError(f"nats-server does not start: {self.logged()}")

    def url(self, login: str = "", scheme: str = "nats") -> str:
        """Where it is; `login` is what stands before the @."""
        return f"{scheme}://{login}{'@' if login else ''}127.0.0.1:{self.port}"

    def logged(self) -> str:
        """Its log so far."""
        return self._log.read_text() if self._log.exists() else ""

    def reload(self) -> None:
        """Read the configuration again."""
        before = self.logged().count("Reloaded server configuration")
        subprocess.run([nats_server_binary(), "--signal", f"reload={self.process.pid}"], check=True)
        deadline = time.monotonic() + DEADLINE_SECONDS
        while self.logged().count("Reloaded server configuration") == before:
            assert time.monotonic() < deadline, self.logged()
            time.sleep(0.01)

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


@contextmanager
def guarded_nats(
    folder: Path, configuration: str | Path, environ: Mapping[str, str] | None = None
) -> Iterator[GuardedNats]:
    """A server with this configuration (its text, or its file) while the block lasts."""
    if isinstance(configuration, str):
        path = folder / "server.conf"
        path.write_text(configuration)
    else:
        path = configuration
    server = GuardedNats(folder, path, environ or {})
    try:
        yield server
    finally:
        server.close()

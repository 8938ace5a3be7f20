"""A nats-server on a host, to be killed and started again; alone, or one of a cluster."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from kvbm_service.adapters.nats_server import nats_server_binary
from tests.world.hosts import Host

CLIENT_PORT = 4222
ROUTE_PORT = 6222
START_SECONDS = 30.0
POLL_SECONDS = 0.02


class NatsOnHost:
    """`start` it. Its port, and what is stored in `folder`, stay the same over its lives.

    With `peers`, it is one of a cluster: these are the hosts of all of them, its own included.
    """

    def __init__(self, host: Host, folder: Path, peers: Sequence[Host] = ()) -> None:
        self.host = host
        self.log = folder / "server.log"
        self._folder = folder
        self._peers = peers
        self._process: subprocess.Popen[Any] | None = None

    @property
    def url(self) -> str:
        """For KVBM_NATS_URL."""
        return f"nats://{self.host.address}:{CLIENT_PORT}"

    def start(self) -> None:
        """Start, and wait until it answers clients."""
        self._folder.mkdir(parents=True, exist_ok=True)
        config = self._folder / "server.json"
        config.write_text(json.dumps(self._config()))
        self._process = self.host.start([nats_server_binary(), "-c", config], self.log)
        deadline = time.monotonic() + START_SECONDS
        while not self.host.run(_answers, self.host.address):
            assert self._process.poll() is None, self.log.read_text()[-2000:]
            assert time.monotonic() < deadline, "nats-server does not answer"
            time.sleep(POLL_SECONDS)

    def kill(self) -> None:
        """Kill -9 it."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "server_name": self.host.name,
            "listen": f"{self.host.address}:{CLIENT_PORT}",
            "jetstream": {"store_dir": str(self._folder / "store")},
        }
        if self._peers:
            routes = [f"nats://{peer.address}:{ROUTE_PORT}" for peer in self._peers]
            config["cluster"] = {
                "name": "world",
                "listen": f"{self.host.address}:{ROUTE_PORT}",
                "routes": routes,
            }
        return config


def _answers(address: str) -> bool:
    try:
        with closing(socket.create_connection((address, CLIENT_PORT), timeout=1.0)) as connection:
            return connection.makefile("rb").readline(1 << 16).startswith(b"INFO ")
    except OSError:
        return False

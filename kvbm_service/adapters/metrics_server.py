"""Serves metrics over HTTP, for Prometheus and for people.

    GET /metrics   everything, in Prometheus' text format or OpenMetrics
    GET /          a page that points there

Each connection has a short-lived thread of its own, so that a browser that only holds one open
keeps no scrape waiting.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import socketserver
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any

from kvbm_service.adapters.metrics import Metrics
from kvbm_service.errors import SettingError

_log = logging.getLogger(__name__)

HOST_SETTING = "KVBM_METRICS_HOST"
PORT_SETTING = "DYN_KVBM_METRICS_PORT"

MAX_PORTS_TRIED = 32
"""Ports from the wanted one on; if all are taken, the system chooses one."""

MAX_CONNECTIONS = 32
"""Open at the same time. Further ones are closed at once."""

IDLE_SECONDS = 5.0
"""A connection that says nothing for so long is closed."""

MAX_PORT = 65_535

_TAKEN = (errno.EADDRINUSE, errno.EACCES)

_PAGE = b"""<!doctype html>
<title>KV cache metrics</title>
<p>This engine's KV cache: <a href="/metrics">metrics</a>, for Prometheus.</p>
"""


def serve(metrics: Metrics, host: str, port: int) -> MetricsServer:
    """Serve `metrics` on `port` or, if it is taken, on the next one that is free.

    Raises:
        SettingError: `host` is no address of this machine.
    """
    server = _bind(metrics, host, port)
    if port in (0, server.port):
        _log.info("metrics are served at http://%s/metrics", server.address)
    else:
        _log.warning(
            "port %d is taken: metrics are served at http://%s/metrics instead; "
            "%s chooses another",
            port, server.address, PORT_SETTING,
        )  # fmt: skip
    return MetricsServer(server)


def _bind(metrics: Metrics, host: str, port: int) -> _Server:
    last = min(port + MAX_PORTS_TRIED - 1, MAX_PORT)
    for candidate in range(port, last + 1):
        try:
            return _Server(metrics, host, candidate)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise SettingError(HOST_SETTING, host, "an address of this machine") from error
    return _Server(metrics, host, 0)


class MetricsServer:
    """A running server. `close` it."""

    def __init__(self, server: _Server) -> None:
        self.port = server.port
        self._server = server
        self._thread = threading.Thread(
            target=server.serve_forever, args=(0.2,), name="kvbm-metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Free the port, cut off whoever is being answered, and wait for every thread to end."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._server.cut_off()


class _Server(socketserver.ThreadingTCPServer):
    """The listening socket, and the connections it has accepted."""

    allow_reuse_address = True
    request_queue_size = MAX_CONNECTIONS

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        self.metrics = metrics
        self._connections: dict[threading.Thread, socket.socket] = {}
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.server_address[1])

    @property
    def address(self) -> str:
        """Where it listens, as in a URL."""
        host = str(self.server_address[0])
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    def cut_off(self) -> None:
        """End the connections that are open, and their threads."""
        for thread, connection in list(self._connections.items()):
            with contextlib.suppress(OSError):  # it has just ended by itself
                connection.shutdown(socket.SHUT_RDWR)
            thread.join()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether there is room for one more."""
        return len(self._connections) < MAX_CONNECTIONS

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer on a thread that never keeps the process from ending."""
        thread = threading.Thread(
            target=self._answer, args=(request, client_address), name="kvbm-scrape", daemon=True
        )
        self._connections[thread] = request
        thread.start()

    def _answer(self, request: socket.socket, client_address: Any) -> None:
        try:
            self.process_request_thread(request, client_address)
        finally:
            del self._connections[threading.current_thread()]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news, and an answer that fails must not end the server."""
        _log.debug("a request for metrics failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: _Server
    timeout = IDLE_SECONDS
    server_version = "kvbm"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer with a body."""
        path = self.path.partition("?")[0]
        if path == "/metrics":
            content_type, body = self.server.metrics.expose(self.headers.get("Accept", ""))
            self._reply(HTTPStatus.OK, content_type, body)
        elif path == "/":
            self._reply(HTTPStatus.OK, "text/html; charset=utf-8", _PAGE)
        else:
            self._reply(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"see /metrics\n")

    def do_HEAD(self) -> None:
        """The same without a body."""
        self.do_GET()

    def _reply(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Scrapes come every few seconds: say nothing."""

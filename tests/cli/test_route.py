"""`kvbm route`: the real command before engines, one of which is another process' end."""

from __future__ import annotations

import json
import signal
import socket
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from kvbm_service.adapters.nats_server import EmbeddedNats


class _Engine(BaseHTTPRequestHandler):
    """An engine that is well, and answers when it is let."""

    protocol_version = "HTTP/1.1"
    let = threading.Event()
    asked = threading.Event()

    def do_GET(self) -> None:
        self._answer({"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.set()
        self.let.wait(60)
        self._answer({"choices": [{"text": "yes"}]})

    def _answer(self, body: object) -> None:
        payload = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def engine() -> Iterator[str]:
    _Engine.let.clear()
    _Engine.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), _Engine) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        _Engine.let.set()
        server.shutdown()
        thread.join()


def post(url: str) -> object:
    request = urllib.request.Request(
        f"{url}/v1/completions", b'{"prompt": "x"}', {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def test_it_says_where_it_listens_and_to_whom_and_ends_what_it_has_begun(
    start, nats: EmbeddedNats, engine: str
) -> None:
    running = start("route", "--port", "0", "--engine", f"{engine}/v1", "--nats-url", nats.url)
    line = running.wait_for("routing on")
    assert f"{engine} (both)" in line
    url = line.split()[2]
    answers: list[object] = []
    asking = threading.Thread(target=lambda: answers.append(post(url)))
    asking.start()
    assert _Engine.asked.wait(60)
    running.process.send_signal(signal.SIGTERM)
    running.wait_for("ending 1 request")
    with pytest.raises(OSError, match=r"."):
        post(url)
    _Engine.let.set()
    asking.join()
    assert answers == [{"choices": [{"text": "yes"}]}]
    assert running.wait() == 0


def test_without_nats_it_routes_to_those_it_was_named(start, engine: str) -> None:
    _Engine.let.set()
    running = start("route", "--port", "0", "--decode", engine, "--no-membership")
    line = running.wait_for("routing on")
    assert f"{engine} (decode)" in line
    assert post(line.split()[2]) == {"choices": [{"text": "yes"}]}
    assert running.stop(signal.SIGINT) == 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--engine", "here:8000"], b"--engine="),
        (["--engine", "http://user:secret@here"], b"without a login"),
        (["--engine", "http://a", "--decode", "http://a/"], b"is named as both already"),
        (["--no-membership"], b"name engines with --engine"),
        (["--port", "70000"], b"--port"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(
    kvbm, arguments: list[str], complaint: bytes
) -> None:
    done = kvbm("route", *arguments)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert b"secret" not in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_a_port_that_is_taken_is_named(kvbm) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = kvbm("route", "--port", str(port), "--engine", "http://127.0.0.1:1",
                    "--no-membership")  # fmt: skip
    assert done.returncode == 2
    assert f"127.0.0.1:{port}".encode() in done.stderr

"""In place of vLLM's server: it answers at once, and ends as it is told to by its model's name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Handler(BaseHTTPRequestHandler):
    """Says who it is."""

    def do_GET(self) -> None:
        """Health and models."""
        self._say({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    def do_POST(self) -> None:
        """An answer to anything."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self._say({"tokens": [1], "said_by": os.environ.get("KVBM_ENGINE_URL")})

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def _say(self, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def argument(name: str) -> str:
    """The value that follows that flag."""
    return sys.argv[sys.argv.index(name) + 1]


MODEL = argument("--model")
if "stubborn" in MODEL:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen(["sleep", "600"])  # which nobody but its group's end would end
if "broken" in MODEL and Path(MODEL).with_name("first").exists():
    print("RuntimeError: the weights are torn", flush=True)
    sys.exit(3)
Path(MODEL).with_name("first").touch()
server = ThreadingHTTPServer((argument("--host"), int(argument("--port"))), Handler)
print("serving", time.time(), flush=True)
server.serve_forever()

"""A real Prometheus that scrapes what a test tells it to."""

from __future__ import annotations

import contextlib
import json
import math
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.dev.programs import PROMETHEUS, find
from kvbm_service.adapters.embedded_server import mortal

CONFIG = Path(__file__).parents[2] / "deploy" / "prometheus" / "prometheus.yml"
SCRAPE_SECONDS = 0.2
PATIENCE_SECONDS = 60.0


def program(name: str) -> Path:
    """A program of Prometheus'; fails the test where there is none."""
    found = find(PROMETHEUS, name)
    if found is None:
        pytest.fail(PROMETHEUS.missing)
    return found


class Prometheus:
    """A running server."""

    def __init__(self, url: str) -> None:
        self._url = url

    def values(self, expression: str) -> list[float]:
        """What an expression gives now: the numbers, without those that are none."""
        answer = self._get("/api/v1/query?" + urllib.parse.urlencode({"query": expression}))
        numbers = [float(series["value"][1]) for series in answer["data"]["result"]]
        return [number for number in numbers if math.isfinite(number)]

    def values_while(self, work: Callable[[], None], expression: str) -> list[float]:
        """The numbers that the expression gives while there is work; none if there never are."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            work()
            if values := self.values(expression):
                return values
            time.sleep(0.1)
        return []

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(self._url + path, timeout=10) as answer:
            return json.load(answer)


@contextlib.contextmanager
def prometheus(folder: Path, targets: Sequence[str]) -> Iterator[Prometheus]:
    """Run one on a free port, with the deployed configuration but for whom to scrape, how often."""
    config = yaml.safe_load(CONFIG.read_text())
    for job in config["scrape_configs"]:
        job["scrape_interval"] = job["scrape_timeout"] = f"{SCRAPE_SECONDS * 1000:.0f}ms"
        job["static_configs"] = [{"targets": list(targets)}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    url = f"http://127.0.0.1:{free_port()}"
    log = folder / "prometheus.log"
    command = [
        program("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={url.removeprefix('http://')}",
    ]
    with log.open("wb") as output:
        server = subprocess.Popen(mortal(command), stdout=output, stderr=output)
    try:
        _wait_ready(server, url, log)
        yield Prometheus(url)
    finally:
        server.kill()  # its data is not wanted any more
        server.wait()


def free_port() -> int:
    """A port that nobody has just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_ready(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/-/ready", timeout=5):
            return
        time.sleep(0.05)
